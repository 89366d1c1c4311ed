"""Eviction by the attention that queries to come are expected to pay: Expected Attention (Devoto et al., 2025).

arXiv 2510.00636, with budgets per head inside a layer as the paper recommends (Ada-KV, arXiv 2407.11550).
"""

import torch

from vllm_deltamem.kernels.slot import Rope

from .entries import SINKS, Entries, besides, recent, tokens_in
from .segment import LayerShape, Segment, products, turn

FUTURE = 512  # positions ahead over which the rotation of queries is averaged
FLOOR = 0.01  # what is added to a weight before it is multiplied by the value's norm
SAFEGUARD = 0.2  # share of its equal budget that no head goes without


class Expected:
    """Before a segment is read, a layer evicts what has the least expected attention times value norm.

    The statistics of queries are those of the prompt itself, as far as it has been read: the running mean of
    every query head before RoPE, without the sinks. Their covariance [H, D, D] is left out: it would take the
    bytes of 192 tokens a layer of SmolLM2-135M, and is worth 1% of perplexity there where it costs nothing.
    """

    unbounded = False

    def __init__(self, shape: LayerShape, room: int):
        self.mean = torch.zeros(shape.heads, shape.head_size, device=shape.device)
        self.state_bytes = self.mean.nbytes + 4 * shape.kv_heads  # and how many entries each head has
        self.tokens = tokens_in(room - self.state_bytes, shape)
        self.entries = Entries(shape)

    @property
    def bytes(self) -> int:
        return self.entries.bytes + self.state_bytes

    def read(self, segment: Segment) -> torch.Tensor:
        spare = besides(segment, self.tokens)
        if self.entries.valid.sum() > spare * len(self.entries.valid):
            self.entries.keep(self.strongest(self.score(segment.first, segment.rope, segment.scale), spare))
        self.entries.append(segment)
        self.observe(segment)
        return self.entries.read(segment)

    def observe(self, segment: Segment) -> None:
        """Add the segment's queries to the mean."""
        q = turn(segment.q, segment.positions, segment.rope, inverse=True)[:, max(SINKS - segment.first, 0) :]
        total = max(segment.first + segment.length - SINKS, 1)
        self.mean = self.mean + (q - self.mean[:, None]).sum(1) / total

    def score(self, position: int, rope: Rope, scale: float) -> torch.Tensor:
        """[G, n] fp32 at a position: (E + FLOOR) |v|, where E is the mean over the query heads of a group of

        softmax over n of R mean . k * scale,   R the mean rotation to the FUTURE positions that follow.
        """
        cos, sin = (table[position : position + FUTURE].mean(0, keepdim=True) for table in rope[:2])
        place = torch.zeros(1, dtype=torch.long, device=cos.device)
        mean = turn(self.mean[:, None], place, Rope(cos, sin, rope.interleaved))
        logits = products(mean, self.entries.k) * scale
        logits[..., :SINKS] = -torch.inf
        absent = ~self.entries.valid
        groups = logits.unflatten(0, (len(absent), -1))[:, :, 0].masked_fill(absent[:, None], -torch.inf)
        weight = groups.softmax(-1).mean(1)
        return ((weight + FLOOR) * self.entries.v.float().norm(dim=-1)).masked_fill(absent, -torch.inf)

    def strongest(self, score: torch.Tensor, spare: int) -> torch.Tensor:
        """Where the highest scores of all heads together are, `spare` a head on average."""
        score[:, :SINKS] = score[:, score.shape[1] - recent(self.tokens) :] = torch.inf
        safe = score.topk(round(SAFEGUARD * spare)).indices
        score = score.scatter(1, safe, torch.inf).masked_fill(~self.entries.valid, -torch.inf)
        best = score.flatten().topk(spare * len(score)).indices
        return torch.zeros_like(score, dtype=torch.bool).view(-1).scatter_(0, best, True).view_as(score)
