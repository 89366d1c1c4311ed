"""The nearest coarse entry of every loser (README.md, 6)."""

import triton
import triton.language as tl

from .launch import ROW_ARGUMENTS
from .tiles import (
    angles,
    at,
    centred_unit,
    decode,
    due_tile,
    far_limit,
    key_position,
    pack_rank,
    pairs_of,
    sizes,
    turn_back,
)


@triton.jit(do_not_specialize=ROW_ARGUMENTS + ["tiles"])
def nearest(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    cos, sin, kv_heads, table, tiles, CANDIDATES: tl.constexpr, TARGETS: tl.constexpr, LOSERS: tl.constexpr,
    KEY_BITS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, TRAINED: tl.constexpr,
):  # fmt: skip
    """Every loser's nearest coarse entry by cosine of centred pre-RoPE keys, among a tile of slot.candidates."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    slot, gone, index, tile = due_tile(rows, tiles, WINDOW, SEGMENT, ROWS)
    if gone == 0:
        return
    head = tl.load(table + 4 * tile)
    first = tl.load(table + 4 * tile + 1)
    base = index * kv_heads + head
    _, coarse_first, exact, coarse, _, _ = sizes(slots, head, gone)
    if (gone <= exact + coarse) | (first >= coarse):  # a head that is not full has no losers
        return
    DTYPE: tl.constexpr = slots.ring_k.dtype.element_ty
    OPERAND: tl.constexpr = work.unit.dtype.element_ty
    candidate = first + tl.arange(0, TARGETS)
    inside = candidate < tl.minimum(coarse, CANDIDATES)
    shift = tl.where(coarse > CANDIDATES, (gone // SEGMENT).to(tl.int64) * CANDIDATES % coarse, 0).to(tl.int32)
    entry = (shift + candidate) % coarse
    row = coarse_first + entry
    codes = at(slots.coarse_k, slot, stride)
    affine = at(slots.coarse_k_affine, slot, stride)
    pairs = pairs_of(slots, head, D)
    low, high = decode(codes, affine, row, inside, pairs, D, HALF, KEY_BITS, DTYPE)
    if ROTARY > 0:
        rank = tl.load(at(slots.coarse_rank, slot, stride) + row, mask=inside, other=0)
        lies = key_position(rank, far_limit(gone + WINDOW + 1, SEGMENT, TRAINED))
        here = angles(cos, sin, lies, inside, D, HALF, ROTARY, INTERLEAVED)
        low, high = turn_back(
            codes, affine, row, inside, low, high, pairs, here, D, HALF, KEY_BITS, DTYPE, ROTARY, INTERLEAVED
        )
    key_sum = at(slots.key_sum, slot, stride) + head * D
    low, high = centred_unit(low.to(tl.float32), high.to(tl.float32), key_sum, gone, D, HALF)
    # one product of whole vectors: of two in a row, Triton lets all warps do the first
    target = tl.permute(tl.join(low.to(OPERAND), high.to(OPERAND)), (0, 2, 1))
    target = tl.trans(tl.reshape(target, (TARGETS, 2 * HALF)))
    d = tl.arange(0, 2 * HALF)
    for start in range(0, SEGMENT, LOSERS):
        c = start + tl.arange(0, LOSERS)
        loser = work.unit + ((base * SEGMENT + c) * (2 * HALF))[:, None] + d[None, :]
        unit = tl.load(loser, mask=(c < SEGMENT)[:, None], other=0.0)
        cosine = tl.dot(unit, target, input_precision="ieee")
        cosine = tl.where(inside[None, :], cosine, -2.0)
        best = tl.max(cosine, 1)
        # cheaper than a maximum that carries its place along; of equals the lowest entry
        place = tl.min(tl.where(cosine == best[:, None], entry[None, :], coarse), 1)
        tl.atomic_max(
            work.nearest + base * SEGMENT + c, pack_rank(best, place), mask=(c < SEGMENT), sem="relaxed"
        )  # fmt: skip
