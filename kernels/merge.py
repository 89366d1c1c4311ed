"""Merging in Triton: the oldest segment leaves the ring, as reference.merge defines it (README.md, 4 to 6).

Nine launches, one more with a learned score and one more past the trained context, each over (sequence, head)
and, where it pays, over entries. The number of programs is fixed, as if every sequence of the call completed a segment:
the i-th share of them serves the i-th that does, and ends at once when there is none.

The ring cells of the outgoing segment serve as the list of tokens that look for a place: whatever an entry
gives up takes the cell of the token that won it. After a merge they hold no tokens of the ring.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton

from . import slot
from .demote import demote
from .duels import count, order, pick
from .exchange import exchange
from .launch import buffer, half_width, heads_of, rows_of, rows_width
from .nearest import nearest
from .scores import prepare, rank, score
from .slot import LayerSlots, Policy, Rope, forgetting
from .update import group, update

SCORED = 16  # tokens of a tile of the learned score
PAIRS = 8  # pairs of columns of a program that adds up keys
GROUPS, GROUPED = 16, 64  # groups of entries of a program that looks for the lowest, and entries of each at a time
TURNED = 64  # entries of a program that turns what becomes far
COUNTED = 1024  # entries of a program that counts
PICKED = 1024  # entries that a program picks from at a time
ORDERED, COMPARED = 32, 128  # picked entries of a tile, and those it is compared with at a time
CELLS = 16  # of a program that exchanges
TARGETS, LOSERS = 128, 64  # entries and losers of a tile of the nearest search
MERGED, MERGING = 16, 16  # entries of a program that updates, and losers that it adds up at a time


class Work(NamedTuple):
    """Scratch of a merge of R sequences. Of the outgoing segment's C tokens, in the order of their cells."""

    score: torch.Tensor  # [R, G, C] fp32, of the learned importance
    dot: torch.Tensor  # [R, G, parts, C] fp32, products with the mean key, over a few columns each
    norm: torch.Tensor  # [R, G, parts, C] fp32, squares of the keys likewise
    rank: torch.Tensor  # [R, G, C] int64, of what each cell holds
    mass: torch.Tensor  # [R, G, C] fp32
    taker: torch.Tensor  # [R, G, C] fp32, see group
    unit: torch.Tensor  # [R, G, C, 2, HALF] what the cells hold: pre-RoPE, centred, norm 1
    nearest: torch.Tensor  # [R, G, C] int64, pack_rank(cosine, entry) of the nearest coarse entry; then see group
    first: torch.Tensor  # [R, G, 2C] int32, see group
    lowest: torch.Tensor  # [R, G, C] int64, lowest rank of each of C groups of coarse entries
    bound: torch.Tensor  # [R, G] int64, the highest of them
    pivot: torch.Tensor  # [R, G, 2C] int64, ranks of newcomers and of sampled entries, highest first
    fresh: torch.Tensor  # [R, G, 2C] int32, newcomers among the pivots before this one
    place: torch.Tensor  # [R, G, C] int32, of each newcomer among the pivots
    counts: torch.Tensor  # [R, G, 2, 2C] int32, exact and coarse entries between this pivot and the next lower
    under: torch.Tensor  # [R, G, 2C] int32, exact entries below this pivot
    plan: torch.Tensor  # [R, G, 8] int32, see duels.py
    listed: torch.Tensor  # [R, Y] int32, coarse entries of a head up to its bound, in no order
    picked_exact: torch.Tensor  # [R, X] int32, entries of a head that may lose, in no order
    picked_coarse: torch.Tensor  # [R, Y] int32, likewise
    losing: torch.Tensor  # [R, G, 2, C] int32, exact and coarse entries that lose, worst first


