"""Keys in three or five bits per value (README.md, 3): 8 or 4 in the columns that a head's queries look at most.

P = D / 2 pairs of columns i and i + D / 2, which NeoX RoPE turns into each other, so that they matter alike at any
position. Which matter most, and how far keys go there, is the profile's (calibration/pairs.py).
"""

from typing import NamedTuple

import torch

WIDER = 1.5  # reach of 8-bit columns, in units of the others': the few that count most must not raise the gain
LARGEST = 65504.0  # of fp16
LARGEST_CODED = 65440.0  # of what is coded in fp16 numbers: read again it is in fp16's range, however they round


class Pairs(NamedTuple):
    """What a head's queries make of its keys' columns, whatever bits they get."""

    place: torch.Tensor  # [..., P] int32, of each pair in order, those that matter most first
    reach: torch.Tensor  # [..., P] fp32, how far keys go there, in any unit


class PairCode(NamedTuple):
    """Of every head, or of one, or of every row of a call."""

    place: torch.Tensor  # [..., P] int32, as above
    step: torch.Tensor  # [..., P] fp32, half the distance of two codes at a gain of 1; 0 of pairs without a code

    def of(self, head) -> "PairCode":
        return PairCode(self.place[head], self.step[head])


def is_paired(bits: int) -> bool:
    """Whether so many bits per value are those of a code of pairs."""
    return bits in (3, 5)


def pair_counts(head_size: int, bits: int) -> tuple[int, int]:
    """How many pairs have 8 bits per column, and how many 4. The rest have none."""
    pairs = head_size // 2
    return (pairs // 16, 5 * pairs // 8) if bits == 3 else (pairs // 4, pairs - pairs // 4)


def pair_bytes(head_size: int, bits: int) -> int:
    """Bytes of the codes of one key."""
    wide, narrow = pair_counts(head_size, bits)
    return 2 * wide + narrow


def pair_code(pairs: Pairs | None, bits: int, kv_heads: int, device: torch.device | str) -> PairCode:
    """The code of a layer's keys [G, P]; [G, 0] where pairs have no part in it."""
    if pairs is None or not is_paired(bits):
        nothing = torch.empty(kv_heads, 0, device=device)
        return PairCode(nothing.int(), nothing)
    wide, narrow = pair_counts(2 * pairs.place.shape[-1], bits)
    reach = torch.where(pairs.place < wide, WIDER * pairs.reach, pairs.reach)
    step = (reach / _most(pairs.place, wide)).masked_fill(pairs.place >= wide + narrow, 0)
    return PairCode(*(part.contiguous().to(device) for part in (pairs.place, step)))


def encode(x: torch.Tensor, bits: int, pairs: PairCode) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] fp32 -> (codes [..., bytes] uint8, gain [..., 1, 1] fp16).

    The gain is the least that keeps every coded value within reach. A wide pair has a byte for each value, the first
    ones first; a narrow one has a byte after these, with column i in its low half and i + D / 2 in its high half.
    """
    wide, narrow = pair_counts(x.shape[-1], bits)
    low, high = x.chunk(2, -1)
    most = _most(pairs.place, wide)
    reach = (pairs.step * most).masked_fill(pairs.step == 0, torch.inf)
    gain = torch.maximum(low.abs(), high.abs()).div_(reach).amax(-1, keepdim=True).clamp_(max=LARGEST).half()
    step = gain.float() * pairs.step
    level = step.masked_fill(step == 0, torch.inf)
    low, high = (((half / level + most) * 0.5 + 0.5).floor_().clamp_(min=0).minimum(most) for half in (low, high))
    order = pairs.place.argsort(-1).expand(low.shape)
    first, second = (code.gather(-1, order).to(torch.uint8) for code in (low, high))
    both = (first | (second << 4))[..., wide : wide + narrow]
    codes = torch.cat([first[..., :wide], second[..., :wide], both], -1)
    return codes, gain.unsqueeze(-1)


def decode(codes: torch.Tensor, gain: torch.Tensor, bits: int, pairs: PairCode, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of encode, rounded to the model's dtype; [..., D]."""
    count = pairs.place.shape[-1]
    wide, narrow = pair_counts(2 * count, bits)
    both = codes[..., 2 * wide :]
    none = codes.new_zeros(*codes.shape[:-1], count - wide - narrow)
    first = torch.cat([codes[..., :wide], both & 15, none], -1)
    second = torch.cat([codes[..., wide : 2 * wide], both >> 4, none], -1)
    place = pairs.place.long().expand(first.shape)
    low, high = (code.gather(-1, place).float() for code in (first, second))
    step, most = gain.squeeze(-1).float() * pairs.step, _most(pairs.place, wide)
    halves = (((2 * code - most) * step).masked_fill_(pairs.step == 0, 0) for code in (low, high))  # one rounding
    return torch.cat(list(halves), -1).to(dtype)


def _most(place: torch.Tensor, wide: int) -> torch.Tensor:
    """The highest code of each pair."""
    return 15.0 + 240.0 * (place < wide)
