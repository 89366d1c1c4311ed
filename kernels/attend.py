"""Triton attention over memory, window and segment: split over keys, combined by log-sum-exp (README.md, 2).

A head's keys are numbered ring first, then exact, then coarse entries. The host divides those of every head into
cuts of equal size (launch.Cuts), so a head that holds eight times the mean gets eight times the programs. A
program takes one cut and one tile of query rows; the heads of a group are rows of the same tile.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .decoding import attend_token
from .launch import (
    LARGEST_SCRATCH,
    ROW_ARGUMENTS,
    Cuts,
    Heads,
    buffer,
    half_width,
    heads_of,
    processors,
    rows_of,
    rows_width,
    shared_memory,
)
from .prompt import attend_prompt, read_coarse
from .slot import LayerSlots, Rope
from .tiles import LOG2E, locate, row_at, sink_logit

INTERPRETED_KEYS = 16
READ = 512 << 20  # bytes of decoded entries that a call keeps for the prompts it works on
READ_ENTRIES = 64  # that a program decodes
PARTED_CUT = 2048  # keys of a program at most where a sequence has parts: most are far shorter than they may get


class Tile(NamedTuple):
    """Shape of a program: query rows, keys at a time, warps, pipeline stages, programs per multiprocessor."""

    rows: int
    keys: int
    warps: int
    stages: int
    resident: int


TOKEN = Tile(16, 64, 2, 2, 4)  # few warps: each scale of a code then serves more columns of a lane
PROMPT = Tile(64, 64, 4, 3, 2)
REGISTER_PROMPT = Tile(128, 32, 8, 3, 1)  # where operands of a product lie in registers: there the other one spills
OPERANDS_IN_MEMORY = (9, 10)  # major capabilities whose products read shared memory; those of 12 do not


class Call(NamedTuple):
    """What attention is over, and how it is launched."""

    q: torch.Tensor
    out: torch.Tensor
    slots: LayerSlots
    heads: Heads
    scale: float  # includes log2(e): softmax is in base 2
    angles: tuple[torch.Tensor, torch.Tensor]  # cos and sin, any tensors where no key can be far
    turn: dict  # constants of the kernels that say how angles are read
    sink_logits: torch.Tensor  # [H], any tensor where there are none
    sunk: bool  # whether there are

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.slots.ring_k.shape[1]

    @property
    def strides(self) -> tuple[int, int, int, int]:
        return *self.q.stride()[:2], *self.out.stride()[:2]


def attend(
    q, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, scale: float, out, rope: Rope | None = None,
    sink_logits: torch.Tensor | None = None, max_query_len: int | None = None, live_tokens: int | None = None,
    max_seq_len: int | None = None,
) -> None:  # fmt: skip
    """See reference.attend. q, out [T, H, D] may be strided in their first two dimensions.

    What the host knows of the rows that are no padding: max_query_len and max_seq_len, upper bounds of their
    tokens and of their sequences' lengths (max_query_len 1 takes the kernel for single tokens), and live_tokens,
    one of the sum of their tokens (T where it is not given).
    """
    angles, turn = (q, q), dict(TRAINED=0, ROTARY=0, INTERLEAVED=False)
    if rope is not None and rope.trained and not slots.sliding:
        angles = rope.cos, rope.sin
        turn = dict(TRAINED=rope.trained, ROTARY=2 * rope.cos.shape[1], INTERLEAVED=rope.interleaved)
    sinks = q if sink_logits is None else sink_logits
    call = Call(q, out, slots, heads_of(slots), scale * LOG2E, angles, turn, sinks, sink_logits is not None)
    if max_query_len == 1:
        _attend_tokens(call, (slot_indices, cu_seqlens, seq_lens))
        return
    rows, live_tokens = (slot_indices, cu_seqlens, seq_lens), live_tokens or q.shape[0]
    if not _is_coded(slots) or (max_seq_len is not None and max_seq_len - slots.window <= min(call.heads.exact)):
        _attend_prompts(call, rows, live_tokens, q.new_empty(2, 0, 0))
        return
    together = _together(slots)
    for first in range(0, len(slot_indices), together):
        some = slot_indices[first:][:together], cu_seqlens[first:][: together + 1], seq_lens[first:][:together]
        _attend_prompts(call, some, live_tokens, _read(call, some))


def reserve_attention(layers: list[LayerSlots], sequences: int, device: torch.device) -> None:
    """Take the scratch of calls with up to so many rows, padding among them, on layers like these, of any device."""
    partial = LARGEST_SCRATCH // torch.float32.itemsize
    buffer("partial", (partial,), torch.float32, device)
    buffer("lse", (partial // min(slots.ring_k.shape[3] for slots in layers),), torch.float32, device)
    coded = [slots for slots in layers if _is_coded(slots)]
    if coded:
        read = max(min(_together(slots), sequences) * slots.coarse_rank.shape[1] for slots in coded)
        buffer("read", (2, read, coded[0].ring_k.shape[3]), coded[0].ring_k.dtype, device)


def _is_coded(slots: LayerSlots) -> bool:
    """Whether there are codes, which prompts read decoded."""
    return slots.codec.key_bits < 16 and not slots.sliding


def _together(slots: LayerSlots) -> int:
    """Sequences whose entries are decoded at a time."""
    vectors = 2 * slots.coarse_rank.shape[1] * slots.ring_k.shape[3]
    return max(READ // max(vectors * slots.ring_k.element_size(), 1), 1)


def _attend_tokens(call: Call, rows: tuple) -> None:
    """One query token per sequence: programs are tiles of a head's keys."""
    slots, count = call.slots, len(rows[0])
    tile, size = _fit(TOKEN, call), call.q.shape[2]
    cuts, partial, lse = _cuts(call, tile, count, 1)
    attend_token[(count, len(cuts.table))](
        call.q, call.out, partial, lse, slots, call.heads.stride, cuts.table, cuts.size, *rows_of(*rows),
        call.scale, *call.strides, *call.angles, call.sink_logits, **call.turn, **_slot_constants(slots),
        SUNK=call.sunk, SLIDING=slots.sliding,
        **_ring_constants(slots), HALF=half_width(size), TILE=tile.rows, KEYS=tile.keys, KEY_BITS=slots.codec.key_bits,
        VALUE_BITS=slots.codec.value_bits, GROUP=call.group, D=size, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    _combine_parts(call, rows, cuts, partial, lse, count)


def _read(call: Call, rows: tuple) -> torch.Tensor:
    """Decoded coarse keys and values of the sequences, [2, N, Y, D] in the model's dtype, where something is held."""
    slots, size = call.slots, call.q.shape[2]
    read = buffer("read", (2, len(rows[0]), slots.coarse_rank.shape[1], size), call.q.dtype, call.q.device)
    tiles = call.heads.tiles(call.heads.coarse, READ_ENTRIES)
    read_coarse[(len(tiles), len(rows[0]))](
        slots, call.heads.stride, *read, tiles, *rows_of(*rows), read.shape[2], ENTRIES=READ_ENTRIES, D=size,
        HALF=half_width(size), KEY_BITS=slots.codec.key_bits, VALUE_BITS=slots.codec.value_bits,
        **_slot_constants(slots), num_warps=4,
    )  # fmt: skip
    return read


def _attend_prompts(call: Call, rows: tuple, live_tokens: int, read: torch.Tensor) -> None:
    """Pieces of prompts: programs are tiles of query rows over tiles of a head's keys."""
    slots, size = call.slots, call.q.shape[2]
    tile = _fit(PROMPT if _capability() // 10 in OPERANDS_IN_MEMORY else REGISTER_PROMPT, call)
    tokens = tile.rows // call.group
    blocks = live_tokens // tokens + len(rows[0])
    cuts, partial, lse = _cuts(call, tile, blocks, tokens)
    attend_prompt[(blocks, len(cuts.table))](
        call.q, call.out, partial, lse, slots, call.heads.stride, *read, slots.coarse_rank.shape[1],
        cuts.table, cuts.size, *rows_of(*rows), call.scale, *call.strides, *call.angles, call.sink_logits, **call.turn,
        **_slot_constants(slots), **_ring_constants(slots), SUNK=call.sunk, SLIDING=slots.sliding,
        WIDTH=max(16, triton.next_power_of_2(size)),
        TILE=tile.rows, KEYS=tile.keys, CODED=slots.codec.key_bits < 16, GROUP=call.group, D=size, TOKENS=tokens,
        ROWS=rows_width(len(rows[0])), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    _combine_parts(call, rows, cuts, partial, lse, blocks, tokens)


def _cuts(call: Call, tile: Tile, blocks: int, tokens: int) -> tuple[Cuts, torch.Tensor, torch.Tensor]:
    """The cut of the heads' keys for so many blocks of query tokens, and buffers for the parts and their lse."""
    size, rows = call.q.shape[2], tokens * call.group
    ring = call.slots.window + call.slots.segment
    counts = tuple(ring + capacity for capacity in call.heads.capacities)
    resident = processors(call.q.device) * tile.resident
    most = PARTED_CUT if call.slots.parted else None
    cuts = call.heads.cuts(counts, tile.keys, blocks, resident, rows * size * 4, most)
    shape = (cuts.parts, blocks, rows)
    partial = buffer("partial", (*shape, size), torch.float32, call.q.device)
    return cuts, partial, buffer("lse", shape, torch.float32, call.q.device)


def _combine_parts(call: Call, rows: tuple, cuts: Cuts, partial, lse, blocks: int, tokens: int | None = None) -> None:
    """tokens: of prompts in a block; None where every sequence has one, and is a block."""
    if cuts.parts:
        single, size = tokens is None, call.q.shape[2]
        tokens = tokens or 1
        _combine[(blocks * tokens, call.q.shape[1])](
            call.out, partial, lse, cuts.first_part, *rows_of(*rows), blocks, *call.out.stride()[:2], call.sink_logits,
            SUNK=call.sunk, WIDTH=triton.next_power_of_2(size), PARTS=64 if single else 8, GROUP=call.group, D=size,
            TOKENS=tokens, ROWS=rows_width(len(rows[0])), PROMPTS=not single, num_warps=4 if single else 1,
        )  # fmt: skip


def _slot_constants(slots: LayerSlots) -> dict:
    return dict(WINDOW=slots.window, SEGMENT=slots.segment)


def _ring_constants(slots: LayerSlots) -> dict:
    return dict(CELLS=slots.ring_k.shape[2], PARTED=slots.parted)


@cache
def _capability() -> int:
    """Ten times the compute capability of the GPU; an H100's where kernels are interpreted."""
    if triton.knobs.runtime.interpret:
        return 90
    return triton.runtime.driver.active.get_current_target().arch


def _fit(tile: Tile, call: Call) -> Tile:
    """The tile with rows for a group at least, and so few keys, stages and rows that it fits in shared memory."""
    if triton.knobs.runtime.interpret:
        tile = tile._replace(keys=INTERPRETED_KEYS)
    group = triton.next_power_of_2(call.group)
    tile = tile._replace(rows=max(tile.rows, group))
    vector, queries = triton.next_power_of_2(call.q.shape[2]) * call.q.element_size(), 2 if call.turn["TRAINED"] else 1
    if vector > 256:  # more registers, too, for the same rows
        tile = tile._replace(warps=2 * tile.warps, resident=max(tile.resident // 2, 1))
    room = shared_memory(call.q.device)
    while vector * (queries * tile.rows + 2 * tile.keys * tile.stages) > room:
        if tile.keys > 16:
            tile = tile._replace(stages=tile.stages - 1) if tile.stages > 2 else tile._replace(keys=tile.keys // 2)
        elif tile.rows > max(group, 16):
            tile = tile._replace(rows=tile.rows // 2)
        else:
            break  # as small as it gets: Triton says what it lacks
    return tile


@triton.jit(do_not_specialize=ROW_ARGUMENTS + ["blocks"])
def _combine(
    out, partial, lse, first_part,
    slot_indices, slot_step, cu_seqlens, seq_lens, sequences,
    blocks, out_token, out_head, sink_logits, SUNK: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    PROMPTS: tl.constexpr,
):  # fmt: skip
    """Combine the parts of one query token and head (README.md, eq. 4). Heads of one cut are done already."""
    rows = (slot_indices, slot_step, cu_seqlens, seq_lens, sequences)
    head = tl.program_id(1)
    part = tl.load(first_part + head // GROUP)
    end = tl.load(first_part + head // GROUP + 1)
    block = tl.program_id(0) // TOKENS
    n = block
    token = 0
    if PROMPTS:
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
    if SUNK:
        top = sink_logit(sink_logits, head, head >= 0)
        total = 1.0
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
