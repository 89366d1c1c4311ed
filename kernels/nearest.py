"""Merging losers: the nearest coarse entry of each, and the gated update (README.md, 6)."""

import triton
import triton.language as tl

from .launch import ROW_ARGUMENTS
from .tiles import (
    angles,
    at,
    centred_unit,
    decode,
    due_row,
    due_rows,
    far_limit,
    halves,
    key_position,
    mates,
    outgoing,
    pack_rank,
    rank_position,
    rank_score,
    store_encoded,
    turn,
)


@triton.jit(do_not_specialize=ROW_ARGUMENTS + ["tiles"])
def nearest(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    cos, sin, kv_heads, table, tiles, TARGETS: tl.constexpr, LOSERS: tl.constexpr,
    KEY_BITS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, TRAINED: tl.constexpr,
):  # fmt: skip
    """The nearest coarse entry of every loser by cosine of centred pre-RoPE keys: a tile of entries at a time."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    row_order, due = due_rows(rows, WINDOW, SEGMENT, ROWS)
    DTYPE: tl.constexpr = slots.ring_k.dtype.element_ty
    OPERAND: tl.constexpr = work.unit.dtype.element_ty
    for item in range(tl.program_id(0), due * tiles, tl.num_programs(0)):
        slot, gone = due_row(rows, row_order, item // tiles, WINDOW, ROWS)
        head = tl.load(table + 4 * (item % tiles))
        first = tl.load(table + 4 * (item % tiles) + 1)
        base = slot * kv_heads + head
        exact = tl.load(slots.exact_start + head + 1) - tl.load(slots.exact_start + head)
        coarse_first = tl.load(slots.coarse_start + head)
        coarse = tl.load(slots.coarse_start + head + 1) - coarse_first
        if (gone > exact + coarse) & (first < coarse):
            entry = first + tl.arange(0, TARGETS)
            inside = entry < coarse
            row = coarse_first + entry
            codes = at(slots.coarse_k, slot, stride)
            affine = at(slots.coarse_k_affine, slot, stride)
            low, high = decode(codes, affine, row, inside, D, HALF, KEY_BITS, DTYPE)
            if ROTARY > 0:
                rank = tl.load(at(slots.coarse_rank, slot, stride) + row, mask=inside, other=0)
                mate_low, mate_high = mates(
                    codes, affine, row, inside, low, high, D, HALF, KEY_BITS, DTYPE, ROTARY, INTERLEAVED
                )
                lies = key_position(rank, far_limit(gone + WINDOW + 1, SEGMENT, TRAINED))
                cos_low, sin_low, cos_high, sin_high = angles(cos, sin, lies, inside, D, HALF, ROTARY, INTERLEAVED)
                low = low * cos_low - mate_low * sin_low
                high = high * cos_high - mate_high * sin_high
            key_sum = at(slots.key_sum, slot, stride) + head * D
            low, high = centred_unit(low.to(tl.float32), high.to(tl.float32), key_sum, gone, D, HALF)
            low = tl.trans(low.to(OPERAND))
            high = tl.trans(high.to(OPERAND))
            d = tl.arange(0, HALF)
            for start in range(0, SEGMENT, LOSERS):
                c = start + tl.arange(0, LOSERS)
                mask = (c < SEGMENT)[:, None]
                loser = work.unit + ((base * SEGMENT + c) * (2 * HALF))[:, None] + d[None, :]
                cosine = tl.dot(tl.load(loser, mask=mask, other=0.0), low, input_precision="ieee")
                cosine = tl.dot(tl.load(loser + HALF, mask=mask, other=0.0), high, cosine, input_precision="ieee")
                cosine = tl.where(inside[None, :], cosine, -2.0)
                best, column = tl.max(cosine, 1, return_indices=True)
                found = pack_rank(best, first + column)
                tl.atomic_max(work.nearest + base * SEGMENT + c, found, mask=c < SEGMENT, sem="relaxed")


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def apply(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    cos, sin, gate, kv_heads, D: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    TRAINED: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
):  # fmt: skip
    """Merge losers into entries: the first loser of an entry does it for all of that entry's."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    row_order, due = due_rows(rows, WINDOW, SEGMENT, ROWS)
    cells = tl.arange(0, SEGMENT)
    for item in range(tl.program_id(0), due * kv_heads * SEGMENT, tl.num_programs(0)):
        slot, gone = due_row(rows, row_order, item // (kv_heads * SEGMENT), WINDOW, ROWS)
        head = item // SEGMENT % kv_heads
        base = (slot * kv_heads + head) * SEGMENT
        mine = tl.load(work.nearest + base + item % SEGMENT)
        if (mine > 0) & (tl.load(work.rank + base + item % SEGMENT) > 0):
            found = tl.load(work.nearest + base + cells)
            losers = (found > 0) & (tl.load(work.rank + base + cells) > 0)
            group = losers & (rank_position(found) == rank_position(mine))  # nearest to the same entry
            if tl.min(tl.where(group, cells, SEGMENT)) == item % SEGMENT:
                weight = gate + 3 * head
                scores = tl.load(weight) + tl.load(weight + 1) * rank_score(found)
                row = tl.load(slots.coarse_start + head) + rank_position(mine)
                mass = tl.load(at(slots.coarse_mass, slot, stride) + row)
                opening = tl.sigmoid(scores + tl.load(weight + 2) * tl.log(mass))
                share = tl.load(work.mass + base + cells) * opening
                share = tl.where(group & (opening >= 0.01), share, 0.0)
                if tl.sum(share) > 0:
                    _merge_into(
                        slots, stride, work.rank + base, cos, sin, slot, head, gone, row, mass, share,
                        D, HALF, WINDOW, SEGMENT, ROTARY, INTERLEAVED, TRAINED, KEY_BITS, VALUE_BITS,
                    )  # fmt: skip


@triton.jit
def _merge_into(
    slots, stride, ranks, cos, sin, slot, head, gone, entry, mass, share,
    D: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr, SEGMENT: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, TRAINED: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
):  # fmt: skip
    """Move a coarse entry of that mass towards the losers with a share above 0 [C] (README.md, eq. 10)."""
    DTYPE: tl.constexpr = slots.ring_k.dtype.element_ty
    one = tl.arange(0, 1)
    whole = one == 0
    row = entry + one
    codes_k = at(slots.coarse_k, slot, stride)
    codes_v = at(slots.coarse_v, slot, stride)
    affine_k = at(slots.coarse_k_affine, slot, stride)
    affine_v = at(slots.coarse_v_affine, slot, stride)
    ring_k = at(slots.ring_k, slot, stride)
    ring_v = at(slots.ring_v, slot, stride)
    k_low, k_high = decode(codes_k, affine_k, row, whole, D, HALF, KEY_BITS, DTYPE)
    v_low, v_high = decode(codes_v, affine_v, row, whole, D, HALF, VALUE_BITS, DTYPE)
    if ROTARY > 0:
        limit = far_limit(gone + WINDOW + 1, SEGMENT, TRAINED)
        lies = key_position(tl.load(at(slots.coarse_rank, slot, stride) + row), limit)
        there = angles(cos, sin, lies, whole, D, HALF, ROTARY, INTERLEAVED)
    cells = tl.arange(0, SEGMENT)
    add_k_low = tl.zeros([1, HALF], tl.float32)
    add_k_high = tl.zeros([1, HALF], tl.float32)
    add_v_low = tl.zeros([1, HALF], tl.float32)
    add_v_high = tl.zeros([1, HALF], tl.float32)
    cell = -1
    for _ in range(tl.sum((share > 0).to(tl.int32))):
        cell = tl.min(tl.where((share > 0) & (cells > cell), cells, SEGMENT))
        weight = tl.sum(tl.where(cells == cell, share, 0.0))
        _, _, source = outgoing(head, gone, cell + one, WINDOW, SEGMENT)
        low, high = halves(ring_k, source, whole, D, HALF)
        if ROTARY > 0:
            mate_low, mate_high = mates(
                ring_k, affine_k, source, whole, low, high, D, HALF, 16, DTYPE, ROTARY, INTERLEAVED
            )
            lies = key_position(tl.load(ranks + cell + one), limit)
            here = angles(cos, sin, lies, whole, D, HALF, ROTARY, INTERLEAVED)
            low, high = turn(low, high, mate_low, mate_high, here, there)
        add_k_low += weight * (low.to(tl.float32) - k_low.to(tl.float32))
        add_k_high += weight * (high.to(tl.float32) - k_high.to(tl.float32))
        low, high = halves(ring_v, source, whole, D, HALF)
        add_v_low += weight * (low.to(tl.float32) - v_low.to(tl.float32))
        add_v_high += weight * (high.to(tl.float32) - v_high.to(tl.float32))
    mass += tl.sum(share)
    k_low = k_low.to(tl.float32) + add_k_low / mass
    k_high = k_high.to(tl.float32) + add_k_high / mass
    v_low = v_low.to(tl.float32) + add_v_low / mass
    v_high = v_high.to(tl.float32) + add_v_high / mass
    tl.debug_barrier()  # all lanes have read the entry
    store_encoded(codes_k, affine_k, row, whole, k_low, k_high, D, HALF, KEY_BITS)
    store_encoded(codes_v, affine_v, row, whole, v_low, v_high, D, HALF, VALUE_BITS)
    tl.store(at(slots.coarse_mass, slot, stride) + entry, mass)
