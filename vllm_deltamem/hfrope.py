"""The rotary embedding of a model as Transformers computes it."""

import sys
from inspect import signature
from itertools import product

import torch

from vllm_deltamem.kernels.slot import Rope, rotate
from vllm_deltamem.layers import FULL

PROBED = 32  # positions at which keys are turned to see how


def rope_of(embedding: torch.nn.Module | None, config, positions: int, device: torch.device | str) -> Rope | None:
    """Tables for that many positions of a base model's `rotary_emb`, for its full-attention layers, with unit norm.

    device: the module's. None where the model has no such module, or turns keys in a way that is not known.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    own = {"layer_type": FULL} if FULL in parameters else {}
    turn = embedding and getattr(sys.modules[type(embedding).__module__], "apply_rotary_pos_emb", None)
    if not turn:
        return None
    count = torch.arange(positions, device=device)[None]
    try:
        cos, sin = (x[0].float() for x in embedding(torch.zeros(1, device=device), count, **own))
    except (TypeError, ValueError, RuntimeError):  # other arguments
        return None
    norm = (cos[:, :1].square() + sin[:, :1].square()).sqrt()
    cos, sin, columns = cos / norm, sin / norm, cos.shape[-1]
    probed = torch.arange(min(PROBED, positions), device=device)
    # Angles of pairs may lie one after the other twice, or each twice, or there is one column for both (gpt-oss).
    layouts = (slice(columns // 2), False), (slice(columns // 2), True), (slice(0, None, 2), True), (slice(None), False)
    for (part, interleaved), way in product(layouts, (1, -1)):  # NanoChat turns the other way
        rope = Rope(cos[:, part].contiguous(), way * sin[:, part].contiguous(), interleaved)
        key = torch.randn(
            len(probed), 2 * rope.cos.shape[1], generator=torch.Generator("cpu").manual_seed(0), device="cpu"
        ).to(device)
        try:
            turned = _turned(turn, key, cos[probed], sin[probed])
        except (TypeError, ValueError, RuntimeError):  # keys of another width
            continue
        if torch.allclose(rotate(key, probed, rope), turned, atol=1e-4):
            return rope
    return None


def _turned(turn, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Keys [T, D] as a function of Transformers' turns them, one of queries and keys or of either (Gemma 4)."""
    key, cos, sin = key[None, None], cos[None], sin[None]
    both = "k" in signature(turn).parameters
    return (turn(key, key, cos, sin)[1] if both else turn(key, cos, sin))[0, 0]
