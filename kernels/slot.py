"""Typed views of one layer's part of every slot, the rank that orders entries, and the low-bit codes.

Letters: S slots, N sequences, T tokens, H query heads, G kv heads, R = H/G, D head size, L ring cells
(window + segment), X and Y the exact and coarse entries of all kv heads of the layer, laid side by side.
"""

from typing import NamedTuple

import torch

from . import pairs as pair_codes
from .pairs import LARGEST_CODED, PairCode, is_paired

# Version of what the bytes of a slot mean. Raise it whenever the same tokens come to leave other bytes, rounding apart,
# or bytes are read otherwise: memories that were saved under another one are then computed anew.
STATE = 3

FORGETTING = 2.0  # nats of expected influence that a token loses while a trained context goes by
KEYDIFF_NATS = 4.0  # of expected influence that one unit of KeyDiff stands for, about
CANDIDATES = 4096  # coarse entries of a head among which a merge looks for the nearest ones
EMPTY = 0  # rank of an entry that holds nothing: a slot full of zero bytes is an empty memory
POSITION_BITS = 31
MAX_POSITION = (1 << POSITION_BITS) - 1


class Codec(NamedTuple):
    """How coarse keys and values are stored: 16 keeps the model's dtype, 8 and 4 are affine, 5 and 3 pairs.py's."""

    key_bits: int
    value_bits: int


FIDELITIES = {"bf16": Codec(16, 16), "k8v8": Codec(8, 8), "k8v4": Codec(8, 4), "k5v4": Codec(5, 4), "k3v4": Codec(3, 4)}
PAIRED = {name for name, codec in FIDELITIES.items() if is_paired(codec.key_bits)}  # which take a profile's pairs


class LayerSlots(NamedTuple):
    """One layer of all slots. Every tensor is a strided view of the same slab, slot outermost.

    Head g owns exact entries exact_start[g]:exact_start[g+1] and coarse entries
    coarse_start[g]:coarse_start[g+1]; both fill from the front, in no order.

    A layer of sliding-window attention has no entries, and the tokens that leave its ring are gone.
    Where slots are parts, a sequence has several, slot_indices [N, parts], and all of its tokens lie in their rings.
    """

    pins: torch.Tensor  # [S, P, 2] int32, spans [first, end) of positions that the client pinned (all layers)
    ring_k: torch.Tensor  # [S, G, L, D] model dtype; token p sits in cell p % L, of part p // L
    ring_v: torch.Tensor  # [S, G, L, D] model dtype
    key_sum: torch.Tensor  # [S, G, D] fp32, sum of the pre-RoPE keys of every token that left the ring
    exact_k: torch.Tensor  # [S, X, D] model dtype, rotated
    exact_v: torch.Tensor  # [S, X, D] model dtype
    exact_rank: torch.Tensor  # [S, X] int64, see pack_rank
    coarse_k: torch.Tensor  # [S, Y, bytes] uint8, or [S, Y, D] model dtype
    coarse_v: torch.Tensor  # likewise
    coarse_k_affine: torch.Tensor  # [S, Y, D / group, 2] fp16 (scale, zero); [S, Y, 1, 1] of pairs, [S, Y, 0, 2] at 16
    coarse_v_affine: torch.Tensor  # likewise
    coarse_mass: torch.Tensor  # [S, Y] fp32, how many tokens the entry stands for
    coarse_rank: torch.Tensor  # [S, Y] int64
    exact_start: torch.Tensor  # [G + 1] int32
    coarse_start: torch.Tensor  # [G + 1] int32
    pairs: PairCode  # [G, P] of keys in 5 or 3 bits
    codec: Codec
    window: int
    segment: int
    sinks: int  # the first positions of every sequence, pinned without being asked
    sliding: bool = False  # a query sees exactly the last `window` tokens, itself among them
    parted: bool = False  # L is then no longer the window and a segment


