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

    Work.nearest becomes entry * C + cell of each, Work.mass the weights, Work.first where the losers of each entry
    begin, for as many entries as there are, and how many losers there are after those.
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
    """Move a tile of coarse entries towards their losers (README.md, eq. 10).

    The losers of a tile of entries lie side by side. Those of each entry are summed up by a product with the weights,
    [ENTRIES, LOSERS] at a time.
    """
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    TILES: tl.constexpr = (SEGMENT + ENTRIES - 1) // ENTRIES
    slot, gone, index, tile = due_tile(rows, kv_heads * TILES, WINDOW, SEGMENT, ROWS)
    if gone == 0:
        return
    head = tile // TILES
    base = (index * kv_heads + head) * SEGMENT
    firsts = work.first + 2 * base
    number = tile % TILES * ENTRIES
    begin = tl.load(firsts + number)
    end = tl.load(firsts + tl.minimum(number + ENTRIES, 2 * SEGMENT - 1))
    if begin == end:
        return
    DTYPE: tl.constexpr = slots.ring_k.dtype.element_ty
    e = number + tl.arange(0, ENTRIES)
    first = tl.load(firsts + tl.minimum(e, 2 * SEGMENT - 1))
    last = tl.load(firsts + tl.minimum(e + 1, 2 * SEGMENT - 1))
    takes = first < last
    coarse_first = tl.load(slots.coarse_start + head)
    row = coarse_first + (tl.load(work.nearest + base + first, mask=takes, other=0) // SEGMENT).to(tl.int32)
    codes_k = at(slots.coarse_k, slot, stride)
    codes_v = at(slots.coarse_v, slot, stride)
    affine_k = at(slots.coarse_k_affine, slot, stride)
    affine_v = at(slots.coarse_v_affine, slot, stride)
    ring_k = at(slots.ring_k, slot, stride)
    ring_v = at(slots.ring_v, slot, stride)
    ranks = at(slots.coarse_rank, slot, stride)
    masses = at(slots.coarse_mass, slot, stride)
    limit = far_limit(gone + WINDOW + 1, SEGMENT, TRAINED)
    sum_k_low = tl.zeros([ENTRIES, HALF], tl.float32)
    sum_k_high = tl.zeros([ENTRIES, HALF], tl.float32)
    sum_v_low = tl.zeros([ENTRIES, HALF], tl.float32)
    sum_v_high = tl.zeros([ENTRIES, HALF], tl.float32)
    added = tl.zeros([ENTRIES], tl.float32)
    for start in range(begin, end, LOSERS):
        j = start + tl.arange(0, LOSERS)
        inside = j < end
        loser = tl.load(work.nearest + base + j, mask=inside, other=0)
        c = (loser % SEGMENT).to(tl.int32)
        share = tl.load(work.mass + base + c, mask=inside, other=0.0)
        mine = (j[None, :] >= first[:, None]) & (j[None, :] < last[:, None])
        weight = tl.where(mine, share[None, :], 0.0)
        added += tl.sum(weight, 1)
        _, _, cell = outgoing(head, gone, c, WINDOW, SEGMENT)
        low, high = halves(ring_k, cell, inside, D, HALF)
        if ROTARY > 0:
            mate_low, mate_high = mates(
                ring_k, affine_k, cell, inside, low, high, D, HALF, 16, DTYPE, ROTARY, INTERLEAVED
            )
            lies = key_position(tl.load(work.rank + base + c, mask=inside, other=0), limit)
            here = angles(cos, sin, lies, inside, D, HALF, ROTARY, INTERLEAVED)
            entry_rank = tl.load(ranks + coarse_first + (loser // SEGMENT).to(tl.int32), mask=inside, other=0)
            there = angles(cos, sin, key_position(entry_rank, limit), inside, D, HALF, ROTARY, INTERLEAVED)
            low, high = turn(low, high, mate_low, mate_high, here, there)
        sum_k_low = tl.dot(weight, low.to(tl.float32), sum_k_low, input_precision="ieee")
        sum_k_high = tl.dot(weight, high.to(tl.float32), sum_k_high, input_precision="ieee")
        low, high = halves(ring_v, cell, inside, D, HALF)
        sum_v_low = tl.dot(weight, low.to(tl.float32), sum_v_low, input_precision="ieee")
        sum_v_high = tl.dot(weight, high.to(tl.float32), sum_v_high, input_precision="ieee")
    mass = tl.load(masses + row, mask=takes, other=1.0) + added
    k_low, k_high = decode(codes_k, affine_k, row, takes, D, HALF, KEY_BITS, DTYPE)
    v_low, v_high = decode(codes_v, affine_v, row, takes, D, HALF, VALUE_BITS, DTYPE)
    k_low = _moved(k_low, sum_k_low, added, mass)
    k_high = _moved(k_high, sum_k_high, added, mass)
    v_low = _moved(v_low, sum_v_low, added, mass)
    v_high = _moved(v_high, sum_v_high, added, mass)
    tl.debug_barrier()  # all lanes have read the entries
    store_encoded(codes_k, affine_k, row, takes, k_low, k_high, D, HALF, KEY_BITS)
    store_encoded(codes_v, affine_v, row, takes, v_low, v_high, D, HALF, VALUE_BITS)
    tl.store(masses + row, mass, mask=takes)


@triton.jit
def _moved(old, sum, added, mass):
    """old + (sum - added * old) / mass: rows [B, HALF], of which `sum` is weighted by what `added` [B] sums up."""
    old = old.to(tl.float32)
    return old + (sum - added[:, None] * old) / mass[:, None]
