"""Attention of the tokens of a prompt's segment: full-width tiles of rows over full-width tiles of keys.

Every tile of query rows of a head reads the same coarse entries, so codes are turned into the model's dtype once,
before, in scratch of the step (`read_coarse`), and not by each of them again.
"""

import triton
import triton.language as tl

from .launch import ROW_ARGUMENTS
from .tiles import (
    at,
    column_angles,
    decode,
    far_limit,
    left_ring,
    locate,
    mate,
    no_keys,
    pairs_of,
    part_of,
    rank_position,
    row_at,
    sizes,
    store_halves,
)


@triton.jit(do_not_specialize=ROW_ARGUMENTS + ["coarse_total"])
def read_coarse(
    slots, stride, read_k, read_v, table,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences, coarse_total,
    ENTRIES: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr, SEGMENT: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
):  # fmt: skip
    """Decode a tile of the coarse entries of sequence n that hold something into read_k, read_v [N, Y, D]."""
    n = tl.program_id(1)
    slot, _, count, seq_len = row_at((slot_indices, slot_step, cu_seqlens, seq_lens, sequences), n)
    if (slot < 0) | (count <= 0):
        return
    head = tl.load(table + 4 * tl.program_id(0))
    entry = tl.load(table + 4 * tl.program_id(0) + 1) + tl.arange(0, ENTRIES)
    _, coarse_first, _, _, _, held = sizes(slots, head, left_ring(seq_len, WINDOW, SEGMENT))
    inside = entry < held
    row = coarse_first + entry
    DTYPE: tl.constexpr = read_k.dtype.element_ty
    base = n.to(tl.int64) * coarse_total * D
    pairs = pairs_of(slots, head, D)
    k_affine, v_affine = at(slots.coarse_k_affine, slot, stride), at(slots.coarse_v_affine, slot, stride)
    low, high = decode(at(slots.coarse_k, slot, stride), k_affine, row, inside, pairs, D, HALF, KEY_BITS, DTYPE)
    store_halves(read_k + base, row, inside, low, high, D, HALF)
    low, high = decode(at(slots.coarse_v, slot, stride), v_affine, row, inside, pairs, D, HALF, VALUE_BITS, DTYPE)
    store_halves(read_v + base, row, inside, low, high, D, HALF)


