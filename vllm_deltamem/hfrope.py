"""The rotary embedding of a model as Transformers computes it."""

import sys

import torch

from vllm_deltamem.kernels.slot import Rope, rotate
from vllm_deltamem.windows import FULL

PROBED = 32  # positions at which keys are turned to see how
BY_LENGTH = ("dynamic", "longrope")  # rope types whose angles depend on how many tokens there are


def rope_of(embedding: torch.nn.Module | None, config, positions: int) -> Rope | None:
    """Tables for that many positions of a base model's `rotary_emb`, for its full-attention layers, with unit norm.

    None where the model has no such module, or turns keys in a way that is not known.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    own = {"layer_type": FULL} if FULL in parameters else {}
    turn = embedding and getattr(sys.modules[type(embedding).__module__], "apply_rotary_pos_emb", None)
    if not turn or parameters.get(FULL, parameters).get("rope_type") in BY_LENGTH:
        return None
    device = embedding.inv_freq.device if hasattr(embedding, "inv_freq") else "cpu"
    count = torch.arange(positions, device=device)[None]
    cos, sin = (x[0].float() for x in embedding(torch.zeros(1, device=device), count, **own))
    half, probed = cos.shape[-1] // 2, torch.arange(min(PROBED, positions), device=device)
    key = torch.randn(len(probed), cos.shape[-1], generator=torch.Generator().manual_seed(0)).to(device)
    turned = turn(key[None, None], key[None, None], cos[None, probed], sin[None, probed])[1][0, 0]
    norm = (cos.square() + sin.square()).sqrt()
    cos, sin, turned = cos / norm, sin / norm, turned / norm[probed]
    # Angles of pairs may lie one after the other, or each twice.
    for columns, interleaved in ((slice(half), False), (slice(half), True), (slice(0, None, 2), True)):
        rope = Rope(cos[:, columns].contiguous(), sin[:, columns].contiguous(), interleaved)
        if torch.allclose(rotate(key, probed, rope), turned, atol=1e-4):
            return rope
    return None
