"""Attention of single tokens over memory, window and segment: bound by the bytes of the slot, codes read as they are.

The heads of a group are the rows of a tile. Vectors are handled as two halves, see tiles.py. Codes are operands of the
matrix products as they are, and their scales and zeros are applied to the products (README.md, 3), which are
smaller. Where values have a scale per group of columns, a tile has the rows once per group, each good for its columns.
"""

import triton
import triton.language as tl

from .launch import ROW_ARGUMENTS
from .slot import group_size
from .tiles import angles, at, decode, far_limit, halves, mate, nibbles, rank_position, row_at, scale_zero, turn

_group_size = triton.constexpr_function(group_size)


@triton.jit(do_not_specialize=ROW_ARGUMENTS + ["size"])
def attend_token(
    q, out, partial, lse, slots, stride, table, size,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    scale, q_token, q_head, out_token, out_head, cos, sin,
    TRAINED: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, SLIDING: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
    KEYS: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One token's heads of a group over one piece of their keys. scale includes log2(e): softmax is in base 2.

    HEADS: the power of two that a group's heads are padded to.
    """
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    RING: tl.constexpr = WINDOW + SEGMENT
    DTYPE: tl.constexpr = q.dtype.element_ty
    slot, token, count, seq_len = row_at(rows, tl.program_id(0))
    if (slot < 0) | (count <= 0):
        return
    head = tl.load(table + 4 * tl.program_id(1))
    start = tl.load(table + 4 * tl.program_id(1) + 1)
    part = tl.load(table + 4 * tl.program_id(1) + 2)

    COLUMNS: tl.constexpr = _group_size(D, 4) if VALUE_BITS == 4 else D  # that a row is good for
    row = tl.arange(0, TILE)
    query_head = head * GROUP + row % HEADS
    group = row // HEADS
    valid = (row % HEADS < GROUP) & (group < D // COLUMNS)
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

    gone = tl.maximum((seq_len - 1) // SEGMENT * SEGMENT - WINDOW, 0)  # left_ring: how many tokens memory holds
    exact_first = tl.load(slots.exact_start + head)
    exact = tl.load(slots.exact_start + head + 1) - exact_first
    coarse_first = tl.load(slots.coarse_start + head)
    coarse = tl.load(slots.coarse_start + head + 1) - coarse_first
    key = tl.arange(0, KEYS)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    low = tl.zeros([TILE, HALF], tl.float32)
    high = tl.zeros([TILE, HALF], tl.float32)

    ring_k = at(slots.ring_k, slot, stride) + head * (RING * D)
    ring_v = at(slots.ring_v, slot, stride) + head * (RING * D)
    for at_key in range(start, tl.minimum(tl.minimum(start + size, RING), seq_len - gone), KEYS):
        seen = gone + at_key + key
        inside = (at_key + key < RING) & (seen < seq_len)
        k_low, k_high = halves(ring_k, seen % RING, inside, D, HALF)
        v_low, v_high = halves(ring_v, seen % RING, inside, D, HALF)
        sees = inside
        if SLIDING:
            sees &= seen >= seq_len - WINDOW
        mass = tl.where(sees, 1.0, 0.0)[None, :]
        logits = _logits(q_low, q_high, k_low, k_high)
        weight, shrink, top, total = _weigh(logits, mass, scale, top, total)
        low, high = _absorb(weight, shrink, v_low, v_high, low, high)

    exact_k = at(slots.exact_k, slot, stride)
    exact_v = at(slots.exact_v, slot, stride)
    ranks = at(slots.exact_rank, slot, stride)
    end = tl.minimum(tl.minimum(start + size - RING, exact), gone)
    for at_key in range(tl.maximum(start - RING, 0), end, KEYS):
        inside = at_key + key < end
        entry = exact_first + at_key + key
        k_low, k_high = halves(exact_k, entry, inside, D, HALF)
        v_low, v_high = halves(exact_v, entry, inside, D, HALF)
        mass = tl.where(inside, 1.0, 0.0)[None, :]
        logits = _logits(q_low, q_high, k_low, k_high)
        if TRAINED > 0:
            if limit > 0:
                far = rank_position(tl.load(ranks + entry, mask=inside, other=0)) < limit
                logits = tl.where(far[None, :], _logits(far_low, far_high, k_low, k_high), logits)
        weight, shrink, top, total = _weigh(logits, mass, scale, top, total)
        low, high = _absorb(weight, shrink, v_low, v_high, low, high)

    coarse_k = at(slots.coarse_k, slot, stride)
    coarse_v = at(slots.coarse_v, slot, stride)
    k_affine = at(slots.coarse_k_affine, slot, stride)
    v_affine = at(slots.coarse_v_affine, slot, stride)
    masses = at(slots.coarse_mass, slot, stride)
    ranks = at(slots.coarse_rank, slot, stride)
    zeros = tl.zeros([TILE], tl.float32)
    end = tl.minimum(tl.minimum(start + size - RING - exact, coarse), gone - exact)
    for at_key in range(tl.maximum(start - RING - exact, 0), end, KEYS):
        inside = at_key + key < end
        entry = coarse_first + at_key + key
        if KEY_BITS == 8:
            k_low, k_high = halves(coarse_k, entry, inside, D, HALF)
            k_low = k_low.to(DTYPE)
            k_high = k_high.to(DTYPE)
            k_scale, k_zero = scale_zero(k_affine, entry, inside)
        else:
            k_low, k_high = decode(coarse_k, k_affine, entry, inside, D, HALF, KEY_BITS, DTYPE)
            k_scale, k_zero = 1.0, 0.0
        logits = _coded_logits(q_low, q_high, k_low, k_high, k_scale, k_zero, KEY_BITS)
        if TRAINED > 0:
            if limit > 0:
                far = rank_position(tl.load(ranks + entry, mask=inside, other=0)) < limit
                seen = _coded_logits(far_low, far_high, k_low, k_high, k_scale, k_zero, KEY_BITS)
                logits = tl.where(far[None, :], seen, logits)
        mass = tl.load(masses + entry, mask=inside, other=0.0)[None, :]
        weight, shrink, top, total = _weigh(logits, mass, scale, top, total)
        if VALUE_BITS == 16:
            v_low, v_high = halves(coarse_v, entry, inside, D, HALF)
        else:
            if VALUE_BITS == 8:
                v_low, v_high = halves(coarse_v, entry, inside, D, HALF)
            else:
                v_low, v_high = nibbles(coarse_v, entry, inside, D, HALF)
            cell = entry[None, :] * (D // COLUMNS) + group[:, None]
            v_scale, v_zero = scale_zero(v_affine, cell, inside[None, :] & (group < D // COLUMNS)[:, None])
            zeros = zeros * shrink + tl.sum(weight * v_zero, 1)
            weight *= v_scale
        low, high = _absorb(weight, shrink, v_low.to(DTYPE), v_high.to(DTYPE), low, high)
    if VALUE_BITS < 16:
        low += zeros[:, None]
        high += zeros[:, None]

    some = total > 0
    share = tl.where(some, 1.0 / total, 0.0)[:, None]
    low_mask = mask & ((i // COLUMNS)[None, :] == group[:, None])
    high_mask = mask & (((i + D // 2) // COLUMNS)[None, :] == group[:, None])
    if part < 0:
        target = out + token.to(tl.int64) * out_token + (query_head * out_head)[:, None] + i[None, :]
        tl.store(target, (low * share).to(DTYPE), mask=low_mask)
        tl.store(target + D // 2, (high * share).to(DTYPE), mask=high_mask)
    else:
        cell = (part.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * GROUP + row % HEADS
        scratch = partial + cell[:, None] * D + i[None, :]
        tl.store(scratch, low * share, mask=low_mask)
        tl.store(scratch + D // 2, high * share, mask=high_mask)
        tl.store(lse + cell, tl.where(some, top + tl.log2(total), float("-inf")), mask=valid & (group == 0))


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
def _coded_logits(q_low, q_high, k_low, k_high, scale, zero, BITS: tl.constexpr):
    """Products with keys z + a c of which c is given: a (q.c) + z sum(q)."""
    logits = _logits(q_low, q_high, k_low, k_high)
    if BITS == 8:
        total = tl.sum(q_low.to(tl.float32), 1) + tl.sum(q_high.to(tl.float32), 1)
        logits = logits * scale[None, :] + total[:, None] * zero[None, :]
    return logits


@triton.jit
def _weigh(logits, mass, scale, top, total):
    """Weights of a tile of keys in a running softmax (README.md, eq. 3); mass is 0 where a key is not seen."""
    new_top = tl.maximum(top, tl.max(tl.where(mass > 0, logits, float("-inf")), 1) * scale)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet
    weight = mass * tl.exp2(logits * scale - base[:, None])
    shrink = tl.exp2(top - base)
    return weight, shrink, new_top, total * shrink + tl.sum(weight, 1)


@triton.jit
def _absorb(weight, shrink, v_low, v_high, low, high):
    """Add weighted values to what a shrinking softmax has summed up."""
    if v_low.dtype == tl.float16:
        weight = tl.minimum(weight, 65504.0)  # what fp16 holds
    weight = weight.to(v_low.dtype)
    low = tl.dot(weight, v_low, low * shrink[:, None], input_precision="ieee")
    high = tl.dot(weight, v_high, high * shrink[:, None], input_precision="ieee")
    return low, high
