"""Merging in Triton: the oldest segment leaves the ring, as reference.merge defines it (README.md, 4 to 6).

Seven launches, one more with a learned score and one more past the trained context, each over (sequence, head)
and, where it pays, over entries. The number of programs is fixed; they share the sequences that complete a segment,
and end at once when there is none.

The ring cells of the outgoing segment serve as the list of tokens that look for a place: whatever an entry
gives up takes the cell of the token that won it. After a merge they hold no tokens of the ring.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .demote import demote
from .duels import count, held_ranks, order, pick, sizes
from .exchange import exchange
from .launch import ROW_ARGUMENTS, buffer, half_width, heads_of, processors, rows_of, rows_width
from .nearest import apply, nearest
from .slot import LayerSlots, Policy, Rope, forgetting
from .tiles import angles, at, due_row, due_rows, halves, mates, outgoing, pack_rank, rank_position, unit

ENTRIES = 1024  # entries of a program that counts or picks
PARTS = 8  # programs that order the picked entries of one tier of one head
ORDERED, COMPARED = 32, 128  # picked entries of a tile, and those it is compared with at a time
CELLS = 16  # of a program that exchanges
TURNED = 64  # entries of a program that turns what becomes far
TARGETS, LOSERS = 128, 64  # entries and losers of a tile of the nearest search
SCORED = 16  # tokens of a tile of the learned score


class Work(NamedTuple):
    """Scratch of a merge. Tensors of the outgoing segment's C tokens are indexed by their cell's order."""

    score: torch.Tensor  # [S, G, C] fp32, of the learned importance
    rank: torch.Tensor  # [S, G, C] int64, of what each cell holds
    mass: torch.Tensor  # [S, G, C] fp32
    unit: torch.Tensor  # [S, G, C, 2, HALF] what the cells hold: pre-RoPE, centred, norm 1
    nearest: torch.Tensor  # [S, G, C] int64, pack_rank(cosine, entry) of the nearest coarse entry
    pivot: torch.Tensor  # [S, G, 2C] int64, ranks of newcomers and of sampled entries, highest first
    fresh: torch.Tensor  # [S, G, 2C] int32, newcomers among the pivots before this one
    counts: torch.Tensor  # [S, G, 2, 2C] int32, exact and coarse entries between this pivot and the next lower
    under: torch.Tensor  # [S, G, 2C] int32, exact entries below this pivot
    plan: torch.Tensor  # [S, G, 8] int32, see duels.py
    picked: torch.Tensor  # [S, X + Y] int32, entries of a head that may lose, in no order
    losing: torch.Tensor  # [S, G, 2, C] int32, exact and coarse entries that lose, worst first


def merge(
    slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, rope: Rope | None, policy: Policy,
    max_seq_len: int | None = None,
) -> None:  # fmt: skip
    """See reference.merge.

    max_seq_len: an upper bound of the sequences' lengths, if the host knows one; while no head overflows it saves
    the search for the nearest entries.
    """
    if slots.sliding:
        return
    kv_heads, _, size = slots.ring_k.shape[1:]
    rows, heads, device = rows_of(slot_indices, cu_seqlens, seq_lens), heads_of(slots), slots.ring_k.device
    held, programs = slots.exact_rank.shape[1] + slots.coarse_rank.shape[1], processors(device)
    work = _work(len(slots.ring_k), kv_heads, slots.segment, size, held, slots.ring_k.dtype, device)
    cos, sin = (rope.cos, rope.sin) if rope else (slots.key_sum, slots.key_sum)
    turn = dict(ROTARY=2 * rope.cos.shape[1] if rope else 0, INTERLEAVED=bool(rope and rope.interleaved))
    lies = dict(TRAINED=rope.trained if rope else 0, **turn)
    segment = dict(WINDOW=slots.window, SEGMENT=slots.segment, ROWS=rows_width(slot_indices))
    shape = dict(D=size, HALF=half_width(size), **segment)
    bits = dict(KEY_BITS=slots.codec.key_bits, VALUE_BITS=slots.codec.value_bits)
    common = (slots, heads.stride, work, *rows)
    entries = heads.tiles(tuple(heads.held), ENTRIES)

    if lies["TRAINED"]:
        turned = heads.tiles(tuple(heads.held), TURNED)
        demote[(4 * programs,)](
            slots, heads.stride, *rows, cos, sin, turned, len(turned),
            ENTRIES=TURNED, KEY_BITS=bits["KEY_BITS"], **shape, **lies, num_warps=4,
        )  # fmt: skip
    if policy.importance is not None:
        weights = [w.contiguous() for w in policy.importance]
        units = weights[0].shape[2]
        _score[(2 * programs,)](
            *common, cos, sin, *weights, kv_heads, units, UNITS=max(16, triton.next_power_of_2(units)),
            TOKENS=max(16, min(SCORED, slots.segment)), **shape, **turn, num_warps=4, num_stages=1,
        )  # fmt: skip
    _rank[(programs,)](
        *common, cos, sin, kv_heads, forgetting(rope, policy), D=size, PAIRS=min(16, triton.next_power_of_2(size // 2)),
        SPANS=slots.pins.shape[1], LEARNED=policy.importance is not None, **segment, **lies, num_warps=8,
    )  # fmt: skip
    count[(4 * programs,)](*common, kv_heads, entries, len(entries), ENTRIES=ENTRIES, **segment, num_warps=4)
    pick[(4 * programs,)](*common, kv_heads, entries, len(entries), ENTRIES=ENTRIES, **segment, num_warps=4)
    order[(4 * programs,)](*common, kv_heads, PARTS=PARTS, ORDERED=ORDERED, COMPARED=COMPARED, **segment, num_warps=4)
    exchange[(4 * programs,)](
        *common, cos, sin, kv_heads, CELLS=min(CELLS, slots.segment), **shape, **lies, **bits, num_warps=4
    )
    if max_seq_len is not None and max_seq_len - slots.window <= min(heads.held):
        return
    targets = heads.tiles(heads.coarse, TARGETS)
    nearest[(2 * programs,)](
        *common, cos, sin, kv_heads, targets, len(targets), TARGETS=TARGETS, LOSERS=max(16, min(LOSERS, slots.segment)),
        KEY_BITS=bits["KEY_BITS"], **shape, **lies, num_warps=8,
    )  # fmt: skip
    apply[(16 * programs,)](*common, cos, sin, policy.gate.contiguous(), kv_heads, **shape, **lies, **bits, num_warps=1)


@cache
def _work(slots: int, kv_heads: int, segment: int, size: int, held: int, dtype: torch.dtype, device) -> Work:
    """Scratch for layers of that many slots whose heads hold `held` entries together."""
    cells, pivots = (slots, kv_heads, segment), (slots, kv_heads, 2 * segment)
    operand = torch.float32 if dtype == torch.float32 else torch.float16  # of unit vectors: finer than bf16
    shapes = Work(
        score=(cells, torch.float32),
        rank=(cells, torch.int64),
        mass=(cells, torch.float32),
        unit=((*cells, 2, half_width(size)), operand),
        nearest=(cells, torch.int64),
        pivot=(pivots, torch.int64),
        fresh=(pivots, torch.int32),
        counts=((slots, kv_heads, 2, 2 * segment), torch.int32),
        under=(pivots, torch.int32),
        plan=((slots, kv_heads, 8), torch.int32),
        picked=((slots, held), torch.int32),
        losing=((slots, kv_heads, 2, segment), torch.int32),
    )
    return Work(*(buffer(name, *shape, device) for name, shape in zip(Work._fields, shapes, strict=True)))


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def _score(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    cos, sin, w1, b1, w2, b2, kv_heads, units, UNITS: tl.constexpr, TOKENS: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Learned importance of the outgoing tokens: a two-layer network on unit pre-RoPE keys and unit values."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    row_order, due = due_rows(rows, WINDOW, SEGMENT, ROWS)
    TILES: tl.constexpr = (SEGMENT + TOKENS - 1) // TOKENS
    DTYPE: tl.constexpr = slots.ring_k.dtype.element_ty
    i = tl.arange(0, HALF)[:, None]
    u = tl.arange(0, UNITS)
    for item in range(tl.program_id(0), due * kv_heads * TILES, tl.num_programs(0)):
        slot, gone = due_row(rows, row_order, item // (kv_heads * TILES), WINDOW, ROWS)
        head = item // TILES % kv_heads
        c = item % TILES * TOKENS + tl.arange(0, TOKENS)
        position, live, cell = outgoing(head, gone, c, WINDOW, SEGMENT)
        live = live & (c < SEGMENT)
        field = at(slots.ring_k, slot, stride)
        low, high = halves(field, cell, live, D, HALF)
        if ROTARY > 0:
            mate_low, mate_high = mates(
                field, slots.coarse_k_affine, cell, live, low, high, D, HALF, 16, DTYPE, ROTARY, INTERLEAVED
            )
            cos_low, sin_low, cos_high, sin_high = angles(cos, sin, position, live, D, HALF, ROTARY, INTERLEAVED)
            low = low * cos_low - mate_low * sin_low
            high = high * cos_high - mate_high * sin_high
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
        score = tl.sum(hidden * out[None, :], 1) + tl.load(b2 + head)
        tl.store(work.score + (slot * kv_heads + head) * SEGMENT + c, score, mask=c < SEGMENT)


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


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def _rank(
    slots, stride, work,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    cos, sin, kv_heads, forgetting, D: tl.constexpr, PAIRS: tl.constexpr, SPANS: tl.constexpr,
    LEARNED: tl.constexpr, WINDOW: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, TRAINED: tl.constexpr,
):  # fmt: skip
    """Add the outgoing keys to key_sum, rank the tokens, and choose the pivots of the duels: one program per head.

    Goes over columns, all tokens at once, so that every key is read once: a column's part of the mean is known
    when its part of the cosines is added up.
    """
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    row_order, due = due_rows(rows, WINDOW, SEGMENT, ROWS)
    c = tl.arange(0, SEGMENT)
    for item in range(tl.program_id(0), due * kv_heads, tl.num_programs(0)):
        slot, gone = due_row(rows, row_order, item // kv_heads, WINDOW, ROWS)
        head = item % kv_heads
        base = slot * kv_heads + head
        position, live, cell = outgoing(head, gone, c, WINDOW, SEGMENT)
        key = at(slots.ring_k, slot, stride) + cell[:, None] * D
        key_sum = at(slots.key_sum, slot, stride) + head * D
        dot = tl.zeros([SEGMENT], tl.float32)
        norm = tl.zeros([SEGMENT], tl.float32)
        mean_norm = 0.0
        for start in range(0, D // 2, PAIRS):
            pair = start + tl.arange(0, PAIRS)
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
            mean_a = sum_a / gone
            mean_b = sum_b / gone
            dot += tl.sum(a * mean_a[None, :] + b * mean_b[None, :], 1)
            norm += tl.sum(a * a + b * b, 1)
            mean_norm += tl.sum(mean_a * mean_a + mean_b * mean_b)
        if LEARNED:
            score = tl.load(work.score + base * SEGMENT + c)
        else:
            score = -dot / (tl.maximum(tl.sqrt(norm), 1e-12) * tl.maximum(tl.sqrt(mean_norm), 1e-12))
        if TRAINED > 0:
            score += tl.maximum(position - TRAINED, 0) * forgetting
        score = tl.where(score == score, score, float("-inf"))
        span = at(slots.pins, slot, stride) + 2 * tl.arange(0, SPANS)[None, :]
        spanned = (position[:, None] >= tl.load(span)) & (position[:, None] < tl.load(span + 1))
        pinned = (position < slots.sinks) | (tl.max(spanned.to(tl.int32), 1) > 0)
        rank = tl.where(live, pack_rank(tl.where(pinned, float("inf"), score), position), 0)
        tl.store(work.rank + base * SEGMENT + c, rank)
        tl.store(work.nearest + base * SEGMENT + c, tl.zeros([SEGMENT], tl.int64))

        # pivots: the newcomers, and as many entries spread evenly over those that are held
        left = tl.maximum(gone - SEGMENT, 0)
        _, _, _, _, held_exact, held_coarse = sizes(slots, head, left)
        entry = (c.to(tl.int64) * (held_exact + held_coarse) // SEGMENT).to(tl.int32)
        sample = held_ranks(slots, stride, slot, head, left, entry)
        pivot = tl.sort(tl.reshape(tl.join(rank, sample), (2 * SEGMENT,)), descending=True)
        is_new = ((pivot != 0) & (rank_position(pivot) >= gone - SEGMENT)).to(tl.int32)
        k = tl.arange(0, 2 * SEGMENT)
        tl.store(work.pivot + base * (2 * SEGMENT) + k, pivot)
        tl.store(work.fresh + base * (2 * SEGMENT) + k, tl.cumsum(is_new) - is_new)
        nothing = tl.zeros([2 * SEGMENT], tl.int32)
        tl.store(work.counts + base * (4 * SEGMENT) + k, nothing)
        tl.store(work.counts + base * (4 * SEGMENT) + 2 * SEGMENT + k, nothing)
        tl.store(work.plan + base * 8 + tl.arange(0, 8), tl.zeros([8], tl.int32))
