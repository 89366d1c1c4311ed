"""Sinks and a window of recent tokens: StreamingLLM (Xiao et al., 2024, arXiv 2309.17453)."""

import torch

from .entries import SINKS, Entries, tokens_in
from .segment import LayerShape, Segment, products, turn


class Streaming:
    """Every query sees the sinks and the window that ends with its own token.

    Positions are places in the cache, as in the paper: between tokens of the window that is the distance they
    have anyway, and from a sink it never grows past the size of the cache.
    """

    unbounded = True

    def __init__(self, shape: LayerShape, room: int):
        self.tokens = tokens_in(room, shape)
        self.entries = Entries(shape)

    @property
    def bytes(self) -> int:
        return self.entries.bytes

    def read(self, segment: Segment) -> torch.Tensor:
        self.entries.append(segment)
        logits = segment.logits(self.entries.k)
        at, end = segment.positions, segment.first + segment.length
        if end > self.tokens:
            place = at.clamp(max=self.tokens - 1)
            q = turn(turn(segment.q, at, segment.rope, inverse=True), place, segment.rope)
            sinks = products(q, self.entries.k[:, :SINKS]) * segment.scale
            logits[..., :SINKS] = torch.where(torch.isinf(logits[..., :SINKS]), -torch.inf, sinks)
            rest = torch.arange(end - len(self.entries) + SINKS, end, device=at.device)
            gone = at[:, None] - rest >= self.tokens - SINKS
            logits[..., SINKS:].masked_fill_(gone, -torch.inf)
        out = segment.mix(logits, self.entries.v)
        if len(self.entries) > self.tokens:
            self.entries.shift(len(self.entries) - self.tokens)
        return out
