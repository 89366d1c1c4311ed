"""Attention of single tokens over memory, window and segment: bound by the bytes of the slot, codes read as they are.

The heads of a group are the rows of a tile. Vectors are handled as two halves, see tiles.py.
"""

import triton
import triton.language as tl

from .launch import ROW_ARGUMENTS
from .tiles import (
    angles,
    at,
    decode,
    far_limit,
    halves,
    left_ring,
    mate,
    no_keys,
    pairs_of,
    part_of,
    rank_position,
    row_at,
    sizes,
    turn,
)


@triton.jit(do_not_specialize=ROW_ARGUMENTS + ["size"])
def attend_token(
    q, out, partial, lse, slots, stride, table, size,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    scale, q_token, q_head, out_token, out_head, cos, sin, sink_logits,
    SUNK: tl.constexpr, TRAINED: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, SLIDING: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
    KEYS: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, CELLS: tl.constexpr, PARTED: tl.constexpr,
):  # fmt: skip
    """One token's heads of a group over one cut of their keys. scale includes log2(e): softmax is in base 2."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    RING: tl.constexpr = WINDOW + SEGMENT
    DTYPE: tl.constexpr = q.dtype.element_ty
    n = tl.program_id(0)
    slot, token, count, seq_len = row_at(rows, n)
    if (slot < 0) | (count <= 0):
        return
    head = tl.load(table + 4 * tl.program_id(1))
    start = tl.load(table + 4 * tl.program_id(1) + 1)
    part = tl.load(table + 4 * tl.program_id(1) + 2)
    gone = left_ring(seq_len, WINDOW, SEGMENT)

    row = tl.arange(0, TILE)
    cell = (part.to(tl.int64) * tl.num_programs(0) + n) * GROUP + row
    if PARTED:  # most sequences are far shorter than they may get
        if (part >= 0) & (start >= seq_len - gone):
            tl.store(lse + cell, tl.full([TILE], float("-inf"), tl.float32), mask=row < GROUP)
            return
    query_head = head * GROUP + row
    valid = row < GROUP
    i = tl.arange(0, HALF)
    mask = valid[:, None] & (i < D // 2)[None, :]
    query = q + token.to(tl.int64) * q_token + (query_head * q_head)[:, None] + i[None, :]
    q_low = tl.load(query, mask=mask, other=0.0)
    q_high = tl.load(query + D // 2, mask=mask, other=0.0)
    far_low = q_low
    far_high = q_high
    limit = far_limit(seq_len, SEGMENT, TRAINED)
    if TRAINED > 0:
        if limit > 0:
            position = seq_len - 1 + row * 0
            far_low, far_high = _far_query(
                query, mask, q_low, q_high, cos, sin, position, valid, D, HALF, TRAINED, ROTARY, INTERLEAVED
            )

    exact_first, coarse_first, exact, _, held_exact, held_coarse = sizes(slots, head, gone)
    key = tl.arange(0, KEYS)
    top, total = no_keys(sink_logits, query_head, valid, SUNK, part)
    low = tl.zeros([TILE, HALF], tl.float32)
    high = tl.zeros([TILE, HALF], tl.float32)

    for at_key in range(start, tl.minimum(tl.minimum(start + size, RING), seq_len - gone), KEYS):
        seen = gone + at_key + key
        inside = (at_key + key < RING) & (seen < seq_len)
        lies_in = part_of(rows, n, slot, seen, inside, CELLS, PARTED)
        key_cell = head * CELLS + seen % CELLS
        k_low, k_high = halves(at(slots.ring_k, lies_in, stride), key_cell, inside, D, HALF)
        v_low, v_high = halves(at(slots.ring_v, lies_in, stride), key_cell, inside, D, HALF)
        sees = inside
        if SLIDING:
            sees &= seen >= seq_len - WINDOW
        mass = tl.where(sees, 1.0, 0.0)[None, :]
        logits = _logits(q_low, q_high, k_low, k_high)
        top, total, low, high = _absorb(logits, v_low, v_high, mass, scale, top, total, low, high)

    exact_k = at(slots.exact_k, slot, stride)
    exact_v = at(slots.exact_v, slot, stride)
    ranks = at(slots.exact_rank, slot, stride)
    end = tl.minimum(start + size - RING, held_exact)
    for at_key in range(tl.maximum(start - RING, 0), end, KEYS):
        inside = at_key + key < end
        entry = exact_first + at_key + key
        k_low, k_high = halves(exact_k, entry, inside, D, HALF)
        v_low, v_high = halves(exact_v, entry, inside, D, HALF)
        mass = tl.where(inside, 1.0, 0.0)[None, :]
        logits = _memory_logits(q_low, q_high, far_low, far_high, k_low, k_high, ranks + entry, inside, limit, TRAINED)
        top, total, low, high = _absorb(logits, v_low, v_high, mass, scale, top, total, low, high)

    coarse_k = at(slots.coarse_k, slot, stride)
    coarse_v = at(slots.coarse_v, slot, stride)
    k_affine = at(slots.coarse_k_affine, slot, stride)
    v_affine = at(slots.coarse_v_affine, slot, stride)
    masses = at(slots.coarse_mass, slot, stride)
    pairs = pairs_of(slots, head, D)
    ranks = at(slots.coarse_rank, slot, stride)
    end = tl.minimum(start + size - RING - exact, held_coarse)
    for at_key in range(tl.maximum(start - RING - exact, 0), end, KEYS):
        inside = at_key + key < end
        entry = coarse_first + at_key + key
        k_low, k_high = decode(coarse_k, k_affine, entry, inside, pairs, D, HALF, KEY_BITS, DTYPE)
        v_low, v_high = decode(coarse_v, v_affine, entry, inside, pairs, D, HALF, VALUE_BITS, DTYPE)
        mass = tl.load(masses + entry, mask=inside, other=0.0)[None, :]
        logits = _memory_logits(q_low, q_high, far_low, far_high, k_low, k_high, ranks + entry, inside, limit, TRAINED)
        top, total, low, high = _absorb(logits, v_low, v_high, mass, scale, top, total, low, high)

    some = total > 0
    share = tl.where(some, 1.0 / total, 0.0)[:, None]
    if part < 0:
        target = out + token.to(tl.int64) * out_token + (query_head * out_head)[:, None] + i[None, :]
        tl.store(target, (low * share).to(DTYPE), mask=mask)
        tl.store(target + D // 2, (high * share).to(DTYPE), mask=mask)
    else:
        scratch = partial + cell[:, None] * D + i[None, :]
        tl.store(scratch, low * share, mask=mask)
        tl.store(scratch + D // 2, high * share, mask=mask)
        tl.store(lse + cell, tl.where(some, top + tl.log2(total), float("-inf")), mask=valid)


@triton.jit
def _far_query(
    query, mask, low, high, cos, sin, position, valid, D: tl.constexpr, HALF: tl.constexpr,
    TRAINED: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """See reference.far_query: two [TILE, HALF] in the queries' dtype; query [TILE, HALF] points to their halves."""
    if ROTARY == D and not INTERLEAVED:
        mate_low, mate_high = high, low
    else:
        i = tl.arange(0, HALF)
        mate_low = tl.load(query + (mate(i, ROTARY, INTERLEAVED) - i)[None, :], mask=mask, other=0.0)
        mate_high = tl.load(query + (mate(i + D // 2, ROTARY, INTERLEAVED) - i)[None, :], mask=mask, other=0.0)
    here = angles(cos, sin, position, valid, D, HALF, ROTARY, INTERLEAVED)
    there = angles(cos, sin, position * 0 + (TRAINED - 1), valid, D, HALF, ROTARY, INTERLEAVED)
    far_low, far_high = turn(low, high, mate_low.to(tl.float32), mate_high.to(tl.float32), here, there)
    return far_low.to(low.dtype), far_high.to(high.dtype)


@triton.jit
def _logits(q_low, q_high, k_low, k_high):
    logits = tl.dot(q_low, tl.trans(k_low), input_precision="ieee")
    return tl.dot(q_high, tl.trans(k_high), logits, input_precision="ieee")


@triton.jit
def _memory_logits(q_low, q_high, far_low, far_high, k_low, k_high, ranks, inside, limit, TRAINED: tl.constexpr):
    """Products with memory entries; far ones, which lie before the limit, with the queries turned to see them."""
    logits = _logits(q_low, q_high, k_low, k_high)
    if TRAINED > 0:
        if limit > 0:
            far = rank_position(tl.load(ranks, mask=inside, other=0)) < limit
            logits = tl.where(far[None, :], _logits(far_low, far_high, k_low, k_high), logits)
    return logits


@triton.jit
def _absorb(logits, v_low, v_high, mass, scale, top, total, low, high):
    """Add a tile of keys to a running softmax (README.md, eq. 3); mass is 0 where a key is not seen."""
    logits = tl.where(mass > 0, logits * scale, float("-inf"))  # 0 times the exponential of an unseen key may be NaN
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet
    weight = mass * tl.exp2(logits - base[:, None])
    if v_low.dtype == tl.float16:
        weight = tl.minimum(weight, 65504.0)  # what fp16 holds
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weight, 1)
    weight = weight.to(v_low.dtype)
    low = tl.dot(weight, v_low, low * shrink[:, None], input_precision="ieee")
    high = tl.dot(weight, v_high, high * shrink[:, None], input_precision="ieee")
    return new_top, total, low, high