@triton.jit(do_not_specialize=ROW_ARGUMENTS + ["coarse_total", "size"])
def attend_prompt(
    q, out, partial, lse, slots, stride, read_k, read_v, coarse_total, table, size,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    scale, q_token, q_head, out_token, out_head, cos, sin, sink_logits,
    SUNK: tl.constexpr, TRAINED: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, SLIDING: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    KEYS: tl.constexpr, CODED: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    CELLS: tl.constexpr, PARTED: tl.constexpr,
):  # fmt: skip
    """One tile of query rows over one cut of a head's keys. scale includes log2(e): softmax is in base 2.

    CODED: coarse entries lie decoded in read_k, read_v; else they are read where they are.
    """
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    RING: tl.constexpr = WINDOW + SEGMENT
    DTYPE: tl.constexpr = q.dtype.element_ty
    n, first = locate(rows, tl.program_id(0), TOKENS, ROWS)
    if n == ROWS:
        return
    slot, begin, count, seq_len = row_at(rows, n)
    head = tl.load(table + 4 * tl.program_id(1))
    start = tl.load(table + 4 * tl.program_id(1) + 1)
    part = tl.load(table + 4 * tl.program_id(1) + 2)

    row = tl.arange(0, TILE)
    token = first + row // GROUP
    query_head = head * GROUP + row % GROUP
    valid = (row < TOKENS * GROUP) & (token < count)
    position = seq_len - count + token
    d = tl.arange(0, WIDTH)
    mask = valid[:, None] & (d < D)[None, :]
    query = q + ((begin + token).to(tl.int64) * q_token + query_head * q_head)[:, None] + d[None, :]
    near = tl.load(query, mask=mask, other=0.0)
    far = near
    limit = far_limit(seq_len, SEGMENT, TRAINED)
    if TRAINED > 0:
        if limit > 0:
            far = _far_query(query, mask, near, cos, sin, position, valid, WIDTH, TRAINED, ROTARY, INTERLEAVED)

    gone = left_ring(seq_len, WINDOW, SEGMENT)
    exact_first, coarse_first, exact, _, held_exact, held_coarse = sizes(slots, head, gone)
    newest = seq_len - count + tl.minimum(first + TOKENS, count) - 1
    key = tl.arange(0, KEYS)
    top, total = no_keys(sink_logits, query_head, valid, SUNK, part)
    sums = tl.zeros([TILE, WIDTH], tl.float32)

    for at_key in range(start, tl.minimum(tl.minimum(start + size, RING), newest - gone + 1), KEYS):
        seen = gone + at_key + key
        inside = (at_key + key < RING) & (seen <= newest)
        lies_in = part_of(rows, n, slot, seen, inside, CELLS, PARTED)
        cell = (head * CELLS + seen % CELLS)[:, None] * D + d[None, :]
        k = tl.load(at(slots.ring_k, lies_in, stride) + cell, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(at(slots.ring_v, lies_in, stride) + cell, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        sees = inside[None, :] & (seen[None, :] <= position[:, None])
        if SLIDING:
            sees &= seen[None, :] > position[:, None] - WINDOW
        logits = tl.where(sees, tl.dot(near, tl.trans(k), input_precision="ieee"), float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1) * scale)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet
        weight = tl.exp2(logits * scale - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        sums = tl.dot(weight.to(DTYPE), v, sums * shrink[:, None], input_precision="ieee")
        top = new_top

    k = at(slots.exact_k, slot, stride) + exact_first * D
    v = at(slots.exact_v, slot, stride) + exact_first * D
    ranks = at(slots.exact_rank, slot, stride) + exact_first
    masses = at(slots.coarse_mass, slot, stride) + coarse_first
    begin_key, end_key = tl.maximum(start - RING, 0), tl.minimum(start + size - RING, held_exact)
    top, total, sums = _absorb_entries(
        near, far, k, v, ranks, masses, begin_key, end_key, limit, scale, top, total, sums,
        False, TRAINED, D, WIDTH, KEYS,
    )  # fmt: skip
    if CODED:
        k = read_k + (n.to(tl.int64) * coarse_total + coarse_first) * D
        v = read_v + (n.to(tl.int64) * coarse_total + coarse_first) * D
    else:
        k = at(slots.coarse_k, slot, stride) + coarse_first * D
        v = at(slots.coarse_v, slot, stride) + coarse_first * D
    ranks = at(slots.coarse_rank, slot, stride) + coarse_first
    begin_key, end_key = tl.maximum(start - RING - exact, 0), tl.minimum(start + size - RING - exact, held_coarse)
    top, total, sums = _absorb_entries(
        near, far, k, v, ranks, masses, begin_key, end_key, limit, scale, top, total, sums,
        True, TRAINED, D, WIDTH, KEYS,
    )  # fmt: skip

    some = total > 0
    mean = sums * tl.where(some, 1.0 / total, 0.0)[:, None]
    if part < 0:
        target = out + ((begin + token).to(tl.int64) * out_token + query_head * out_head)[:, None] + d[None, :]
        tl.store(target, mean.to(DTYPE), mask=mask)
    else:
        cell = (part.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (TOKENS * GROUP) + row
        tl.store(partial + cell[:, None] * D + d[None, :], mean, mask=mask)
        tl.store(lse + cell, tl.where(some, top + tl.log2(total), float("-inf")), mask=valid)


@triton.jit
def _far_query(
    query, mask, near, cos, sin, position, valid, WIDTH: tl.constexpr,
    TRAINED: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """See reference.far_query: [TILE, WIDTH] in the queries' dtype; query [TILE, WIDTH] points to them."""
    d = tl.arange(0, WIDTH)
    other = tl.load(query + (mate(d, ROTARY, INTERLEAVED) - d)[None, :], mask=mask, other=0.0).to(tl.float32)
    cos_here, sin_here = column_angles(cos, sin, position, valid, d, ROTARY, INTERLEAVED)
    cos_there, sin_there = column_angles(cos, sin, position * 0 + (TRAINED - 1), valid, d, ROTARY, INTERLEAVED)
    turned = near * (cos_here * cos_there + sin_here * sin_there)
    turned += other * (sin_there * cos_here - cos_there * sin_here)
    return turned.to(near.dtype)


@triton.jit
def _absorb_entries(
    near, far, k, v, ranks, masses, begin, end, limit, scale, top, total, sums,
    COARSE: tl.constexpr, TRAINED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add a tier's entries from begin to end: whole tiles without a mask, then what is left."""
    key = tl.arange(0, KEYS)
    full = begin + tl.maximum(end - begin, 0) // KEYS * KEYS
    for at_key in range(begin, full, KEYS):
        top, total, sums = _absorb(
            near, far, k, v, ranks, masses, at_key + key, end, limit, scale, top, total, sums,
            False, COARSE, TRAINED, D, WIDTH,
        )  # fmt: skip
    if full < end:
        top, total, sums = _absorb(
            near, far, k, v, ranks, masses, full + key, end, limit, scale, top, total, sums,
            True, COARSE, TRAINED, D, WIDTH,
        )  # fmt: skip
    return top, total, sums


@triton.jit
def _absorb(
    near, far, k, v, ranks, masses, entry, end, limit, scale, top, total, sums,
    TAIL: tl.constexpr, COARSE: tl.constexpr, TRAINED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add a tile of entries to a running softmax (README.md, eq. 3); all exist unless it is the tail."""
    d = tl.arange(0, WIDTH)
    inside = entry < end
    cell = entry[:, None] * D + d[None, :]
    if TAIL:
        mask = inside[:, None] & (d < D)[None, :]
        keys = tl.load(k + cell, mask=mask, other=0.0)
        values = tl.load(v + cell, mask=mask, other=0.0)
    elif D == WIDTH:
        keys = tl.load(k + cell)
        values = tl.load(v + cell)
    else:
        keys = tl.load(k + cell, mask=(d < D)[None, :], other=0.0)
        values = tl.load(v + cell, mask=(d < D)[None, :], other=0.0)
    logits = tl.dot(near, tl.trans(keys), input_precision="ieee")
    if TRAINED > 0:
        if limit > 0:
            old = rank_position(tl.load(ranks + entry, mask=inside, other=0)) < limit
            logits = tl.where(old[None, :], tl.dot(far, tl.trans(keys), input_precision="ieee"), logits)
    if TAIL:
        logits = tl.where(inside[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1) * scale)
    weight = tl.exp2(logits * scale - new_top[:, None])
    if COARSE:
        weight *= tl.load(masses + entry, mask=inside, other=0.0)[None, :]
        if values.dtype == tl.float16:
            weight = tl.minimum(weight, 65504.0)  # what fp16 holds
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weight, 1)
    sums = tl.dot(weight.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
    return new_top, total, sums
