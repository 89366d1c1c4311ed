"""Which entries give way to which newcomers, as reference._duels pairs them, without sorting the entries.

Newcomers and an even sample of the entries are pivots (merge._rank). Counting the entries between pivots tells
how many duels are won in either tier and below which pivot the losers lie; only what lies there is ordered.
README.md, 5, has the derivation.
"""

import triton
import triton.language as tl

from .launch import ROW_ARGUMENTS
from .tiles import at, due_row, due_rows, rank_position

_NOWHERE = tl.constexpr(1 << 30)  # an entry that no head has

# Work.plan of a head: duels won against exact entries (empty ones included) and exact entries that lose, the same
# for coarse ones, and how many entries of either tier were picked.
_EXACT, _COARSE, _PICKED = tl.constexpr(0), tl.constexpr(2), tl.constexpr(4)


@triton.jit
def sizes(slots, head, left):
    """Of one head: first exact and coarse entry, numbers of both, and how many hold something after `left` tokens."""
    exact_first = tl.load(slots.exact_start + head)
    coarse_first = tl.load(slots.coarse_start + head)
    exact = tl.load(slots.exact_start + head + 1) - exact_first
    coarse = tl.load(slots.coarse_start + head + 1) - coarse_first
    held_exact = tl.minimum(left, exact)
    held_coarse = tl.minimum(left - held_exact, coarse)
    return exact_first, coarse_first, exact, coarse, held_exact, held_coarse


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
def above(pivot, rank, PIVOTS: tl.constexpr):
    """How many of the pivots (a power of two, highest first) rank above each rank [B]."""
    low = tl.zeros_like(rank).to(tl.int32)
    for step in tl.static_range(16):
        if PIVOTS >> (step + 1) > 0:
            probe = low + (PIVOTS >> (step + 1)) - 1
            low = tl.where(tl.load(pivot + probe) > rank, probe + 1, low)
    return low + (tl.load(pivot + low) > rank).to(tl.int32)


