"""Triton attention over memory, window and segment: split over keys, joined by log-sum-exp (README.md, 2).

A head's keys are numbered ring first, then exact, then coarse entries. The host cuts every head into pieces
of equal size (launch.Pieces), so a head that holds eight times the mean gets eight times the programs. A
program takes one piece and one tile of query rows; the heads of a group are rows of the same tile.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import ROW_ARGUMENTS, buffer, half_width, heads_of, processors, rows_of, rows_width
from .slot import LayerSlots, Rope
from .tiles import angles, at, decode, far_limit, halves, locate, mate, rank_position, row_at, turn

INTERPRETED_KEYS = 16


class Tile(NamedTuple):
    """Shape of a program: query rows, keys at a time, warps, pipeline stages, programs per multiprocessor."""

    rows: int
    keys: int
    warps: int
    stages: int
    resident: int


DECODE = Tile(16, 64, 2, 2, 4)  # few warps: each scale of a code then serves more columns of a lane
PIECE = Tile(64, 64, 4, 3, 2), Tile(128, 64, 8, 3, 1)


def attend(
    q, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, scale: float, out, rope: Rope | None = None,
    max_query_len: int | None = None, live_tokens: int | None = None,
) -> None:  # fmt: skip
    """See reference.attend. q, out [T, H, D] may be strided in their first two dimensions.

    What the host knows of the rows that are no padding: max_query_len, an upper bound of their lengths (1 takes
    the decoding shape), and live_tokens, one of their sum (T where it is not given).
    """
    query_heads, size = q.shape[1:]
    group, count, device = query_heads // slots.ring_k.shape[1], len(slot_indices), q.device
    rows, heads = rows_of(slot_indices, cu_seqlens, seq_lens), heads_of(slots)
    live_tokens, single = live_tokens or q.shape[0], max_query_len == 1
    tile = _tile(q, group, 1 if single else min(max_query_len or live_tokens, live_tokens))
    tile_tokens = 1 if single else tile.rows // group
    blocks = count if single else live_tokens // tile_tokens + count
    counts = tuple(slots.ring_k.shape[2] + held for held in heads.held)
    resident = processors(device) * tile.resident
    pieces = heads.pieces(counts, tile.keys, blocks, resident, tile_tokens * group * size * 4)
    shape = (pieces.parts, blocks, tile_tokens * group)
    partial = buffer("partial", (*shape, size), torch.float32, device)
    lse = buffer("lse", shape, torch.float32, device)
    common = dict(GROUP=group, D=size, TOKENS=tile_tokens, ROWS=rows_width(slot_indices))
    if rope is None or not rope.trained or slots.sliding:
        cos, sin, turned = q, q, dict(TRAINED=0, ROTARY=0, INTERLEAVED=False)
    else:
        cos, sin = rope.cos, rope.sin
        turned = dict(TRAINED=rope.trained, ROTARY=2 * cos.shape[1], INTERLEAVED=rope.interleaved)
    _attend[(blocks, len(pieces.table))](
        q, out, partial, lse, slots, heads.stride, pieces.table, pieces.size, *rows, scale * math.log2(math.e),
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), cos, sin, **turned,
        WINDOW=slots.window, SEGMENT=slots.segment, SLIDING=slots.sliding, HALF=half_width(size), TILE=tile.rows,
        KEYS=tile.keys, KEY_BITS=slots.codec.key_bits, VALUE_BITS=slots.codec.value_bits, **common,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if pieces.parts:
        _combine[(blocks * tile_tokens, query_heads)](
            out, partial, lse, pieces.first_part, *rows, blocks, out.stride(0), out.stride(1),
            WIDTH=triton.next_power_of_2(size), PARTS=64 if single else 8, **common, num_warps=4 if single else 1,
        )  # fmt: skip


def _tile(q, group: int, longest: int) -> Tile:
    """The tile for rows of up to `longest` tokens: one of three, as each is compiled for itself."""
    tile = DECODE if longest == 1 else PIECE[group * longest > PIECE[0].rows]
    if not q.is_cuda:
        tile = tile._replace(keys=INTERPRETED_KEYS)
    if q.shape[2] * q.element_size() > 256:  # wider heads: more registers and shared memory for the same rows
        tile = tile._replace(warps=2 * tile.warps, stages=2, resident=max(tile.resident // 2, 1))
    return tile._replace(rows=max(tile.rows, triton.next_power_of_2(group)))


@triton.jit(do_not_specialize=ROW_ARGUMENTS + ["size"])
def _attend(
    q, out, partial, lse, slots, stride, table, size,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    scale, q_token, q_head, out_token, out_head, cos, sin,
    TRAINED: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, SLIDING: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
    KEYS: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of query rows over one piece of a head's keys. scale includes log2(e): softmax is in base 2."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    RING: tl.constexpr = WINDOW + SEGMENT
    DTYPE: tl.constexpr = q.dtype.element_ty
    n = tl.program_id(0)
    first = 0
    if TOKENS > 1:
        n, first = locate(rows, n, TOKENS, ROWS)
        if n == ROWS:
            return
    slot, begin, count, seq_len = row_at(rows, n)
    if (slot < 0) | (count <= 0):
        return
    head = tl.load(table + 4 * tl.program_id(1))
    start = tl.load(table + 4 * tl.program_id(1) + 1)
    part = tl.load(table + 4 * tl.program_id(1) + 2)

    row = tl.arange(0, TILE)
    token = first + row // GROUP
    query_head = head * GROUP + row % GROUP
    valid = (row < TOKENS * GROUP) & (token < count)
    position = seq_len - count + token
    i = tl.arange(0, HALF)
    mask = valid[:, None] & (i < D // 2)[None, :]
    query = q + ((begin + token).to(tl.int64) * q_token + query_head * q_head)[:, None] + i[None, :]
    q_low = tl.load(query, mask=mask, other=0.0)
    q_high = tl.load(query + D // 2, mask=mask, other=0.0)
    far_low = q_low
    far_high = q_high
    limit = far_limit(seq_len, SEGMENT, TRAINED)
    if TRAINED > 0:
        if limit > 0:
            far_low, far_high = _far_query(
                query, mask, q_low, q_high, cos, sin, position, valid, D, HALF, TRAINED, ROTARY, INTERLEAVED
            )

    gone = tl.maximum((seq_len - 1) // SEGMENT * SEGMENT - WINDOW, 0)  # left_ring: how many tokens memory holds
    exact_first = tl.load(slots.exact_start + head)
    exact = tl.load(slots.exact_start + head + 1) - exact_first
    coarse_first = tl.load(slots.coarse_start + head)
    coarse = tl.load(slots.coarse_start + head + 1) - coarse_first
    newest = seq_len - count + tl.minimum(first + TOKENS, count) - 1
    key = tl.arange(0, KEYS)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    low = tl.zeros([TILE, HALF], tl.float32)
    high = tl.zeros([TILE, HALF], tl.float32)

    ring_k = at(slots.ring_k, slot, stride) + head * (RING * D)
    ring_v = at(slots.ring_v, slot, stride) + head * (RING * D)
    for at_key in range(start, tl.minimum(tl.minimum(start + size, RING), newest - gone + 1), KEYS):
        seen = gone + at_key + key
        inside = (at_key + key < RING) & (seen <= newest)
        k_low, k_high = halves(ring_k, seen % RING, inside, D, HALF)
        v_low, v_high = halves(ring_v, seen % RING, inside, D, HALF)
        sees = seen[None, :] <= position[:, None]
        if SLIDING:
            sees &= seen[None, :] > position[:, None] - WINDOW
        mass = tl.where(sees, 1.0, 0.0)
        logits = _logits(q_low, q_high, k_low, k_high)
        top, total, low, high = _absorb(logits, v_low, v_high, mass, scale, top, total, low, high)

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
        logits = _memory_logits(q_low, q_high, far_low, far_high, k_low, k_high, ranks + entry, inside, limit, TRAINED)
        top, total, low, high = _absorb(logits, v_low, v_high, mass, scale, top, total, low, high)

    coarse_k = at(slots.coarse_k, slot, stride)
    coarse_v = at(slots.coarse_v, slot, stride)
    k_affine = at(slots.coarse_k_affine, slot, stride)
    v_affine = at(slots.coarse_v_affine, slot, stride)
    masses = at(slots.coarse_mass, slot, stride)
    ranks = at(slots.coarse_rank, slot, stride)
    end = tl.minimum(tl.minimum(start + size - RING - exact, coarse), gone - exact)
    for at_key in range(tl.maximum(start - RING - exact, 0), end, KEYS):
        inside = at_key + key < end
        entry = coarse_first + at_key + key
        k_low, k_high = decode(coarse_k, k_affine, entry, inside, D, HALF, KEY_BITS, DTYPE)
        v_low, v_high = decode(coarse_v, v_affine, entry, inside, D, HALF, VALUE_BITS, DTYPE)
        mass = tl.load(masses + entry, mask=inside, other=0.0)[None, :]
        logits = _memory_logits(q_low, q_high, far_low, far_high, k_low, k_high, ranks + entry, inside, limit, TRAINED)
        top, total, low, high = _absorb(logits, v_low, v_high, mass, scale, top, total, low, high)

    some = total > 0
    share = tl.where(some, 1.0 / total, 0.0)[:, None]
    if part < 0:
        target = out + ((begin + token).to(tl.int64) * out_token + query_head * out_head)[:, None] + i[None, :]
        tl.store(target, (low * share).to(DTYPE), mask=mask)
        tl.store(target + D // 2, (high * share).to(DTYPE), mask=mask)
    else:
        cell = (part.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (TOKENS * GROUP) + row
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
    new_top = tl.maximum(top, tl.max(tl.where(mass > 0, logits, float("-inf")), 1) * scale)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet
    weight = mass * tl.exp2(logits * scale - base[:, None])
    if v_low.dtype == tl.float16:
        weight = tl.minimum(weight, 65504.0)  # what fp16 holds
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weight, 1)
    weight = weight.to(v_low.dtype)
    low = tl.dot(weight, v_low, low * shrink[:, None], input_precision="ieee")
    high = tl.dot(weight, v_high, high * shrink[:, None], input_precision="ieee")
    return new_top, total, low, high


@triton.jit(do_not_specialize=ROW_ARGUMENTS + ["blocks"])
def _combine(
    out, partial, lse, first_part,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    blocks, out_token, out_head, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Join the parts of one query token and head (README.md, eq. 4). Heads of one piece are done already."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    head = tl.program_id(1)
    part = tl.load(first_part + head // GROUP)
    end = tl.load(first_part + head // GROUP + 1)
    block = tl.program_id(0) // TOKENS
    n = block
    token = 0
    if TOKENS > 1:
        n, token = locate(rows, block, TOKENS, ROWS)
        token += tl.program_id(0) % TOKENS
        if n == ROWS:
            return
    slot, begin, count, _ = row_at(rows, n)
    if (slot < 0) | (token >= count) | (part == end):
        return
    d = tl.arange(0, WIDTH)
    top = float("-inf")
    total = 0.0
    mean = tl.zeros([WIDTH], tl.float32)
    for first in range(part, end, PARTS):
        p = first + tl.arange(0, PARTS)
        cell = ((p.to(tl.int64) * blocks + block) * TOKENS + tl.program_id(0) % TOKENS) * GROUP + head % GROUP
        sums = tl.load(lse + cell, mask=p < end, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(sums))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(sums - base)
        mask = (weight > 0)[:, None] & (d < D)[None, :]
        parts = tl.load(partial + cell[:, None] * D + d[None, :], mask=mask, other=0.0)
        shrink = tl.exp2(top - base)
        mean = mean * shrink + tl.sum(weight[:, None] * parts, 0)
        total = total * shrink + tl.sum(weight)
        top = new_top
    target = out + (begin + token).to(tl.int64) * out_token + head * out_head + d
    tl.store(target, (mean / total).to(out.dtype.element_ty), mask=d < D)
