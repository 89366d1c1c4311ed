"""A Hugging Face model that reads one sequence, segment by segment, through an alternative's memories."""

import torch

from vllm_deltamem.calibration.frozen import FrozenModel

from .expected import FUTURE
from .segment import LayerShape, Segment


class Reader:
    """Holds `room` bytes per sequence, the same in every layer."""

    def __init__(self, model: FrozenModel, alternative: type, room: int, segment: int):
        self.model, self.alternative, self.room, self.segment = model, alternative, room, segment
        known, dtype = model.fingerprint, model.model.dtype
        self.shape = LayerShape(known["heads"], known["kv_heads"], known["head_size"], dtype, model.device)
        self.clear()

    def clear(self) -> None:
        """Begin another sequence."""
        count = self.model.fingerprint["layers"]
        self.layers = [self.alternative(self.shape, self.room // count) for _ in range(count)]
        self.seen: list[int] = []

    def ask(self, prompt: list[int], whole: bool = False) -> torch.Tensor:
        """Last hidden states of what of the prompt is new: all of it, unless it begins with what was read before.

        whole: all of it in any case.
        """
        known = len(self.seen)
        if whole or known >= len(prompt) or prompt[:known] != self.seen:
            self.clear()
            known = 0
        return self.read(prompt[known:])

    @property
    def bytes(self) -> int:
        """What the sequence holds now, in all layers."""
        return sum(layer.bytes for layer in self.layers)

    @torch.inference_mode()
    def read(self, ids: list[int]) -> torch.Tensor:
        """Last hidden states [T, E] of tokens that follow those read before.

        Every memory reads them in segments, cut at multiples of `segment`. As it depends on its own layer alone,
        all tokens pass through a layer before any comes to the next.
        """
        first, end = len(self.seen), len(self.seen) + len(ids)
        cuts = [first, *range((first // self.segment + 1) * self.segment, end, self.segment), end]
        sizes = [b - a for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        angles = (end // FUTURE + 2) * FUTURE

        def attention(layer, q, k, v, scale, sinks=None):
            if sinks is not None:
                raise ValueError("The alternatives do not know attention with learned sinks.")
            rope = self.model.rope(layer, angles)
            pieces = zip(*(x.split(sizes, 1) for x in (q, k, v)), cuts[:-1], strict=True)
            return torch.cat([self.layers[layer].read(Segment(*piece, rope, scale)) for piece in pieces], 1)

        embedded = self.model.model.get_input_embeddings()(torch.tensor(ids, device=self.model.device))
        self.seen += ids
        return self.model.hidden(embedded, attention, first)
