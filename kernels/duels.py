"""Which entries give way to which newcomers, as reference._duels pairs them, without sorting the entries.

Newcomers and some entries are pivots (scores.rank). Counting the entries between pivots tells how many duels are won
in either tier and below which pivot the losers lie; only what lies there is ordered. README.md, 5, has the derivation.
"""

import triton
import triton.language as tl

from .launch import ROW_ARGUMENTS
from .tiles import at, due_tile, rank_position, sizes

NOWHERE = tl.constexpr(1 << 30)  # an entry that no head has
UNBOUND = tl.constexpr((1 << 63) - 1)  # no rank is higher
_SKEW = tl.constexpr(37)  # odd, and far from a divisor of any segment

# Work.plan of a head: duels won against exact entries (empty ones included) and exact entries that lose, the same
# for coarse ones, how many entries of either tier were picked, and how many coarse ones were listed.
EXACT, COARSE, _PICKED, _LISTED = tl.constexpr(0), tl.constexpr(2), tl.constexpr(4), tl.constexpr(6)


@triton.jit
def held_ranks(slots, stride, slot, head, left, entry):
    """Ranks of entries [B] of a head, numbered exact first; EMPTY where nothing is held."""
    exact_first, coarse_first, exact, coarse, held_exact, held_coarse = sizes(slots, head, left)
    rank = tl.load(at(slots.exact_rank, slot, stride) + exact_first + entry, mask=entry < held_exact, other=0)
    in_coarse = (entry >= exact) & (entry - exact < held_coarse)
    coarse_rank = at(slots.coarse_rank, slot, stride) + coarse_first + entry - exact
    return tl.where(in_coarse, tl.load(coarse_rank, mask=in_coarse, other=0), rank)


@triton.jit
def _exact_count(slots, head):
    return tl.load(slots.exact_start + head + 1) - tl.load(slots.exact_start + head)


@triton.jit
def lowest(slots, stride, slot, head, left, group, SEGMENT: tl.constexpr, GROUPED: tl.constexpr):
    """Lowest rank in groups [B] of the SEGMENT that a head's coarse entries make up; UNBOUND if one is empty.

    A group has one entry of every SEGMENT, not always the same one: a merge fills empty entries best first.
    GROUPED: entries of a group that are read at a time.
    """
    _, coarse_first, _, _, _, held = sizes(slots, head, left)
    ranks = at(slots.coarse_rank, slot, stride) + coarse_first
    low = tl.full(group.shape, UNBOUND, tl.int64)
    for start in range(0, held, GROUPED * SEGMENT):
        j = start // SEGMENT + tl.arange(0, GROUPED)[:, None]
        entry = j * SEGMENT + (group[None, :] + _SKEW * j) % SEGMENT
        low = tl.minimum(low, tl.min(tl.load(ranks + entry, mask=entry < held, other=UNBOUND), 0))
    return low


@triton.jit
def above(pivot, rank, mask, PIVOTS: tl.constexpr):
    """How many of the pivots (a power of two, highest first) rank above each rank [B] under the mask."""
    low = tl.zeros_like(rank).to(tl.int32)
    for step in tl.static_range(16):
        if PIVOTS >> (step + 1) > 0:
            probe = low + (PIVOTS >> (step + 1)) - 1
            low = tl.where(tl.load(pivot + probe, mask=mask, other=0) > rank, probe + 1, low)
    return low + (tl.load(pivot + low, mask=mask, other=0) > rank).to(tl.int32)


@triton.jit
def _append(counter, entries, entry, mask):
    """Add the entries [B] under the mask to a list of so many, in no order."""
    found = tl.sum(mask.to(tl.int32))
    if found > 0:
        start = tl.atomic_add(counter, found, sem="relaxed")
        tl.store(entries + start + tl.cumsum(mask.to(tl.int32)) - 1, entry, mask=mask)


