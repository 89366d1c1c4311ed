"""Turning the keys of entries that become far to position 0, before a merge (README.md, 7)."""

import triton
import triton.language as tl

from .duels import held_ranks
from .launch import ROW_ARGUMENTS
from .tiles import (
    angles,
    at,
    decode,
    due_tile,
    far_limit,
    halves,
    pairs_of,
    rank_position,
    sizes,
    store_encoded,
    store_halves,
    turn_back,
)


@triton.jit(do_not_specialize=ROW_ARGUMENTS + ["tiles"])
def demote(
    slots, stride,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    cos, sin, table, tiles, ENTRIES: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    TRAINED: tl.constexpr, KEY_BITS: tl.constexpr,
):  # fmt: skip
    """See reference._turn_far: a tile of a head's entries, of which few or none are due."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    DTYPE: tl.constexpr = slots.ring_k.dtype.element_ty
    slot, gone, _, tile = due_tile(rows, tiles, WINDOW, SEGMENT, ROWS)
    limit = far_limit(gone + WINDOW + 1, SEGMENT, TRAINED)
    if (gone == 0) | (limit == 0):
        return
    head = tl.load(table + 4 * tile)
    entry = tl.load(table + 4 * tile + 1) + tl.arange(0, ENTRIES)
    left = tl.maximum(gone - SEGMENT, 0)
    exact_first, coarse_first, exact, _, _, _ = sizes(slots, head, left)
    rank = held_ranks(slots, stride, slot, head, left, entry)
    position = rank_position(rank)
    turns = (rank > 0) & (position < limit) & (position >= limit - SEGMENT)
    if tl.max(turns.to(tl.int32)) > 0:
        here = angles(cos, sin, position, turns, D, HALF, ROTARY, INTERLEAVED)
        pairs = pairs_of(slots, head, D)
        codes = at(slots.exact_k, slot, stride)
        affine = at(slots.coarse_k_affine, slot, stride)
        row = exact_first + entry
        mine = turns & (entry < exact)
        low, high = halves(codes, row, mine, D, HALF)
        low, high = turn_back(codes, affine, row, mine, low, high, pairs, here, D, HALF, 16, DTYPE, ROTARY, INTERLEAVED)
        tl.debug_barrier()  # all lanes have read their mates
        store_halves(codes, row, mine, low, high, D, HALF)
        codes = at(slots.coarse_k, slot, stride)
        row = coarse_first + entry - exact
        mine = turns & (entry >= exact)
        low, high = decode(codes, affine, row, mine, pairs, D, HALF, KEY_BITS, DTYPE)
        low, high = turn_back(
            codes, affine, row, mine, low, high, pairs, here, D, HALF, KEY_BITS, DTYPE, ROTARY, INTERLEAVED
        )
        tl.debug_barrier()
        store_encoded(codes, affine, row, mine, low, high, pairs, D, HALF, KEY_BITS)
