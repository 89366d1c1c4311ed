"""The CPU's serving path: the functions of reference.py, vectorised over heads, entries and tokens.

Results of a row never depend on which other rows share the call: how many keys a product has is fixed by the
row's own position, and how many rows does not matter to it (see cpupartial.py, and KEY_BLOCK in readout.py).
`readouts`, one per layer, keep what steps before have read of the slots.
"""

from contextlib import nullcontext
from functools import lru_cache
from math import lcm

import torch

from .arrays import MASKED
from .cpucombine import combine
from .cpumerge import merge_slot
from .cpupartial import one_thread, partial_attention, row_block
from .readouts import Readouts
from .reference import _rows, far_limit, far_query, left_ring
from .slot import LayerSlots, Policy, Rope


def reset(slab, slot_indices, cu_seqlens, seq_lens) -> list[int]:
    """Zero the slots [S, bytes] uint8 of sequences whose first token is in this batch; returns them."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    fresh = slot_indices[(lengths > 0) & (lengths == seq_lens) & (slot_indices >= 0)].tolist()
    for slot in fresh:
        slab[slot].zero_()
    return fresh


def write(k, v, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens) -> None:
    """See reference.write. The index tensors live on the CPU."""
    ring, rows = slots.ring_k.shape[2], tuple(_rows(slot_indices, cu_seqlens, seq_lens))
    if rows and all(end - begin == 1 for _, begin, end, _ in rows):
        tokens, held, cells = _single_cells(rows, ring)
        slots.ring_k[held, :, cells], slots.ring_v[held, :, cells] = k[tokens], v[tokens]
        return
    with one_thread():  # another one, once awake, keeps its core busy for a while: helpers need it
        for slot, begin, end, seq_len in rows:
            for cells, tokens in _cells(seq_len - (end - begin), end - begin, ring):
                slots.ring_k[slot, :, cells] = k[begin:end][tokens].transpose(0, 1)
                slots.ring_v[slot, :, cells] = v[begin:end][tokens].transpose(0, 1)


def attend(
    q, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, scale: float, out, rope=None, readouts=None, helpers=None
) -> None:
    """See reference.attend. Single-token rows go through together, longer rows in calls of their own.

    helpers: may attend to the longer rows from copies of what these see now; `out` is whole when they have finished.
    """
    readouts = readouts or Readouts(slots)
    rows = sorted(_rows(slot_indices, cu_seqlens, seq_lens))  # slots that follow one another are read in place
    single = [(slot, begin, seq_len) for slot, begin, end, seq_len in rows if end - begin == 1]
    if single:
        _attend_single(q, slots, single, scale, out, rope, readouts)
    with one_thread() if helpers else nullcontext():  # the other cores are theirs
        for slot, begin, end, seq_len in rows:
            if end - begin > 1:
                _attend_piece(q[begin:end], slots, slot, seq_len, scale, out[begin:end], rope, readouts, helpers)


def merge(slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, rope: Rope | None, policy: Policy, readouts=None):
    """See reference.merge."""
    if slots.sliding:
        return
    readouts = readouts or Readouts(slots)
    for slot, _, _, seq_len in _rows(slot_indices, cu_seqlens, seq_lens):
        gone = seq_len - slots.window
        if seq_len % slots.segment or gone <= 0:
            continue
        first = max(gone - slots.segment, 0)  # the first segment to leave is a shorter one if the window is no multiple
        with one_thread():
            readout = readouts.of(slot, gone)
            limit = far_limit(seq_len + 1, slots, rope)
            readout.prepare_merge(rope._replace(limit=limit) if limit else rope, policy)
            merge_slot(slots, first, gone, policy, readout)


def _cells(first, count, ring):
    """(ring cells, which of `count` positions from `first` on they hold): slices, two of each where the cells wrap."""
    cell = first % ring
    fit = min(count, ring - cell)
    runs = [(slice(cell, cell + fit), slice(0, fit))]
    return runs if fit == count else [*runs, (slice(0, count - fit), slice(fit, count))]


def _local_mask(first, last, window, segment, sliding):
    """0 or MASKED for queries at positions first..last of one sequence over the ring cells, [T, L]."""
    ring = window + segment
    whole = lcm(ring, segment)  # so far on, cells and segments lie as they did
    turns = max((first - ring) // whole, 0) * whole
    return _mask(first - turns, last - turns, window, segment, sliding)


@lru_cache(maxsize=16)  # the layers of a step ask for the same one, or two
def _mask(first, last, window, segment, sliding):
    ring, position = window + segment, torch.arange(first, last + 1)[:, None]
    held = last - (last - torch.arange(ring)) % ring  # the newest token that each cell can hold
    begin = position - window + 1 if sliding else position // segment * segment - window
    begin = begin.clamp(min=0)
    return torch.zeros(len(position), ring).masked_fill_((held > position) | (held < begin), MASKED)


def _attend_single(q, slots, single, scale, out, rope, readouts):
    """One query token per sequence: single is a list of (slot, row of q, seq_len)."""
    kv_heads = slots.ring_k.shape[1]
    tokens, held, mask = _single_tables(tuple(single), slots.window, slots.segment, slots.sliding)
    query = _whole_blocks(q[tokens].view(len(single), kv_heads, -1, q.shape[2]), row_block(q))
    near, lse = partial_attention(query, slots.ring_k[held], slots.ring_v[held], mask, scale)
    near, lse, alike = near.contiguous(), lse.contiguous(), {}
    for i, (slot, row, seq_len) in enumerate(single):
        gone = 0 if slots.sliding else left_ring(seq_len, slots)
        if gone and len(single) > 1 and not far_limit(seq_len, slots, rope):
            alike[slot] = i, gone
            continue
        this = slice(row, row + 1)
        calls = _memory_calls(q[this], query[i, :, None], slots, slot, seq_len, rope, readouts)
        combine(near[i : i + 1], lse[i, :, None], _partials(calls, scale), out[this])
    for wave in readouts.waves({slot: gone for slot, (_, gone) in alike.items()}):
        members, gone = zip(*(alike[readout.slot] for readout in wave), strict=True)
        at, rows = _index(members), _index(tuple(single[i][1] for i in members))
        seen = _attend_together(query[at], out.shape[1] // kv_heads, readouts.parts(wave, gone), scale)
        target = out[rows]
        combine(near[at], lse[at].transpose(0, 1).contiguous(), [seen], target)
        if not isinstance(rows, slice):  # a copy
            out[rows] = target


def _attend_together(query, group, parts, scale):
    """What N single tokens [N, G, R or more, D] see in their memories: partial [1, G, R * N, D], log-sum-exp."""
    n, kv_heads, _, size = query.shape
    seen, lse = query.new_empty(kv_heads, group, n, size), query.new_empty(kv_heads, group, n, dtype=torch.float)
    for sequences, heads, *entries in parts:
        part, part_lse = partial_attention(query[sequences, heads], *entries, scale)
        seen[heads, :, sequences] = part[:, :, :group].permute(1, 2, 0, 3)
        lse[heads, :, sequences] = part_lse[:, :, :group].permute(1, 2, 0)
    return seen.view(1, kv_heads, -1, size), lse.view(1, kv_heads, -1)


@lru_cache(maxsize=4)  # the layers of a step ask for the same ones, or for two
def _single_tables(single, window, segment, sliding):
    """Rows of q, slots, and masks [N, 1, 1, L] of single tokens, see _attend_single."""
    slots, rows, seq_lens = zip(*single, strict=True)
    mask = torch.stack([_local_mask(n - 1, n - 1, window, segment, sliding) for n in seq_lens])
    return _index(rows), _index(slots), mask[:, None]


@lru_cache(maxsize=4)
def _single_cells(rows, ring):
    """Rows of k and v, slots and ring cells of single tokens."""
    slots, tokens, _, seq_lens = zip(*rows, strict=True)
    return _index(tokens), torch.tensor(slots), (torch.tensor(seq_lens) - 1) % ring


def _index(places: tuple[int, ...]) -> slice | torch.Tensor:
    """A slice where places follow one another, as most do while sequences decode: a view instead of a copy."""
    run = range(places[0], places[0] + len(places))
    return slice(run.start, run.stop) if places == tuple(run) else torch.tensor(places)


def _attend_piece(q, slots, slot, seq_len, scale, out, rope, readouts, helpers):
    """A run of query tokens of one sequence, all inside one segment: q [T, H, D]."""
    kv_heads = slots.ring_k.shape[1]
    mask = _local_mask(seq_len - len(q), seq_len - 1, slots.window, slots.segment, slots.sliding)[None, None]
    ring = slots.ring_k[slot, :, None], slots.ring_v[slot, :, None]
    calls = _memory_calls(q, _side_by_side(q, kv_heads), slots, slot, seq_len, rope, readouts)
    if helpers:  # what they read must stay as it is
        ring = [x.clone() for x in ring]
        calls = [(rows, *(x.clone() for x in entries)) for rows, *entries in calls]
    query, mask = (_whole_blocks(x, row_block(q)) for x in (_by_head(q, kv_heads), mask))
    near = query, *(x.expand(-1, query.shape[1], -1, -1) for x in ring), mask

    def see():
        (part, lse), *memory = _partials([near, *calls], scale)
        combine(part.permute(2, 0, 1, 3)[: len(q)].contiguous(), lse.transpose(1, 2).contiguous(), memory, out)

    if helpers:
        helpers.submit(see)
    else:
        see()


def _by_head(q, kv_heads):
    """[T, H, D] seen as [G, R, T, D]."""
    return q.view(len(q), kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3)


def _side_by_side(q, kv_heads):
    """Queries [T, H, D] as [G, 1, R * T, D] in whole blocks: the heads of a group see the same entries."""
    return _whole_blocks(_by_head(q, kv_heads).reshape(kv_heads, 1, -1, q.shape[2]), row_block(q))


def _memory_calls(q, rows, slots, slot, seq_len, rope, readouts):
    """What partial_attention takes for queries [T, H, D] at the end of a sequence to see its memory.

    Near entries of all heads, and where there are far ones those of all heads in a second pass.
    rows: q side by side.
    """
    gone, limit = left_ring(seq_len, slots), far_limit(seq_len, slots, rope)
    if not gone or slots.sliding:
        return []
    readout = readouts.of(slot, gone)
    if not limit:
        return _by_entries(rows, readout.runs(gone))
    far = readout.far(limit)
    turned = _side_by_side(far_query(q, torch.arange(seq_len - len(q), seq_len), rope), len(rows))
    return _by_entries(rows, readout.runs(gone, far)) + _by_entries(turned, readout.runs(gone, ~far))


def _by_entries(rows, runs):
    """Queries [1, P, R * T, D] and entries of each run of heads, see Readout.runs."""
    queries = rows.transpose(0, 1).split([k.shape[1] for k, _, _ in runs], 1)
    return [(query, *entries) for query, entries in zip(queries, runs, strict=True)]


def _partials(calls, scale):
    return [partial_attention(*call, scale) for call in calls]


def _whole_blocks(x, block):
    """x [B, P, T, ...] with empty rows up to a multiple of `block`."""
    spare = -x.shape[2] % block
    return torch.nn.functional.pad(x, (0, 0, 0, spare)) if spare else x
