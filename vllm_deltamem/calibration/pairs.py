"""Which columns of its keys a head's queries look at, and how far keys go there (kernels/pairs.py).

An error in a column costs by the square of what queries multiply it with. So bits go where the squares of keys and
queries, after RoPE, have the largest product: the reverse water-filling of rate-distortion theory (Cover & Thomas,
Elements of Information Theory, 10.3.3) with two sizes of code.
"""

import torch

from vllm_deltamem.kernels.pairs import Pairs


def fit(key_square: torch.Tensor, query_square: torch.Tensor) -> Pairs:
    """Mean squares [..., P] fp32 of the keys' and the queries' pairs of columns -> Pairs of the keys."""
    place = (key_square * query_square).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return Pairs(place.int(), key_square.sqrt().clamp_min(1e-6))


def squares(x: torch.Tensor) -> torch.Tensor:
    """Mean squares [..., P] of the pairs of columns of vectors [..., T, D]."""
    return x.float().square().mean(-2).unflatten(-1, (2, -1)).mean(-2)