@triton.jit(do_not_specialize=ROW_ARGUMENTS + ["tiles"])
def count(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    kv_heads, table, tiles, ENTRIES: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Count the entries of either tier between one pivot and the next lower."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    row_order, due = due_rows(rows, WINDOW, SEGMENT, ROWS)
    for item in range(tl.program_id(0), due * tiles, tl.num_programs(0)):
        slot, gone = due_row(rows, row_order, item // tiles, WINDOW, ROWS)
        head = tl.load(table + 4 * (item % tiles))
        entry = tl.load(table + 4 * (item % tiles) + 1) + tl.arange(0, ENTRIES)
        base = slot * kv_heads + head
        rank = held_ranks(slots, stride, slot, head, tl.maximum(gone - SEGMENT, 0), entry)
        in_coarse = entry >= _exact_count(slots, head)
        if tl.max(rank) > 0:
            higher = above(work.pivot + base * (2 * SEGMENT), rank, 2 * SEGMENT)
            cell = base * (4 * SEGMENT) + tl.where(in_coarse, 2 * SEGMENT, 0) + higher - 1
            tl.atomic_add(work.counts + cell, 1, mask=(rank > 0) & (higher > 0), sem="relaxed")


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


@triton.jit
def _append(work, base, tier: tl.constexpr, first, entry, mask):
    """Add the entries [B] under the mask to those picked in a tier, whose list starts at `first`."""
    picked = tl.sum(mask.to(tl.int32))
    if picked > 0:
        start = tl.atomic_add(work.plan + base * 8 + _PICKED + tier, picked, sem="relaxed")
        tl.store(work.picked + first + start + tl.cumsum(mask.to(tl.int32)) - 1, entry, mask=mask)


@triton.jit
def _picked_lists(slots, slot, head, kv_heads):
    """Where the lists of picked exact and coarse entries of a head start in Work.picked (int64)."""
    every = tl.load(slots.exact_start + kv_heads)
    start = slot * (every + tl.load(slots.coarse_start + kv_heads))
    return start + tl.load(slots.exact_start + head), start + every + tl.load(slots.coarse_start + head)


@triton.jit(do_not_specialize=ROW_ARGUMENTS + ["tiles"])
def pick(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    kv_heads, table, tiles, ENTRIES: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write down the plan of a head, and gather the entries that rank low enough to be among its losers."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    row_order, due = due_rows(rows, WINDOW, SEGMENT, ROWS)
    for item in range(tl.program_id(0), due * tiles, tl.num_programs(0)):
        slot, gone = due_row(rows, row_order, item // tiles, WINDOW, ROWS)
        head = tl.load(table + 4 * (item % tiles))
        first = tl.load(table + 4 * (item % tiles) + 1)
        base = slot * kv_heads + head
        plan = _plan(slots, work, base, head, gone, SEGMENT)
        if first == 0:
            tl.store(work.plan + base * 8 + _EXACT, plan[0])
            tl.store(work.plan + base * 8 + _EXACT + 1, plan[1])
            tl.store(work.plan + base * 8 + _COARSE, plan[2])
            tl.store(work.plan + base * 8 + _COARSE + 1, plan[3])
            tl.store(work.under + base * (2 * SEGMENT) + tl.arange(0, 2 * SEGMENT), plan[6])
        if plan[1] + plan[3] > 0:
            entry = first + tl.arange(0, ENTRIES)
            rank = held_ranks(slots, stride, slot, head, tl.maximum(gone - SEGMENT, 0), entry)
            in_coarse = entry >= _exact_count(slots, head)
            exact_list, coarse_list = _picked_lists(slots, slot, head, kv_heads)
            low = (rank > 0) & (rank < tl.where(in_coarse, plan[5], plan[4]))
            _append(work, base, 0, exact_list, entry, low & (in_coarse == 0))
            _append(work, base, 1, coarse_list, entry, low & in_coarse)


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def order(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    kv_heads, PARTS: tl.constexpr, ORDERED: tl.constexpr, COMPARED: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Put the losing entries of either tier in order, worst first, by counting how many of the picked rank lower."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    row_order, due = due_rows(rows, WINDOW, SEGMENT, ROWS)
    for item in range(tl.program_id(0), due * kv_heads * (2 * PARTS), tl.num_programs(0)):
        slot, gone = due_row(rows, row_order, item // (kv_heads * (2 * PARTS)), WINDOW, ROWS)
        head = item // (2 * PARTS) % kv_heads
        tier = item // PARTS % 2
        base = slot * kv_heads + head
        left = tl.maximum(gone - SEGMENT, 0)
        lost = tl.load(work.plan + base * 8 + 2 * tier + 1)
        picked = tl.load(work.plan + base * 8 + _PICKED + tier)
        exact_list, coarse_list = _picked_lists(slots, slot, head, kv_heads)
        entries = work.picked + tl.where(tier == 0, exact_list, coarse_list)
        for start in range(item % PARTS * ORDERED, picked, PARTS * ORDERED):
            k = start + tl.arange(0, ORDERED)
            entry = tl.load(entries + k, mask=k < picked, other=_NOWHERE)
            rank = held_ranks(slots, stride, slot, head, left, entry)
            lower = tl.zeros([ORDERED], tl.int32)
            for other_start in range(0, picked, COMPARED):
                k_other = other_start + tl.arange(0, COMPARED)
                other = tl.load(entries + k_other, mask=k_other < picked, other=_NOWHERE)
                other_rank = held_ranks(slots, stride, slot, head, left, other)
                lower += tl.sum(((other_rank[None, :] < rank[:, None]) & (other_rank > 0)[None, :]).to(tl.int32), 1)
            entry -= tl.where(tier == 0, 0, _exact_count(slots, head))
            losing = work.losing + (base * 2 + tier) * SEGMENT
            tl.store(losing + lower, entry, mask=(rank > 0) & (lower < lost))
