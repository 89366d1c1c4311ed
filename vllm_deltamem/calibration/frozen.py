"""A frozen Hugging Face model whose full attention is ours to replace, layer by layer."""

from collections.abc import Callable

import torch
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_deltamem.hfrope import rope_of
from vllm_deltamem.kernels.slot import Rope, rotate
from vllm_deltamem.layers import count_recurrent, find_attending, find_rotated, find_windows
from vllm_deltamem.memory import Shape
from vllm_deltamem.precision import fast_dtype
from vllm_deltamem.profile import fingerprint_of

IMPLEMENTATION = "deltamem_calibration"
CLOSED = "Transformers does not let calibration into the attention of"
POSITIONS, TOLERANCE = 32, 0.05  # of the check of how keys are turned; bfloat16 errs by 0.01
Attention = Callable[..., torch.Tensor]


class FrozenModel:
    """A model of which no weight changes. Layers are those that attend, counted by themselves.

    An attention is called with (layer, q [H, T, D], k [G, T, D], v [G, T, D], scale), rotated and in the
    dtype that is computed in, and returns [H, T, D]; where the model has learned sinks, with their logits [H], too.
    Layers with a sliding window keep theirs.

    dtype: of the weights on disk, in which vLLM serves them.
    """

    def __init__(self, folder: str, device: str = "cpu", fast: bool = False):
        """fast: compute in float32 on a CPU that is slow at the model's own dtype.

        Raises ValueError for a model whose config does not say how many kv heads it has, whose attention Transformers
        does not let be replaced, or that turns keys in a way that is not known.
        """
        config = AutoConfig.from_pretrained(folder)
        self.fingerprint = fingerprint_of(config)
        if self.fingerprint["kv_heads"] is None:
            raise ValueError(f"Calibration does not know the kv heads of {config.model_type} models.")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        try:
            self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=IMPLEMENTATION, dtype="auto")
        except KeyError as error:  # it has a table of attentions of its own
            raise ValueError(f"{CLOSED} {config.model_type} models.") from error
        self.dtype = self.model.dtype
        computed = fast_dtype(self.dtype, device) if fast else self.dtype
        self.model.to(device, computed).eval().requires_grad_(False)
        self.device = device
        self.config = self.model.config.get_text_config()
        self._layers = {place: layer for layer, place in enumerate(find_attending(self.config))}
        self._rope: Rope | None = None
        self._check_turning()

    def shape(self, context: int) -> Shape:
        """What decides the size of its memory in a context of that many tokens."""
        layers, kv_heads, size = (self.fingerprint[name] for name in ("layers", "kv_heads", "head_size"))
        return Shape(layers, kv_heads, size, self.dtype, context, find_windows(self.config, context))

    def rope(self, layer: int, positions: int) -> Rope | None:
        """Tables of a full-attention layer's rotary embedding for at least that many positions, with unit norm.

        None when the layer has none.
        """
        if not find_rotated(self.config)[layer]:
            return None
        if self._rope is None or len(self._rope.cos) < positions:
            embedding = getattr(self.model.base_model, "rotary_emb", None)
            self._rope = rope_of(embedding, self.config, positions, self.device)
        return self._rope

    def logits(self, ids: torch.Tensor, attention: Attention, wanted: torch.Tensor, grad: bool = False) -> torch.Tensor:
        """Logits [W, vocabulary] fp32 that predict the tokens at positions `wanted` [W] of ids [T].

        With grad, what follows the embeddings can be differentiated with respect to activations.
        """
        with torch.set_grad_enabled(grad):
            embedded = self.model.get_input_embeddings()(ids.to(self.device)).detach().requires_grad_(grad)
            return self.predict(self.hidden(embedded, attention)[wanted - 1])

    def hidden(self, embedded: torch.Tensor, attention: Attention, first: int = 0) -> torch.Tensor:
        """Last hidden states [T, E] of embeddings [T, E] at positions from `first` on.

        Raises ValueError for a piece of a sequence where layers have sliding windows or are recurrent: only whole ones
        go through.
        """
        if first and (any(find_windows(self.config, first + len(embedded))) or count_recurrent(self.config)):
            raise ValueError("A model with sliding-window or recurrent layers takes whole sequences here, not pieces.")
        return self._pass(embedded, attention, first)

    def _pass(self, embedded: torch.Tensor, attention: Attention, first: int) -> torch.Tensor:
        """Last hidden states of embeddings, whatever came before them."""
        end = first + len(embedded)
        positions, windows = torch.arange(first, end, device=self.device)[None], find_windows(self.config, end)

        def attend(place, *given):
            layer = self._layers[place]
            if windows[layer]:
                return full_attention(layer, *given, window=windows[layer])
            return attention(layer, *given)

        ACTIVE.append(attend)
        try:
            return self.model.base_model(inputs_embeds=embedded[None], position_ids=positions, use_cache=False)[0][0]
        finally:
            ACTIVE.pop()

    @torch.no_grad()
    def _check_turning(self) -> None:
        """Raise ValueError unless rope() says how every layer turns keys: as it does the same ones at two places."""
        any_token = torch.tensor([self.config.vocab_size // 2], device=self.device)  # the first may be all zeros
        token, keys = self.model.get_input_embeddings()(any_token), {0: [], POSITIONS: []}
        for first, plain in keys.items():
            position = torch.arange(first, first + POSITIONS, device=self.device)

            def nothing(layer, q, k, *_, position=position, plain=plain):  # so that both have the same states
                plain.append(rotate(k.float(), position, self.rope(layer, 2 * POSITIONS), inverse=True))
                return torch.zeros_like(q)

            self._pass(token.expand(POSITIONS, -1), nothing, first)
        turning = [(b - a).norm(dim=-1).amax() / a.norm(dim=-1).amax() for a, b in zip(*keys.values(), strict=True)]
        if not turning:
            raise ValueError(f"{CLOSED} {self.config.model_type} models.")
        if not max(turning) <= TOLERANCE:
            raise ValueError(
                f"Calibration does not know how {self.config.model_type} models turn keys to their positions."
            )

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] fp32 of the tokens that follow last hidden states [..., E]."""
        logits = self.model.get_output_embeddings()(hidden).float() * getattr(self.config, "logit_scale", 1.0)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits


ACTIVE: list[Attention] = []


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_):
    if softcap is not None:
        raise ValueError("Calibration does not know attention with soft-capped logits.")
    sinks = () if s_aux is None else (s_aux,)
    out = ACTIVE[-1](module.layer_idx, query[0], key[0], value[0], scaling, *sinks)
    return out.transpose(0, 1)[None].contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)


def full_attention(
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """What the model was trained with; window: last tokens that a query sees, itself among them."""
    if sinks is not None:  # one more token before the others, its key in a column of its own, its value zero
        column = (sinks.to(q) / scale)[:, None, None].expand(-1, q.shape[1], 1)
        q, k, v = torch.cat([q, column], -1), pad(k, (0, 1)), pad(v, (0, 1))
        q, k, v = (pad(x, (0, 7, 1, 0)) for x in (q, k, v))  # kernels want widths that are multiples of eight
        k[:, 0, -8] = 1
    masked = {"is_causal": True}
    if window is not None:
        place = torch.arange(q.shape[1], device=q.device)
        distance = place[:, None] - place
        masked = {"attn_mask": (distance >= 0) & ((distance < window) | (place < (sinks is not None)))}
    out = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], **masked, scale=scale, enable_gqa=True
    )[0]
    return out if sinks is None else out[:, 1:, :-8]
