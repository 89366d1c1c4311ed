"""Triton kernels that put new tokens into the ring, and that clear the slots of new sequences."""

import torch
import triton
import triton.language as tl

from .launch import ROW_ARGUMENTS, heads_of, processors, rows_of, rows_width
from .slot import LayerSlots
from .tiles import all_rows, at, locate, part_of, row_at

TOKENS = 16  # of one program
ALL_CELLS = 1 << 30  # of a whole slot: more than a sequence has tokens
CLEARED = 4096  # words of 8 bytes that a program clears at a time


def write(
    k, v, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens,
    max_query_len: int | None = None, live_tokens: int | None = None,
) -> None:  # fmt: skip
    """See reference.write. k, v [T, G, D] may be strided in their first two dimensions.

    max_query_len and live_tokens: what the host knows of the rows that are no padding, see attend.
    """
    tokens, kv_heads, size = k.shape
    rows = rows_of(slot_indices, cu_seqlens, seq_lens)
    single = max_query_len == 1
    blocks = len(slot_indices) if single else (live_tokens or tokens) // TOKENS + len(slot_indices)
    _write[(blocks, kv_heads)](
        k, v, slots.ring_k, slots.ring_v, heads_of(slots).stride, *rows,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        CELLS=slots.ring_k.shape[2], PARTED=slots.parted, D=size, WIDTH=triton.next_power_of_2(size),
        TOKENS=1 if single else TOKENS, ROWS=rows_width(len(slot_indices)), num_warps=1 if single else 4,
    )  # fmt: skip


def reset(slab, slot_indices, cu_seqlens, seq_lens, cells: int = ALL_CELLS) -> None:
    """Zero the slots of sequences whose first token is in this call. slab [S, bytes] uint8, rows strided.

    cells: of a part, where slots are parts, of which those are zeroed that a sequence comes to.
    """
    words, rows = slab.view(torch.int64), rows_of(slot_indices, cu_seqlens, seq_lens)
    _reset[(2 * processors(slab.device),)](
        words, words.stride(0), words.shape[1], *rows,
        CELLS=cells, ROWS=rows_width(len(slot_indices)), BLOCK=CLEARED, num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def _write(
    k, v, ring_k, ring_v, stride,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    k_token, k_head, v_token, v_head,
    CELLS: tl.constexpr, PARTED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One block of a sequence's new tokens in one head."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    head = tl.program_id(1)
    n = tl.program_id(0)
    first = 0
    if TOKENS > 1:
        n, first = locate(rows, n, TOKENS, ROWS)
        if n == ROWS:
            return
    slot, begin, count, seq_len = row_at(rows, n)
    if (slot < 0) | (count <= 0):
        return
    token = first + tl.arange(0, TOKENS)
    position = seq_len - count + token
    part = part_of(rows, n, slot, position, token < count, CELLS, PARTED)
    d = tl.arange(0, WIDTH)
    mask = (token < count)[:, None] & (d < D)[None, :]
    source = (begin + token).to(tl.int64)[:, None]
    target = ((head * CELLS + position % CELLS) * D)[:, None] + d[None, :]
    key = tl.load(k + source * k_token + head * k_head + d[None, :], mask=mask)
    value = tl.load(v + source * v_token + head * v_head + d[None, :], mask=mask)
    tl.store(at(ring_k, part, stride) + target, key, mask=mask)
    tl.store(at(ring_v, part, stride) + target, value, mask=mask)


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def _reset(
    words,
    stride,
    count,
    slot_indices,
    slot_step,
    cu_seqlens,
    seq_lens,
    sequences,
    CELLS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every program clears its share of each slot that is new, and leaves at once when none is."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    slot, queries, seq_len = all_rows(rows, ROWS)
    first_part = tl.cdiv(seq_len - queries, CELLS)
    new = tl.where(slot >= 0, tl.cdiv(seq_len, CELLS) - first_part, 0)
    end = tl.cumsum(new)
    word = tl.arange(0, BLOCK)
    for i in range(tl.sum(new)):
        n = tl.sum((end <= i).to(tl.int32))
        part = tl.sum(tl.where(tl.arange(0, ROWS) == n, first_part + i - (end - new), 0))
        base = words + tl.load(slot_indices + n * slot_step + part).to(tl.int64) * stride
        for first in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
            tl.store(base + first + word, tl.zeros([BLOCK], tl.int64), mask=first + word < count)
