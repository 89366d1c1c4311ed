"""Merging losers: the nearest coarse entry of each, and the gated update (README.md, 7 and 8)."""

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
    halves,
    mates,
    outgoing,
    pack_rank,
    rank_position,
    rank_score,
    store_encoded,
)


@triton.jit(do_not_specialize=ROW_ARGUMENTS + ["tiles"])
def nearest(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    cos, sin, kv_heads, table, tiles, TARGETS: tl.constexpr, LOSERS: tl.constexpr,
    KEY_BITS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
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
                cos_low, sin_low, cos_high, sin_high = angles(
                    cos, sin, rank_position(rank), inside, D, HALF, ROTARY, INTERLEAVED
                )
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
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
):  # fmt: skip
    """Merge losers into entries: the first loser of an entry does it for all of that entry's."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    row_order, due = due_rows(rows, WINDOW, SEGMENT, ROWS)
    DTYPE: tl.constexpr = slots.ring_k.dtype.element_ty
    cells = tl.arange(0, SEGMENT)
    one = tl.arange(0, 1)
    for item in range(tl.program_id(0), due * kv_heads * SEGMENT, tl.num_programs(0)):
        slot, gone = due_row(rows, row_order, item // (kv_heads * SEGMENT), WINDOW, ROWS)
        head = item // SEGMENT % kv_heads
        base = slot * kv_heads + head
        found = tl.load(work.nearest + base * SEGMENT + cells)
        rank = tl.load(work.rank + base * SEGMENT + cells)
        target = rank_position(found)  # the entry that pack_rank took
        loses = (found > 0) & (rank > 0)
        mine = tl.sum(tl.where(cells == item % SEGMENT, target, 0))
        group = loses & (target == mine)
        leader = tl.min(tl.where(group, cells, SEGMENT))
        if leader == item % SEGMENT:
            row = tl.load(slots.coarse_start + head) + mine + one
            whole = one >= 0
            masses = at(slots.coarse_mass, slot, stride)
            mass = tl.sum(tl.load(masses + row))
            scores = tl.load(gate + 3 * head) + tl.load(gate + 3 * head + 1) * rank_score(found)
            opening = tl.sigmoid(scores + tl.load(gate + 3 * head + 2) * tl.log(mass))
            weight = tl.load(work.mass + base * SEGMENT + cells) * opening
            weight = tl.where(group & (opening >= 0.01), weight, 0.0)
            taken = tl.sum((weight > 0).to(tl.int32))
            if taken > 0:
                codes_k = at(slots.coarse_k, slot, stride)
                codes_v = at(slots.coarse_v, slot, stride)
                affine_k = at(slots.coarse_k_affine, slot, stride)
                affine_v = at(slots.coarse_v_affine, slot, stride)
                ring_k = at(slots.ring_k, slot, stride)
                ring_v = at(slots.ring_v, slot, stride)
                k_low, k_high = decode(codes_k, affine_k, row, whole, D, HALF, KEY_BITS, DTYPE)
                v_low, v_high = decode(codes_v, affine_v, row, whole, D, HALF, VALUE_BITS, DTYPE)
                k_low = k_low.to(tl.float32)
                k_high = k_high.to(tl.float32)
                v_low = v_low.to(tl.float32)
                v_high = v_high.to(tl.float32)
                tl.debug_barrier()
                if ROTARY > 0:
                    there = rank_position(tl.load(at(slots.coarse_rank, slot, stride) + row))
                    cos_low, sin_low, cos_high, sin_high = angles(cos, sin, there, whole, D, HALF, ROTARY, INTERLEAVED)
                add_k_low = tl.zeros([1, HALF], tl.float32)
                add_k_high = tl.zeros([1, HALF], tl.float32)
                add_v_low = tl.zeros([1, HALF], tl.float32)
                add_v_high = tl.zeros([1, HALF], tl.float32)
                cell = -1
                for _ in range(taken):
                    cell = tl.min(tl.where((weight > 0) & (cells > cell), cells, SEGMENT))
                    share = tl.sum(tl.where(cells == cell, weight, 0.0))
                    _, _, source = outgoing(head, gone, cell + one, WINDOW, SEGMENT)
                    low, high = halves(ring_k, source, whole, D, HALF)
                    if ROTARY > 0:
                        # from its own position to the entry's: turned by the difference of the angles
                        here = rank_position(tl.sum(tl.where(cells == cell, rank, 0)) + 0 * one)
                        mate_low, mate_high = mates(
                            ring_k, affine_k, source, whole, low, high, D, HALF, 16, DTYPE, ROTARY, INTERLEAVED
                        )
                        c_low, s_low, c_high, s_high = angles(cos, sin, here, whole, D, HALF, ROTARY, INTERLEAVED)
                        low = low * (c_low * cos_low + s_low * sin_low) + mate_low * (sin_low * c_low - cos_low * s_low)
                        high = high * (c_high * cos_high + s_high * sin_high) + mate_high * (
                            sin_high * c_high - cos_high * s_high
                        )
                    add_k_low += share * (low.to(tl.float32) - k_low)
                    add_k_high += share * (high.to(tl.float32) - k_high)
                    low, high = halves(ring_v, source, whole, D, HALF)
                    add_v_low += share * (low.to(tl.float32) - v_low)
                    add_v_high += share * (high.to(tl.float32) - v_high)
                total = mass + tl.sum(weight)
                store_encoded(
                    codes_k,
                    affine_k,
                    row,
                    whole,
                    k_low + add_k_low / total,
                    k_high + add_k_high / total,
                    D,
                    HALF,
                    KEY_BITS,
                )
                store_encoded(
                    codes_v,
                    affine_v,
                    row,
                    whole,
                    v_low + add_v_low / total,
                    v_high + add_v_high / total,
                    D,
                    HALF,
                    VALUE_BITS,
                )
                tl.store(masses + row, total + 0.0 * one)
