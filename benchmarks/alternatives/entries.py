"""Keys and values that a memory holds for one layer, in the order of their positions."""

import torch

from .segment import LayerShape, Segment

SINKS = 4  # first tokens of the sequence, which every memory keeps (arXiv 2309.17453)


def tokens_in(room: int, shape: LayerShape) -> int:
    """How many tokens fit into `room` bytes. Raises ValueError where there is no room for any but the sinks."""
    tokens = room // shape.token_bytes
    if tokens <= SINKS:
        raise ValueError(
            f"{max(room, 0):,} bytes are left for the tokens of a layer, which is room for {max(tokens, 0)}, "
            f"{SINKS} sinks included: give a larger memory."
        )
    return tokens


def recent(tokens: int) -> int:
    """How many of the latest are not evicted from a memory of so many tokens."""
    return tokens // 8


def besides(segment: Segment, tokens: int) -> int:
    """How many tokens a memory of `tokens` may hold besides the segment that it is about to read.

    Raises ValueError where these are not even the sinks and the recent ones.
    """
    spare = tokens - segment.length
    if spare < SINKS + recent(tokens):
        raise ValueError(
            f"A memory of {tokens} tokens cannot read a segment of {segment.length}: give a larger memory."
        )
    return spare


class Entries:
    """k, v [G, n, D] and valid [G, n], which is false where a head holds fewer entries than another.

    The sinks come first, then what is not valid, then the rest by position: the latest tokens are the last.
    """

    def __init__(self, shape: LayerShape):
        self.k = self.v = torch.empty(shape.kv_heads, 0, shape.head_size, dtype=shape.dtype, device=shape.device)
        self.valid = torch.empty(shape.kv_heads, 0, dtype=torch.bool, device=shape.device)

    def __len__(self) -> int:
        return self.k.shape[1]

    @property
    def bytes(self) -> int:
        """Of what is valid."""
        return int(self.valid.sum()) * 2 * self.k.shape[-1] * self.k.itemsize

    def append(self, segment: Segment) -> None:
        self.k = torch.cat([self.k, segment.k], 1)
        self.v = torch.cat([self.v, segment.v], 1)
        self.valid = torch.nn.functional.pad(self.valid, (0, segment.length), value=True)

    def shift(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Remove the oldest tokens after the sinks and return their keys and values [G, tokens, D]."""
        cut = SINKS + tokens
        gone = self.k[:, SINKS:cut], self.v[:, SINKS:cut]
        self.k, self.v, self.valid = (torch.cat([x[:, :SINKS], x[:, cut:]], 1) for x in (self.k, self.v, self.valid))
        return gone

    def keep(self, kept: torch.Tensor) -> None:
        """Drop all but the entries where kept [G, n] is true, in each head; sinks stay in any case."""
        key = kept.byte() + 1
        key[:, :SINKS] = 0
        most = int(kept[:, SINKS:].sum(1).max())
        order = key.sort(dim=1, stable=True).indices
        order = torch.cat([order[:, :SINKS], order[:, order.shape[1] - most :]], 1)
        self.k, self.v = (x.take_along_dim(order[..., None], 1) for x in (self.k, self.v))
        self.valid = kept.gather(1, order)
        self.valid[:, :SINKS] = True

    def read(self, segment: Segment) -> torch.Tensor:
        """Attention [H, T, D] of a segment just appended over everything held."""
        logits = segment.logits(self.k)
        if not self.valid.all():
            absent = ~self.valid.repeat_interleave(len(logits) // len(self.valid), 0)
            logits.masked_fill_(absent[:, None], -torch.inf)
        return segment.mix(logits, self.v)