@triton.jit(do_not_specialize=ROW_ARGUMENTS + ["tiles"])
def count(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    kv_heads, table, tiles, ENTRIES: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Count the entries of either tier between one pivot and the next lower, and list the coarse ones.

    Of coarse entries only those up to a bound that at least SEGMENT of them do not exceed: no more can lose.
    """
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    slot, gone, index, tile = due_tile(rows, tiles, WINDOW, SEGMENT, ROWS)
    if gone == 0:
        return
    head = tl.load(table + 4 * tile)
    entry = tl.load(table + 4 * tile + 1) + tl.arange(0, ENTRIES)
    base = index * kv_heads + head
    rank = held_ranks(slots, stride, slot, head, tl.maximum(gone - SEGMENT, 0), entry)
    in_coarse = entry >= _exact_count(slots, head)
    counted = (rank > 0) & ((in_coarse == 0) | (rank <= tl.load(work.bound + base)))
    if tl.max(counted.to(tl.int32)) > 0:
        higher = above(work.pivot + base * (2 * SEGMENT), rank, counted, 2 * SEGMENT)
        cell = base * (4 * SEGMENT) + tl.where(in_coarse, 2 * SEGMENT, 0) + higher - 1
        tl.atomic_add(work.counts + cell, 1, mask=counted & (higher > 0), sem="relaxed")
        listed = work.listed + _list_start(slots.coarse_start, index, head, kv_heads)
        _append(work.plan + base * 8 + _LISTED, listed, entry, counted & in_coarse)


@triton.jit
def _list_start(start, index, head, kv_heads):
    """Where a head's list begins, of as many entries as it has in the tier with those starts (int64)."""
    return index * tl.load(start + kv_heads) + tl.load(start + head)


@triton.jit
def _plan(slots, work, base, head, gone, SEGMENT: tl.constexpr):
    """Duels won and entries lost in either tier, the ranks below which the losers lie, and Work.under [2C]."""
    k = tl.arange(0, 2 * SEGMENT)
    pivot = tl.load(work.pivot + base * (2 * SEGMENT) + k)
    fresh = tl.load(work.fresh + base * (2 * SEGMENT) + k)
    new = (pivot > 0) & (rank_position(pivot) >= gone - SEGMENT)
    counts = work.counts + base * (4 * SEGMENT) + k
    under_exact = tl.cumsum(tl.load(counts), reverse=True)
    under_coarse = tl.cumsum(tl.load(counts + 2 * SEGMENT), reverse=True)
    _, _, exact, coarse, held_exact, held_coarse = sizes(slots, head, tl.maximum(gone - SEGMENT, 0))

    wins = new & (exact - held_exact + under_exact > fresh)  # README.md, eq. 8
    won_exact = tl.sum(wins.to(tl.int32))
    lost_exact = tl.maximum(won_exact - (exact - held_exact), 0)
    # what did not win meets the coarse entries together with what lost, all of which ranks above them
    place = fresh - won_exact + lost_exact - under_exact
    wins = new & (wins == 0) & (coarse - held_coarse + under_coarse > place)
    won_coarse = tl.minimum(coarse, lost_exact + tl.sum(wins.to(tl.int32)))
    lost_coarse = tl.maximum(won_coarse - (coarse - held_coarse), 0)

    cut = tl.sum((under_exact >= lost_exact).to(tl.int32)) - 1
    exact_limit = tl.where(lost_exact > 0, tl.load(work.pivot + base * (2 * SEGMENT) + tl.maximum(cut, 0)), 0)
    cut = tl.sum((under_coarse >= lost_coarse).to(tl.int32)) - 1
    coarse_limit = tl.where(lost_coarse > 0, tl.load(work.pivot + base * (2 * SEGMENT) + tl.maximum(cut, 0)), 0)
    return won_exact, lost_exact, won_coarse, lost_coarse, exact_limit, coarse_limit, under_exact


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def pick(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    kv_heads, PARTS: tl.constexpr, ENTRIES: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write down the plan of a head, and gather the entries that rank low enough to be among its losers."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    slot, gone, index, tile = due_tile(rows, kv_heads * PARTS, WINDOW, SEGMENT, ROWS)
    if gone == 0:
        return
    head = tile // PARTS
    part = tile % PARTS
    base = index * kv_heads + head
    won_exact, lost_exact, won_coarse, lost_coarse, exact_limit, coarse_limit, under = _plan(
        slots, work, base, head, gone, SEGMENT
    )
    if part == 0:
        tl.store(work.plan + base * 8 + EXACT, won_exact)
        tl.store(work.plan + base * 8 + EXACT + 1, lost_exact)
        tl.store(work.plan + base * 8 + COARSE, won_coarse)
        tl.store(work.plan + base * 8 + COARSE + 1, lost_coarse)
        tl.store(work.under + base * (2 * SEGMENT) + tl.arange(0, 2 * SEGMENT), under)
    left = tl.maximum(gone - SEGMENT, 0)
    if lost_exact > 0:
        _, _, _, _, held_exact, _ = sizes(slots, head, left)
        picked = work.picked_exact + _list_start(slots.exact_start, index, head, kv_heads)
        for start in range(part * ENTRIES, held_exact, PARTS * ENTRIES):
            entry = start + tl.arange(0, ENTRIES)
            entry = tl.where(entry < held_exact, entry, NOWHERE)
            rank = held_ranks(slots, stride, slot, head, left, entry)
            _append(work.plan + base * 8 + _PICKED, picked, entry, (rank > 0) & (rank < exact_limit))
    if lost_coarse > 0:
        first = _list_start(slots.coarse_start, index, head, kv_heads)
        listed = tl.load(work.plan + base * 8 + _LISTED)
        for start in range(part * ENTRIES, listed, PARTS * ENTRIES):
            k = start + tl.arange(0, ENTRIES)
            entry = tl.load(work.listed + first + k, mask=k < listed, other=NOWHERE)
            rank = held_ranks(slots, stride, slot, head, left, entry)
            low = (rank > 0) & (rank < coarse_limit)
            _append(work.plan + base * 8 + _PICKED + 1, work.picked_coarse + first, entry, low)


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def order(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    kv_heads, PARTS: tl.constexpr, ORDERED: tl.constexpr, COMPARED: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Put the losing entries of either tier in order, worst first, by counting how many of the picked rank lower."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    slot, gone, index, tile = due_tile(rows, kv_heads * 2 * PARTS, WINDOW, SEGMENT, ROWS)
    if gone == 0:
        return
    head = tile // (2 * PARTS)
    tier = tile // PARTS % 2
    part = tile % PARTS
    base = index * kv_heads + head
    left = tl.maximum(gone - SEGMENT, 0)
    lost = tl.load(work.plan + base * 8 + 2 * tier + 1)
    picked = tl.load(work.plan + base * 8 + _PICKED + tier)
    if tier == 0:
        entries = work.picked_exact + _list_start(slots.exact_start, index, head, kv_heads)
        before = 0
    else:
        entries = work.picked_coarse + _list_start(slots.coarse_start, index, head, kv_heads)
        before = _exact_count(slots, head)
    for start in range(part * ORDERED, picked, PARTS * ORDERED):
        k = start + tl.arange(0, ORDERED)
        entry = tl.load(entries + k, mask=k < picked, other=NOWHERE)
        rank = held_ranks(slots, stride, slot, head, left, entry)
        lower = tl.zeros([ORDERED], tl.int32)
        for other_start in range(0, picked, COMPARED):
            k_other = other_start + tl.arange(0, COMPARED)
            other = tl.load(entries + k_other, mask=k_other < picked, other=NOWHERE)
            other_rank = held_ranks(slots, stride, slot, head, left, other)
            lower += tl.sum(((other_rank[None, :] < rank[:, None]) & (other_rank > 0)[None, :]).to(tl.int32), 1)
        losing = work.losing + (base * 2 + tier) * SEGMENT
        tl.store(losing + lower, entry - before, mask=(rank > 0) & (lower < lost))
