"""Search for the nearest of all past keys: Memorizing Transformers (Wu et al., 2022, arXiv 2203.08913)."""

import torch

from .entries import SINKS, Entries, tokens_in
from .segment import LayerShape, Segment

TOP = 32  # keys that a query of a head finds; the paper's number


class Nearest:
    """A query sees sinks, window and those TOP older keys of all that have the largest products with it.

    Sinks, window and TOP together are as many tokens as fit into the room, but every token is held: this is
    not at equal bytes. The paper gives one layer of twelve such a memory and trains a gate between it and the
    window; a model not trained for it does better with one softmax over both, in every layer.
    """

    unbounded = False

    def __init__(self, shape: LayerShape, room: int):
        self.window = tokens_in(room - TOP * shape.token_bytes, shape) - SINKS
        self.entries = Entries(shape)

    @property
    def bytes(self) -> int:
        return self.entries.bytes

    def read(self, segment: Segment) -> torch.Tensor:
        self.entries.append(segment)
        logits = segment.logits(self.entries.k)
        place = torch.arange(len(self.entries), device=segment.q.device)
        old = (segment.positions[:, None] - place >= self.window) & (place >= SINKS)
        if old.any():
            older = logits.masked_fill(~old, -torch.inf)
            least = older.topk(min(TOP, len(self.entries))).values[..., -1:]
            logits.masked_fill_(old & (older < least), -torch.inf)
        return segment.mix(logits, self.entries.v)
