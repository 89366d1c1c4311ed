"""A stretch of one sequence in one attention layer: its queries, and attention of them."""

from typing import NamedTuple

import torch

from vllm_deltamem.kernels.slot import Rope, rotate


class LayerShape(NamedTuple):
    """What of a model decides the size of a memory of one layer."""

    heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device | str = "cpu"

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all kv heads."""
        return 2 * self.kv_heads * self.head_size * self.dtype.itemsize


class Segment(NamedTuple):
    """T consecutive tokens as the model attends with them: rotated to their positions, in its dtype."""

    q: torch.Tensor  # [H, T, D]
    k: torch.Tensor  # [G, T, D]
    v: torch.Tensor  # [G, T, D]
    first: int  # position of the first token
    rope: Rope  # tables for all positions so far and the FUTURE ones of expected.py
    scale: float

    @property
    def length(self) -> int:
        return self.q.shape[1]

    @property
    def positions(self) -> torch.Tensor:
        """[T]"""
        return torch.arange(self.first, self.first + self.length, device=self.q.device)

    def logits(self, k: torch.Tensor) -> torch.Tensor:
        """Scaled products [H, T, n] fp32 with keys k [G, n, D], of which the last T are the segment's own."""
        found = products(self.q, k) * self.scale
        later = self.positions > self.positions[:, None]
        found[..., -self.length :].masked_fill_(later, -torch.inf)
        return found

    def mix(self, logits: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Means [H, T, D] of values v [G, n, D], weighted by the softmax of logits [H, T, n]."""
        return products(logits.softmax(-1), v.mT).to(v.dtype)


def products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[H, T, n] fp32 of x [H, T, d] and y [G, n, d], where H / G heads of x share one of y."""
    groups = x.float().reshape(len(y), -1, x.shape[-1])
    return (groups @ y.float().mT).view(*x.shape[:2], -1)


def turn(x: torch.Tensor, positions: torch.Tensor, rope: Rope, inverse: bool = False) -> torch.Tensor:
    """x [..., T, D] in fp32, rotated to positions [T], or back."""
    return rotate(x.float(), positions, rope, inverse)
