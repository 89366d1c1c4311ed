"""The exchange of a merge: every outgoing token to its place, and what it drives out into its ring cell."""

import triton
import triton.language as tl

from .duels import COARSE, EXACT, above
from .launch import ROW_ARGUMENTS
from .tiles import (
    angles,
    at,
    centred_unit,
    decode,
    due_tile,
    far_limit,
    halves,
    key_position,
    outgoing,
    pairs_of,
    sizes,
    store_encoded,
    store_halves,
    turn_back,
)


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def exchange(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    cos, sin, kv_heads, CELLS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    TRAINED: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
):  # fmt: skip
    """The duels of a tile of outgoing tokens, against exact and then coarse entries. No two tokens share an entry.

    Afterwards a cell holds what had to leave, with its rank and mass in the scratch: the losers, to be merged.
    """
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    DTYPE: tl.constexpr = slots.ring_k.dtype.element_ty
    TILES: tl.constexpr = SEGMENT // CELLS
    slot, gone, index, tile = due_tile(rows, kv_heads * TILES, WINDOW, SEGMENT, ROWS)
    if gone == 0:
        return
    head = tile // TILES
    base = index * kv_heads + head
    c = tile % TILES * CELLS + tl.arange(0, CELLS)
    exact_first, coarse_first, exact, coarse, held_exact, held_coarse = sizes(
        slots, head, tl.maximum(gone - SEGMENT, 0)
    )
    _, live, cell = outgoing(head, gone, c, WINDOW, SEGMENT)
    rank = tl.load(work.rank + base * SEGMENT + c)
    won_exact = tl.load(work.plan + base * 8 + EXACT)
    lost_exact = tl.load(work.plan + base * 8 + EXACT + 1)
    won_coarse = tl.load(work.plan + base * 8 + COARSE)
    pivot = work.pivot + base * (2 * SEGMENT)
    fresh = work.fresh + base * (2 * SEGMENT)
    losing = work.losing + base * (2 * SEGMENT)

    # against the exact entries: the i-th best newcomer meets the i-th worst entry, empty ones first
    k = tl.load(work.place + base * SEGMENT + c, mask=live, other=0)
    i = tl.load(fresh + k, mask=live, other=0)
    enters = live & (i < won_exact)
    free = exact - held_exact
    ousts = enters & (i >= free)
    old = tl.load(losing + i - free, mask=ousts, other=0)
    entry = exact_first + tl.where(ousts, old, held_exact + i)
    ranks = at(slots.exact_rank, slot, stride)
    new_rank = rank
    rank = tl.where(ousts, tl.load(ranks + entry, mask=ousts, other=0), rank)
    present = live & (ousts | (enters == 0))  # in the list that meets the coarse entries
    better = i * 0  # newcomers that are better than what a token drove out
    if tl.max(ousts.to(tl.int32)) > 0:
        k_ousted = above(pivot, rank, ousts, 2 * SEGMENT)
        better = tl.load(fresh + k_ousted, mask=ousts & (k_ousted < 2 * SEGMENT), other=0)
        better = tl.where(k_ousted < 2 * SEGMENT, better, tl.minimum(gone, SEGMENT))
    under = tl.load(work.under + base * (2 * SEGMENT) + k, mask=live, other=0)
    # place in that list, best first
    place = tl.where(ousts, lost_exact - 1 - (i - free) + better - won_exact, i - won_exact + lost_exact - under)
    gets_in = present & (place < won_coarse)
    free = coarse - held_coarse
    replaces = gets_in & (place >= free)
    old = tl.load(losing + SEGMENT + place - free, mask=replaces, other=0)
    target = coarse_first + tl.where(replaces, old, held_coarse + place)

    # read everything, then write: other lanes hold the rows that this one overwrites
    ring_k = at(slots.ring_k, slot, stride)
    ring_v = at(slots.ring_v, slot, stride)
    exact_k = at(slots.exact_k, slot, stride)
    exact_v = at(slots.exact_v, slot, stride)
    coarse_k = at(slots.coarse_k, slot, stride)
    coarse_v = at(slots.coarse_v, slot, stride)
    k_affine = at(slots.coarse_k_affine, slot, stride)
    v_affine = at(slots.coarse_v_affine, slot, stride)
    masses = at(slots.coarse_mass, slot, stride)
    pairs = pairs_of(slots, head, D)
    coarse_ranks = at(slots.coarse_rank, slot, stride)
    new_k_low, new_k_high = halves(ring_k, cell, live, D, HALF)
    new_v_low, new_v_high = halves(ring_v, cell, live, D, HALF)
    k_low, k_high = halves(exact_k, entry, ousts, D, HALF)
    v_low, v_high = halves(exact_v, entry, ousts, D, HALF)
    old_k_low, old_k_high = decode(coarse_k, k_affine, target, replaces, pairs, D, HALF, KEY_BITS, DTYPE)
    old_v_low, old_v_high = decode(coarse_v, v_affine, target, replaces, pairs, D, HALF, VALUE_BITS, DTYPE)
    old_rank = tl.load(coarse_ranks + target, mask=replaces, other=0)
    old_mass = tl.load(masses + target, mask=replaces, other=1.0)
    tl.debug_barrier()

    store_halves(exact_k, entry, enters, new_k_low, new_k_high, D, HALF)
    store_halves(exact_v, entry, enters, new_v_low, new_v_high, D, HALF)
    tl.store(ranks + entry, new_rank, mask=enters)
    ousted = ousts[:, None]
    k_low = tl.where(ousted, k_low, new_k_low)
    k_high = tl.where(ousted, k_high, new_k_high)
    v_low = tl.where(ousted, v_low, new_v_low)
    v_high = tl.where(ousted, v_high, new_v_high)
    store_encoded(
        coarse_k, k_affine, target, gets_in, k_low.to(tl.float32), k_high.to(tl.float32), pairs, D, HALF, KEY_BITS
    )
    store_encoded(
        coarse_v, v_affine, target, gets_in, v_low.to(tl.float32), v_high.to(tl.float32), pairs, D, HALF, VALUE_BITS
    )
    tl.store(coarse_ranks + target, rank, mask=gets_in)
    tl.store(masses + target, tl.zeros([CELLS], tl.float32) + 1.0, mask=gets_in)
    replaced = replaces[:, None]
    k_low = tl.where(replaced, old_k_low, k_low)
    k_high = tl.where(replaced, old_k_high, k_high)
    v_low = tl.where(replaced, old_v_low, v_low)
    v_high = tl.where(replaced, old_v_high, v_high)
    store_halves(ring_k, cell, ousts | replaces, k_low, k_high, D, HALF)
    store_halves(ring_v, cell, ousts | replaces, v_low, v_high, D, HALF)
    rank = tl.where(gets_in, old_rank, tl.where(present, rank, 0))
    tl.store(work.rank + base * SEGMENT + c, rank)
    tl.store(work.mass + base * SEGMENT + c, old_mass)
    tl.debug_barrier()

    if gone > exact + coarse:  # somebody is left without a place
        loses = rank > 0
        low, high = halves(ring_k, cell, loses, D, HALF)
        if ROTARY > 0:
            lies = key_position(rank, far_limit(gone + WINDOW + 1, SEGMENT, TRAINED))
            here = angles(cos, sin, lies, loses, D, HALF, ROTARY, INTERLEAVED)
            low, high = turn_back(
                ring_k, k_affine, cell, loses, low, high, pairs, here, D, HALF, 16, DTYPE, ROTARY, INTERLEAVED
            )
        low, high = centred_unit(
            low.to(tl.float32), high.to(tl.float32), at(slots.key_sum, slot, stride) + head * D, gone, D, HALF
        )
        d = tl.arange(0, HALF)
        scratch = work.unit + ((base * SEGMENT + c) * (2 * HALF))[:, None] + d[None, :]
        tl.store(scratch, low.to(work.unit.dtype.element_ty))
        tl.store(scratch + HALF, high.to(work.unit.dtype.element_ty))
