"""Scores and ranks of the tokens that leave the ring, and the pivots of the duels (README.md, 4 and 5)."""

import triton
import triton.language as tl

from .duels import NOWHERE, UNBOUND, held_ranks, lowest
from .launch import ROW_ARGUMENTS
from .tiles import angles, at, due_tile, halves, outgoing, pack_rank, pairs_of, rank_position, sizes, turn_back, unit


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def score(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    cos, sin, w1, b1, w2, b2, kv_heads, units, UNITS: tl.constexpr, TOKENS: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Learned importance of the outgoing tokens: a two-layer network on unit pre-RoPE keys and unit values."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    TILES: tl.constexpr = (SEGMENT + TOKENS - 1) // TOKENS
    DTYPE: tl.constexpr = slots.ring_k.dtype.element_ty
    i = tl.arange(0, HALF)[:, None]
    u = tl.arange(0, UNITS)
    slot, gone, index, tile = due_tile(rows, kv_heads * TILES, WINDOW, SEGMENT, ROWS)
    if gone == 0:
        return
    head = tile // TILES
    c = tile % TILES * TOKENS + tl.arange(0, TOKENS)
    position, live, cell = outgoing(head, gone, c, WINDOW, SEGMENT)
    live = live & (c < SEGMENT)
    field = at(slots.ring_k, slot, stride)
    low, high = halves(field, cell, live, D, HALF)
    if ROTARY > 0:
        here = angles(cos, sin, position, live, D, HALF, ROTARY, INTERLEAVED)
        low, high = turn_back(
            field, slots.coarse_k_affine, cell, live, low, high, pairs_of(slots, head, D), here,
            D, HALF, 16, DTYPE, ROTARY, INTERLEAVED,
        )  # fmt: skip
    k_low, k_high = unit(low.to(tl.float32), high.to(tl.float32))
    low, high = halves(at(slots.ring_v, slot, stride), cell, live, D, HALF)
    v_low, v_high = unit(low.to(tl.float32), high.to(tl.float32))
    weight = w1 + head * (2 * D) * units + i * units + u[None, :]
    mask = (i < D // 2) & (u < units)[None, :]
    bias = tl.load(b1 + head * units + u, mask=u < units, other=0.0)
    hidden = tl.zeros([TOKENS, UNITS], tl.float32) + bias[None, :]
    hidden = tl.dot(k_low, tl.load(weight, mask=mask, other=0.0), hidden, input_precision="tf32x3")
    weight += D // 2 * units
    hidden = tl.dot(k_high, tl.load(weight, mask=mask, other=0.0), hidden, input_precision="tf32x3")
    weight += D // 2 * units
    hidden = tl.dot(v_low, tl.load(weight, mask=mask, other=0.0), hidden, input_precision="tf32x3")
    weight += D // 2 * units
    hidden = tl.dot(v_high, tl.load(weight, mask=mask, other=0.0), hidden, input_precision="tf32x3")
    # GELU by tanh: x * (1 + tanh y) / 2 = x * sigmoid(2 y)
    hidden *= tl.sigmoid(1.5957691216057308 * (hidden + 0.044715 * hidden * hidden * hidden))
    out = tl.load(w2 + head * units + u, mask=u < units, other=0.0)
    found = tl.sum(hidden * out[None, :], 1) + tl.load(b2 + head)
    tl.store(work.score + (index * kv_heads + head) * SEGMENT + c, found, mask=c < SEGMENT)


@triton.jit
def _pair(pair, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Two columns that RoPE turns together; the columns that it leaves alone are paired up after them."""
    turned = pair < ROTARY // 2
    rest = ROTARY + pair - ROTARY // 2
    if INTERLEAVED:
        first = tl.where(turned, 2 * pair, rest)
        second = tl.where(turned, 2 * pair + 1, rest + (D - ROTARY) // 2)
    elif ROTARY == D:
        first = pair
        second = pair + D // 2
    else:
        first = tl.where(turned, pair, rest)
        second = tl.where(turned, pair + ROTARY // 2, rest + (D - ROTARY) // 2)
    return first, second


@triton.jit
def _add_keys(
    slots, stride, work, cos, sin, slot, gone, head, base, column, D: tl.constexpr, PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr, LEARNED: tl.constexpr, WINDOW: tl.constexpr, SEGMENT: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Add a few columns of all outgoing keys to key_sum, and write their part of products with the mean and norms."""
    c = tl.arange(0, SEGMENT)
    position, live, cell = outgoing(head, gone, c, WINDOW, SEGMENT)
    key = at(slots.ring_k, slot, stride) + cell[:, None] * D
    key_sum = at(slots.key_sum, slot, stride) + head * D
    pair = column * PAIRS + tl.arange(0, PAIRS)
    inside = pair < D // 2
    mask = live[:, None] & inside[None, :]
    first, second = _pair(pair, D, ROTARY, INTERLEAVED)
    a = tl.load(key + first[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(key + second[None, :], mask=mask, other=0.0).to(tl.float32)
    if ROTARY > 0:
        turned = mask & (pair < ROTARY // 2)[None, :]
        angle = position.to(tl.int64)[:, None] * (ROTARY // 2) + pair[None, :]
        cosine = tl.load(cos + angle, mask=turned, other=1.0)
        sine = tl.load(sin + angle, mask=turned, other=0.0)
        plain = a * cosine + b * sine
        b = b * cosine - a * sine
        a = plain
    sum_a = tl.load(key_sum + first, mask=inside, other=0.0) + tl.sum(a, 0)
    sum_b = tl.load(key_sum + second, mask=inside, other=0.0) + tl.sum(b, 0)
    tl.debug_barrier()  # all lanes have read the sums
    tl.store(key_sum + first, sum_a, mask=inside)
    tl.store(key_sum + second, sum_b, mask=inside)
    if not LEARNED:
        mean_a = sum_a / gone
        mean_b = sum_b / gone
        part = (base * COLUMNS + column) * SEGMENT + c
        tl.store(work.dot + part, tl.sum(a * mean_a[None, :] + b * mean_b[None, :], 1))
        tl.store(work.norm + part, tl.sum(a * a + b * b, 1))


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def prepare(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    cos, sin, kv_heads, D: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr, GROUPED: tl.constexpr, LEARNED: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Two things that ranking needs: COLUMNS parts of every head's key sums, and the lowest rank of SEGMENT groups."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    TILES: tl.constexpr = COLUMNS + SEGMENT // GROUPS
    slot, gone, index, tile = due_tile(rows, kv_heads * TILES, WINDOW, SEGMENT, ROWS)
    if gone == 0:
        return
    head = tile // TILES
    base = index * kv_heads + head
    if tile % TILES < COLUMNS:
        _add_keys(
            slots, stride, work, cos, sin, slot, gone, head, base, tile % TILES, D, PAIRS, COLUMNS, LEARNED,
            WINDOW, SEGMENT, ROTARY, INTERLEAVED,
        )  # fmt: skip
    else:
        group = (tile % TILES - COLUMNS) * GROUPS + tl.arange(0, GROUPS)
        low = lowest(slots, stride, slot, head, tl.maximum(gone - SEGMENT, 0), group, SEGMENT, GROUPED)
        tl.store(work.lowest + base * SEGMENT + group, low)


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def rank(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    kv_heads, forgetting, D: tl.constexpr, COLUMNS: tl.constexpr, SPANS: tl.constexpr,
    LEARNED: tl.constexpr, WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, TRAINED: tl.constexpr,
):  # fmt: skip
    """Rank the outgoing tokens of a head, and choose the pivots of its duels."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    slot, gone, index, head = due_tile(rows, kv_heads, WINDOW, SEGMENT, ROWS)
    if gone == 0:
        return
    base = index * kv_heads + head
    c = tl.arange(0, SEGMENT)
    position, live, _ = outgoing(head, gone, c, WINDOW, SEGMENT)
    if LEARNED:
        found = tl.load(work.score + base * SEGMENT + c)
    else:
        dot = tl.zeros([SEGMENT], tl.float32)
        norm = tl.zeros([SEGMENT], tl.float32)
        for column in tl.static_range(COLUMNS):
            dot += tl.load(work.dot + (base * COLUMNS + column) * SEGMENT + c)
            norm += tl.load(work.norm + (base * COLUMNS + column) * SEGMENT + c)
        WIDTH: tl.constexpr = triton.next_power_of_2(D)
        d = tl.arange(0, WIDTH)
        mean = tl.load(at(slots.key_sum, slot, stride) + head * D + d, mask=d < D, other=0.0) / gone
        mean_norm = tl.maximum(tl.sqrt(tl.sum(mean * mean)), 1e-12)
        found = -dot / (tl.maximum(tl.sqrt(norm), 1e-12) * mean_norm)
    if TRAINED > 0:
        found += tl.maximum(position - TRAINED, 0) * forgetting
    found = tl.where(found == found, found, float("-inf"))
    span = at(slots.pins, slot, stride) + 2 * tl.arange(0, SPANS)[None, :]
    spanned = (position[:, None] >= tl.load(span)) & (position[:, None] < tl.load(span + 1))
    pinned = (position < slots.sinks) | (tl.max(spanned.to(tl.int32), 1) > 0)
    new = tl.where(live, pack_rank(tl.where(pinned, float("inf"), found), position), 0)
    tl.store(work.rank + base * SEGMENT + c, new)
    tl.store(work.nearest + base * SEGMENT + c, tl.zeros([SEGMENT], tl.int64))

    # pivots: the newcomers, the lowest entries of most groups of coarse ones, and some of the exact entries
    left = tl.maximum(gone - SEGMENT, 0)
    _, _, _, _, held_exact, _ = sizes(slots, head, left)
    low = tl.load(work.lowest + base * SEGMENT + c)
    tl.store(work.bound + base, tl.max(low))
    sampled: tl.constexpr = SEGMENT // 4
    entry = (c.to(tl.int64) * held_exact // sampled).to(tl.int32)
    in_exact = (c < sampled) & (entry < held_exact)
    sample = held_ranks(slots, stride, slot, head, left, tl.where(in_exact, entry, NOWHERE))
    sample = tl.where((c < sampled) | (low == UNBOUND), sample, low)
    pivot = tl.sort(tl.reshape(tl.join(new, sample), (2 * SEGMENT,)), descending=True)
    age = gone - 1 - rank_position(pivot)
    is_new = (pivot != 0) & (age < SEGMENT)
    k = tl.arange(0, 2 * SEGMENT)
    tl.store(work.pivot + base * (2 * SEGMENT) + k, pivot)
    tl.store(work.fresh + base * (2 * SEGMENT) + k, tl.cumsum(is_new.to(tl.int32)) - is_new.to(tl.int32))
    tl.store(work.place + base * SEGMENT + SEGMENT - 1 - age, k, mask=is_new)
    nothing = tl.zeros([2 * SEGMENT], tl.int32)
    tl.store(work.counts + base * (4 * SEGMENT) + k, nothing)
    tl.store(work.counts + base * (4 * SEGMENT) + 2 * SEGMENT + k, nothing)
    tl.store(work.plan + base * 8 + tl.arange(0, 8), tl.zeros([8], tl.int32))
