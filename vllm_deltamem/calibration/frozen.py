"""A frozen Hugging Face model whose attention is ours to replace, layer by layer."""

from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_deltamem.kernels.slot import Rope
from vllm_deltamem.profile import fingerprint_of

IMPLEMENTATION = "deltamem_calibration"
Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


class FrozenModel:
    """A model of which no weight changes.

    An attention is called with (layer, q [H, T, D], k [G, T, D], v [G, T, D], scale), rotated and in the
    model's dtype, and returns [H, T, D].
    """

    def __init__(self, folder: str, device: str = "cpu"):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=IMPLEMENTATION, dtype="auto")
        self.model.to(device).eval().requires_grad_(False)
        self.device = device
        self.config = self.model.config
        self.fingerprint = fingerprint_of(self.config)
        self._rope: Rope | None = None

    def rope(self, positions: int) -> Rope:
        """Tables of the rotary embedding for at least that many positions, with unit norm."""
        if self._rope is None or len(self._rope.cos) < positions:
            embedding = self.model.base_model.rotary_emb
            count = torch.arange(positions, device=self.device)[None]
            cos, sin = embedding(torch.zeros(1, device=self.device), count)
            half = cos.shape[-1] // 2
            cos, sin = cos[0, :, :half].float(), sin[0, :, :half].float()
            norm = (cos.square() + sin.square()).sqrt()
            self._rope = Rope(cos / norm, sin / norm, interleaved=False)
        return self._rope

    def logits(self, ids: torch.Tensor, attention: Attention, wanted: torch.Tensor, grad: bool = False) -> torch.Tensor:
        """Logits [W, vocabulary] fp32 that predict the tokens at positions `wanted` [W] of ids [T].

        With grad, what follows the embeddings can be differentiated with respect to activations.
        """
        with torch.set_grad_enabled(grad):
            embedded = self.model.get_input_embeddings()(ids.to(self.device)).detach().requires_grad_(grad)
            return self.predict(self.hidden(embedded, attention)[wanted - 1])

    def hidden(self, embedded: torch.Tensor, attention: Attention, first: int = 0) -> torch.Tensor:
        """Last hidden states [T, E] of embeddings [T, E] at positions from `first` on."""
        positions = torch.arange(first, first + len(embedded), device=self.device)[None]
        ACTIVE.append(attention)
        try:
            return self.model.base_model(inputs_embeds=embedded[None], position_ids=positions, use_cache=False)[0][0]
        finally:
            ACTIVE.pop()

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] fp32 of the tokens that follow last hidden states [..., E]."""
        return self.model.get_output_embeddings()(hidden).float()


ACTIVE: list[Attention] = []


def _attention(module, query, key, value, attention_mask, scaling=None, **_):
    out = ACTIVE[-1](module.layer_idx, query[0], key[0], value[0], scaling)
    return out.transpose(0, 1)[None].contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)


def full_attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """What the model was trained with."""
    return torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True
    )[0]
