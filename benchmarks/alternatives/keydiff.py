"""Eviction of the keys that are most like the others: KeyDiff (Park et al., 2025, arXiv 2504.15364)."""

import torch

from .entries import SINKS, Entries, besides, recent, tokens_in
from .segment import LayerShape, Segment


class KeyDiff:
    """Before a segment is read, every head evicts what is closest to the mean direction of the keys it holds.

    score(k) = -cos(k, mean over the held keys of k / |k|), on keys as the cache holds them, after RoPE.
    """

    unbounded = False

    def __init__(self, shape: LayerShape, room: int):
        self.tokens = tokens_in(room, shape)
        self.entries = Entries(shape)

    @property
    def bytes(self) -> int:
        return self.entries.bytes

    def read(self, segment: Segment) -> torch.Tensor:
        spare = besides(segment, self.tokens)
        if len(self.entries) > spare:
            self.entries.keep(strongest(self.score(), spare, recent(self.tokens)))
        self.entries.append(segment)
        return self.entries.read(segment)

    def score(self) -> torch.Tensor:
        """[G, n] fp32"""
        unit = torch.nn.functional.normalize(self.entries.k.float(), dim=-1)
        return -torch.cosine_similarity(unit, unit.mean(1, keepdim=True), dim=-1)


def strongest(score: torch.Tensor, count: int, latest: int) -> torch.Tensor:
    """Of score [G, n] where the `count` highest of every head are, sinks and latest tokens before all others."""
    protected = score.clone()
    protected[:, :SINKS] = protected[:, score.shape[1] - latest :] = torch.inf
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, protected.topk(count).indices, True)