def merge(
    slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, rope: Rope | None, policy: Policy,
    max_seq_len: int | None = None,
) -> None:  # fmt: skip
    """See reference.merge.

    max_seq_len: an upper bound of the sequences' lengths, if the host knows one; while no head overflows it saves
    the search for the nearest entries.
    """
    if slots.sliding:
        return
    kv_heads, _, size = slots.ring_k.shape[1:]
    rows, heads, segment = rows_of(slot_indices, cu_seqlens, seq_lens), heads_of(slots), slots.segment
    sequences, parts, learned = len(slot_indices), _parts(size), policy.importance is not None
    work = _work(
        triton.next_power_of_2(sequences), kv_heads, segment, size, sum(heads.exact), sum(heads.coarse),
        slots.ring_k.dtype, slots.ring_k.device,
    )  # fmt: skip
    cos, sin = (rope.cos, rope.sin) if rope else (slots.key_sum, slots.key_sum)
    turn = dict(ROTARY=2 * rope.cos.shape[1] if rope else 0, INTERLEAVED=bool(rope and rope.interleaved))
    trained = dict(TRAINED=rope.trained if rope else 0)
    lies, batch = trained | turn, dict(WINDOW=slots.window, SEGMENT=segment, ROWS=rows_width(len(slot_indices)))
    shape = dict(D=size, HALF=half_width(size), **batch)
    bits = dict(KEY_BITS=slots.codec.key_bits, VALUE_BITS=slots.codec.value_bits)
    common, per_head = (slots, heads.stride, work, *rows), sequences * kv_heads

    if lies["TRAINED"]:
        turned = heads.tiles(tuple(heads.capacities), TURNED)
        demote[(sequences * len(turned),)](
            slots, heads.stride, *rows, cos, sin, turned, len(turned),
            ENTRIES=TURNED, KEY_BITS=bits["KEY_BITS"], **shape, **lies, num_warps=8,
        )  # fmt: skip
    if learned:
        weights = [w.contiguous() for w in policy.importance]
        units, tokens = weights[0].shape[2], max(16, min(SCORED, segment))
        score[(per_head * -(-segment // tokens),)](
            *common, cos, sin, *weights, kv_heads, units, UNITS=max(16, triton.next_power_of_2(units)),
            TOKENS=tokens, **shape, **turn, num_warps=4, num_stages=1,
        )  # fmt: skip
    groups = min(GROUPS, segment)
    prepare[(per_head * (parts + segment // groups),)](
        *common, cos, sin, kv_heads, D=size, PAIRS=PAIRS, COLUMNS=parts, GROUPS=groups, GROUPED=GROUPED,
        LEARNED=learned, **batch, **turn, num_warps=8,
    )  # fmt: skip
    rank[(per_head,)](
        *common, kv_heads, forgetting(rope, policy), D=size, COLUMNS=parts, SPANS=slots.pins.shape[1],
        LEARNED=learned, **batch, **trained, num_warps=8,
    )  # fmt: skip
    counted = heads.tiles(tuple(heads.capacities), COUNTED)
    count[(sequences * len(counted),)](*common, kv_heads, counted, len(counted), ENTRIES=COUNTED, **batch, num_warps=4)
    picking = max(8 * segment // PICKED, 1)  # about segment * ln(segment) entries of a large head are listed
    pick[(per_head * picking,)](*common, kv_heads, PARTS=picking, ENTRIES=PICKED, **batch, num_warps=4)
    ordering = max(segment // ORDERED, 1)  # hardly more entries are picked than can lose
    order[(per_head * 2 * ordering,)](
        *common, kv_heads, PARTS=ordering, ORDERED=ORDERED, COMPARED=COMPARED, **batch, num_warps=4
    )
    cells = min(CELLS, segment)
    exchange[(per_head * (segment // cells),)](
        *common, cos, sin, kv_heads, CELLS=cells, **shape, **lies, **bits, num_warps=4
    )
    if max_seq_len is not None and max_seq_len - slots.window <= min(heads.capacities):
        return
    at_once = TARGETS if size <= 256 else TARGETS // 4  # shared memory holds them
    targets = heads.tiles(tuple(min(coarse, slot.CANDIDATES) for coarse in heads.coarse), at_once)
    nearest[(sequences * len(targets),)](
        *common, cos, sin, kv_heads, targets, len(targets), CANDIDATES=slot.CANDIDATES, TARGETS=at_once,
        LOSERS=max(16, min(LOSERS, segment)), KEY_BITS=bits["KEY_BITS"], **shape, **lies,
        num_warps=8, num_stages=2, maxnreg=128 if size in (64, 128) else None,
    )  # fmt: skip
    group[(per_head,)](*common, policy.gate.contiguous(), kv_heads, **batch, num_warps=4)
    update[(per_head * 2 * -(-segment // MERGED),)](
        *common, cos, sin, kv_heads, ENTRIES=MERGED, LOSERS=MERGING, **shape, **lies, **bits, num_warps=2
    )


def reserve_merging(layers: list[LayerSlots], sequences: int, device: torch.device) -> None:
    """Take the scratch of calls with up to so many sequences on layers like these, of any device."""
    merging = next(slots for slots in layers if not slots.sliding)  # all of these are alike but for their entries
    (_, kv_heads, _, size), dtype, segment = merging.ring_k.shape, merging.ring_k.dtype, merging.segment
    exact, coarse = (max(getattr(slots, rank).shape[1] for slots in layers) for rank in ("exact_rank", "coarse_rank"))
    _work(triton.next_power_of_2(sequences), kv_heads, segment, size, exact, coarse, dtype, device)


def _parts(size: int) -> int:
    """Programs that add up the columns of a key."""
    return -(-(size // 2) // PAIRS)


@cache
def _work(
    rows: int, kv_heads: int, segment: int, size: int, exact: int, coarse: int, dtype: torch.dtype, device
) -> Work:
    """Scratch for calls of up to so many sequences on layers with so many entries; a power of two, as it is kept."""
    parts = _parts(size)
    cells, pivots = (rows, kv_heads, segment), (rows, kv_heads, 2 * segment)
    operand = torch.float32 if dtype == torch.float32 else torch.float16  # of unit vectors: finer than bf16
    shapes = Work(
        score=(cells, torch.float32),
        dot=((rows, kv_heads, parts, segment), torch.float32),
        norm=((rows, kv_heads, parts, segment), torch.float32),
        rank=(cells, torch.int64),
        mass=(cells, torch.float32),
        taker=(cells, torch.float32),
        unit=((*cells, 2, half_width(size)), operand),
        nearest=(cells, torch.int64),
        first=(pivots, torch.int32),
        lowest=(cells, torch.int64),
        bound=((rows, kv_heads), torch.int64),
        pivot=(pivots, torch.int64),
        fresh=(pivots, torch.int32),
        place=(cells, torch.int32),
        counts=((rows, kv_heads, 2, 2 * segment), torch.int32),
        under=(pivots, torch.int32),
        plan=((rows, kv_heads, 8), torch.int32),
        listed=((rows, coarse), torch.int32),
        picked_exact=((rows, exact), torch.int32),
        picked_coarse=((rows, coarse), torch.int32),
        losing=((rows, kv_heads, 2, segment), torch.int32),
    )
    return Work(*(buffer(name, *shape, device) for name, shape in zip(Work._fields, shapes, strict=True)))