class Rope(NamedTuple):
    """Rotary embedding as tables of angles; cos and sin are [P, rotary / 2] fp32 with unit norm.

    trained: tokens of context that the model was made for, at least window + 2 segments: no query sees a key
        from farther away (README.md, 7). 0 where no sequence gets that long.
    limit: of one sequence at one time, see reference.far_limit.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool  # GPT-J pairs (2i, 2i+1) instead of NeoX halves
    trained: int = 0
    limit: int = 0


class Policy(NamedTuple):
    """What decides importance and merging in one layer. Weights come from the profile.

    importance: None scores a token by KeyDiff, minus the cosine of its pre-RoPE key to the mean key
        (Park et al. 2025, arXiv 2504.15364, Eq. 4); else (w1 [G, 2D, U], b1 [G, U], w2 [G, U], b2 [G]) fp32,
        a two-layer GELU network on the token's unit-norm pre-RoPE key and value.
    gate: [G, 3] fp32 weights on (1, cosine to the nearest entry, log mass of that entry).
    """

    importance: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None
    gate: torch.Tensor


def forgetting(rope: Rope | None, policy: Policy) -> float:
    """What the score of a token gains with every position past the trained context.

    Instead of old tokens sinking, new ones rise. Only at a constant rate does the order of two never change.
    """
    if rope is None or not rope.trained:
        return 0.0
    return FORGETTING / rope.trained / (KEYDIFF_NATS if policy.importance is None else 1)


def candidates(coarse: int, gone: int, segment: int) -> list[range]:
    """Which of a full head's coarse entries a merge looks among, the lowest first, once `gone` tokens have left.

    A block of CANDIDATES that moves on by as many with every segment, and goes on at the front at the end.
    """
    if coarse <= CANDIDATES:
        return [range(coarse)]
    first = gone // segment * CANDIDATES % coarse
    wrapped = max(first + CANDIDATES - coarse, 0)
    return [range(wrapped), range(first, first + CANDIDATES - wrapped)]


def group_size(head_size: int, bits: int) -> int:
    """Values that share one (scale, zero): the whole vector at 8 bits, at most 64 at 4 bits."""
    if bits == 8:
        return head_size
    group = 64
    while head_size % group:
        group //= 2
    return group


def pack_rank(score: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Total order of entries as one positive int64: higher score first, then the earlier position.

    score: fp32 (+inf for sinks and pinned tokens, NaN counts as -inf); position: integer below 2^31.
    """
    bits = torch.nan_to_num(score.float(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    bits = (bits + 0.0).contiguous().view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = (
        (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long().add_(1 << 31)
    )  # the order of negative numbers is the other way
    return ordered.bitwise_left_shift_(POSITION_BITS).bitwise_or_(MAX_POSITION - position.long())


def rank_position(rank: torch.Tensor) -> torch.Tensor:
    """Position [int64] of the token that a rank was packed with; meaningless for EMPTY."""
    return MAX_POSITION - (rank & MAX_POSITION)


def key_position(rank: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """Position [int64] that an entry's key is turned to: its token's, 0 if that is far or the entry empty."""
    position, nowhere = rank_position(rank), rank == EMPTY
    if rope is not None and rope.limit:
        nowhere |= position < rope.limit
    return position.masked_fill_(nowhere, 0)


def encode(
    x: torch.Tensor, bits: int, dtype: torch.dtype, pairs: PairCode | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] fp32 -> (codes, affine [..., D / group, 2] fp16), so that x ~ zero + scale * code.

    At 4 bits a byte holds element i in its low half and element i + D/2 in its high half. 5 and 3 bits: pairs.encode.
    """
    if bits == 16:
        x = x.to(dtype)
        return x, x.new_empty(*x.shape[:-1], 0, 2, dtype=torch.float16)
    if is_paired(bits):
        return pair_codes.encode(x, bits, pairs)
    grouped = x.unflatten(-1, (-1, group_size(x.shape[-1], bits)))
    low, high = (x.clamp_(-LARGEST_CODED, LARGEST_CODED) for x in grouped.aminmax(dim=-1, keepdim=True))
    zero = low.half().float()
    scale = high.sub_(zero).div_(2**bits - 1).half().float()
    step = torch.where(scale > 0, scale, torch.inf)  # every code of a group without spread is 0
    code = (grouped - zero).div_(step).add_(0.5).clamp_(0, 2**bits - 1).floor_()
    codes = code.to(torch.uint8).flatten(-2)
    if bits == 4:
        low, high = codes.chunk(2, -1)
        codes = low | (high << 4)
    return codes, torch.cat([scale, zero], -1).half()


def decode(
    codes: torch.Tensor, affine: torch.Tensor, bits: int, dtype: torch.dtype, pairs: PairCode | None = None
) -> torch.Tensor:
    """Inverse of encode, rounded to the model's dtype: what attention reads. Returns [..., D]."""
    if bits == 16:
        return codes
    if is_paired(bits):
        return pair_codes.decode(codes, affine, bits, pairs, dtype)
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    grouped = codes.unflatten(-1, (affine.shape[-2], -1)).float()
    scale, zero = affine.float().unsqueeze(-1).unbind(-2)  # [..., D / group, 1] each
    return grouped.mul_(scale).add_(zero).flatten(-2).to(dtype)


def rotate(x: torch.Tensor, position: torch.Tensor, rope: Rope | None, inverse: bool = False) -> torch.Tensor:
    """Rotate x [..., D] fp32 to its position [...] (or back), leaving dimensions past the rotary ones alone."""
    if rope is None:
        return x
    listed = isinstance(position, torch.Tensor) and position.dim() == 1  # quicker than any other index
    cos, sin = (x.index_select(0, position) if listed else x[position] for x in (rope.cos, rope.sin))
    rotary = 2 * cos.shape[-1]
    head, tail = x[..., :rotary], x[..., rotary:]
    a, b = (head[..., 0::2], head[..., 1::2]) if rope.interleaved else head.chunk(2, -1)
    low, high, back, forth = a * cos, b * cos, b * sin, a * sin
    low, high = (low.add_(back), high.sub_(forth)) if inverse else (low.sub_(back), high.add_(forth))
    turned = torch.stack([low, high], -1).flatten(-2) if rope.interleaved else torch.cat([low, high], -1)
    return torch.cat([turned, tail], -1) if tail.shape[-1] else turned
