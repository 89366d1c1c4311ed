"""The gated update: losers into their nearest coarse entries (README.md, 6)."""

import triton
import triton.language as tl

from .duels import UNBOUND
from .launch import ROW_ARGUMENTS
from .tiles import (
    angles,
    at,
    decode,
    due_tile,
    far_limit,
    halves,
    key_position,
    mates,
    outgoing,
    pairs_of,
    rank_position,
    rank_score,
    store_encoded,
    turn,
)


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def group(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    gate, kv_heads, WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Weigh the losers of a head by the gate, and sort those that it lets in by entry.

    Work.nearest becomes entry * C + cell of each, Work.mass the weights, Work.taker the masses of their entries, and
    Work.first where the losers of each entry begin, for as many entries as there are; then how many losers there are.
    """
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    slot, gone, index, head = due_tile(rows, kv_heads, WINDOW, SEGMENT, ROWS)
    if gone == 0:
        return
    base = (index * kv_heads + head) * SEGMENT
    c = tl.arange(0, SEGMENT)
    found = tl.load(work.nearest + base + c)
    loses = (found > 0) & (tl.load(work.rank + base + c) > 0)
    entry = rank_position(found)
    masses = at(slots.coarse_mass, slot, stride) + tl.load(slots.coarse_start + head)
    mass = tl.load(masses + entry, mask=loses, other=1.0)
    weight = gate + 3 * head
    opening = tl.load(weight) + tl.load(weight + 1) * rank_score(found) + tl.load(weight + 2) * tl.log(mass)
    opening = tl.sigmoid(opening)
    share = tl.load(work.mass + base + c) * opening
    enters = loses & (opening >= 0.01) & (share > 0)
    ordered = tl.sort(tl.where(enters, entry.to(tl.int64) * SEGMENT + c, UNBOUND))
    entering = tl.sum(enters.to(tl.int32))
    first = work.first + (index * kv_heads + head) * (2 * SEGMENT)
    tl.debug_barrier()  # all lanes have read what is written now
    tl.store(work.mass + base + c, share)
    tl.store(work.taker + base + c, mass)
    tl.store(work.nearest + base + c, ordered)
    tl.store(first + tl.arange(0, 2 * SEGMENT), tl.zeros([2 * SEGMENT], tl.int32) + entering)
    tl.debug_barrier()
    before = tl.load(work.nearest + base + c - 1, mask=c > 0, other=-1)
    begins = (c < entering) & ((c == 0) | (ordered // SEGMENT != before // SEGMENT))
    tl.store(first + tl.cumsum(begins.to(tl.int32)) - 1, c, mask=begins)


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def update(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    cos, sin, kv_heads, ENTRIES: tl.constexpr, LOSERS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    TRAINED: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
):  # fmt: skip
    """Move the keys or the values of a tile of coarse entries towards those of their losers (README.md, eq. 10).

    The losers of a tile of entries lie side by side. Those of each entry are summed up by a product with the weights,
    [ENTRIES, LOSERS] at a time.
    """
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    TILES: tl.constexpr = (SEGMENT + ENTRIES - 1) // ENTRIES
    slot, gone, index, tile = due_tile(rows, kv_heads * (2 * TILES), WINDOW, SEGMENT, ROWS)
    if gone == 0:
        return
    head = tile // (2 * TILES)
    base = (index * kv_heads + head) * SEGMENT
    firsts = work.first + 2 * base
    number = tile // 2 % TILES * ENTRIES
    begin = tl.load(firsts + number)
    end = tl.load(firsts + tl.minimum(number + ENTRIES, 2 * SEGMENT - 1))
    if begin == end:
        return
    e = number + tl.arange(0, ENTRIES)
    first = tl.load(firsts + tl.minimum(e, 2 * SEGMENT - 1))
    last = tl.load(firsts + tl.minimum(e + 1, 2 * SEGMENT - 1))
    takes = first < last
    leading = tl.load(work.nearest + base + first, mask=takes, other=0)
    coarse_first = tl.load(slots.coarse_start + head)
    row = coarse_first + (leading // SEGMENT).to(tl.int32)
    mass = tl.load(work.taker + base + leading % SEGMENT, mask=takes, other=1.0)
    ring_k = at(slots.ring_k, slot, stride)
    ring_v = at(slots.ring_v, slot, stride)
    affine_k = at(slots.coarse_k_affine, slot, stride)
    affine_v = at(slots.coarse_v_affine, slot, stride)
    ranks = at(slots.coarse_rank, slot, stride) + coarse_first
    limit = far_limit(gone + WINDOW + 1, SEGMENT, TRAINED)
    pairs = pairs_of(slots, head, D)
    DTYPE: tl.constexpr = slots.ring_k.dtype.element_ty
    sum_low = tl.zeros([ENTRIES, HALF], tl.float32)
    sum_high = tl.zeros([ENTRIES, HALF], tl.float32)
    added = tl.zeros([ENTRIES], tl.float32)
    for start in range(begin, end, LOSERS):
        j = start + tl.arange(0, LOSERS)
        inside = j < end
        loser = tl.load(work.nearest + base + j, mask=inside, other=0)
        c = (loser % SEGMENT).to(tl.int32)
        mine = (j[None, :] >= first[:, None]) & (j[None, :] < last[:, None])
        weight = tl.where(mine, tl.load(work.mass + base + c, mask=inside, other=0.0)[None, :], 0.0)
        added += tl.sum(weight, 1)
        _, _, cell = outgoing(head, gone, c, WINDOW, SEGMENT)
        if tile % 2 == 0:
            low, high = halves(ring_k, cell, inside, D, HALF)
            if ROTARY > 0:
                mate_low, mate_high = mates(
                    ring_k, affine_k, cell, inside, low, high, pairs, D, HALF, 16, DTYPE, ROTARY, INTERLEAVED
                )
                lies = key_position(tl.load(work.rank + base + c, mask=inside, other=0), limit)
                here = angles(cos, sin, lies, inside, D, HALF, ROTARY, INTERLEAVED)
                lies = key_position(tl.load(ranks + (loser // SEGMENT).to(tl.int32), mask=inside, other=0), limit)
                there = angles(cos, sin, lies, inside, D, HALF, ROTARY, INTERLEAVED)
                low, high = turn(low, high, mate_low, mate_high, here, there)
            low = low.to(tl.float32)
            high = high.to(tl.float32)
        else:
            low, high = halves(ring_v, cell, inside, D, HALF)
            low = low.to(tl.float32)
            high = high.to(tl.float32)
        sum_low = tl.dot(weight, low, sum_low, input_precision="ieee")
        sum_high = tl.dot(weight, high, sum_high, input_precision="ieee")
    if tile % 2 == 0:
        codes = at(slots.coarse_k, slot, stride)
        _move(codes, affine_k, row, takes, sum_low, sum_high, added, mass, pairs, D, HALF, KEY_BITS, DTYPE)
        tl.store(at(slots.coarse_mass, slot, stride) + row, mass + added, mask=takes)
    else:
        codes = at(slots.coarse_v, slot, stride)
        _move(codes, affine_v, row, takes, sum_low, sum_high, added, mass, pairs, D, HALF, VALUE_BITS, DTYPE)


@triton.jit
def _move(
    codes, affine, row, takes, sum_low, sum_high, added, mass, pairs,
    D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows [B] of that mass become x + (sum - added * x) / (mass + added); the weights in sum [B, HALF] make added."""
    low, high = decode(codes, affine, row, takes, pairs, D, HALF, BITS, DTYPE)
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    mass = (mass + added)[:, None]
    low += (sum_low - added[:, None] * low) / mass
    high += (sum_high - added[:, None] * high) / mass
    tl.debug_barrier()  # all lanes have read the rows
    store_encoded(codes, affine, row, takes, low, high, pairs, D, HALF, BITS)
