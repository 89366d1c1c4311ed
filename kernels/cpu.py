"""The CPU's serving path: the functions of reference.py, and all of them at once for many pieces of prompts.

Results of a row never depend on which other rows share the call: how many keys a product has is fixed by the
row's own position, or the rest are hidden from it, and how many rows does not matter to it (see cpupartial.py).
`readouts`, one per layer, keep what steps before have read of the slots.
"""

from typing import NamedTuple

import numpy as np
import torch

from . import chains
from .readouts import Readouts
from .reference import left_ring
from .rows import as_bits, compiling
from .slot import LayerSlots, Policy, Rope


class Pieces(NamedTuple):
    """Pieces of B sequences, those of each in order."""

    slot: list[int]  # [B], the first of each
    begin: list[int]  # [B], tokens before its first piece
    end: list[int]  # [B], tokens up to the end of its last piece
    slots: np.ndarray  # [B, 1], or the parts that each has
    table: np.ndarray  # [N, 4], see chains.Pieces

    @classmethod
    def of(cls, steps) -> "Pieces":
        """Of steps (slot_indices, cu_seqlens, seq_lens), in each of which a slot has one piece at most."""
        parts = [np.column_stack([x.numpy() for x in (cu[:-1], cu.diff(), lens, s)]) for s, cu, lens in steps]
        rows = np.concatenate(parts).astype(np.int64)
        rows = rows[(rows[:, 3] >= 0) & (rows[:, 1] > 0)]
        rows = rows[np.argsort(rows[:, 3], kind="stable")]
        slot, first, sequence = np.unique(rows[:, 3], return_index=True, return_inverse=True)
        last = [*first[1:] - 1, len(rows) - 1][: len(slot)]
        table = np.column_stack([sequence, rows[:, 0], rows[:, 1], rows[:, 2] - rows[:, 1]])
        return cls(slot.tolist(), table[first, 3].tolist(), rows[last, 2].tolist(), rows[last, 3:], table)

    def take(self, sequences: list[int]) -> "Pieces":
        """Those of some of them, which come in this order."""
        tables = [self.table[self.table[:, 0] == i] for i in sequences]
        own = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        table = np.column_stack([own, np.concatenate(tables)[:, 1:]])
        return Pieces(*([column[i] for i in sequences] for column in self[:3]), self.slots[sequences], table)


def reset(slab, slot_indices, cu_seqlens, seq_lens, cells: int | None = None) -> list[int]:
    """Zero the slots [S, bytes] uint8 of sequences whose first token is in this batch; returns them.

    cells: of a part, where slots are parts, of which one is zeroed that a sequence comes to.
    """
    before = seq_lens - cu_seqlens.diff()
    if cells is None:
        fresh = slot_indices[(before == 0) & (seq_lens > 0) & (slot_indices >= 0)]
    else:
        part = torch.arange(slot_indices.shape[1]) * cells
        reached = (part >= before[:, None]) & (part < seq_lens[:, None]) & (slot_indices[:, :1] >= 0)
        fresh = slot_indices[reached]
    for slot in fresh.tolist():
        slab[slot].zero_()
    return fresh.tolist()


def write(k, v, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens) -> None:
    """See reference.write. The index tensors live on the CPU."""
    pieces = Pieces.of([(slot_indices, cu_seqlens, seq_lens)])
    _walk(slots, pieces, None, None, Readouts(slots), k=k, v=v)


def attend(
    q, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, scale: float, out, rope=None, sink_logits=None,
    readouts=None,
):  # fmt: skip
    """See reference.attend. Raises RuntimeError when walk() does."""
    pieces, tokens = Pieces.of([(slot_indices, cu_seqlens, seq_lens)]), dict(q=q, out=out, scale=scale)
    walk(slots, pieces, rope, None, readouts, sink_logits=sink_logits, **tokens)


def merge(slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, rope: Rope | None, policy: Policy, readouts=None):
    """See reference.merge. Raises RuntimeError when walk() does."""
    due = slot_indices.where((seq_lens % slots.segment == 0) & (seq_lens > slots.window), -1)
    walk(slots, Pieces.of([(due, cu_seqlens, seq_lens)]), rope, policy, readouts)


def walk(slots: LayerSlots, pieces: Pieces, rope, policy: Policy | None, readouts: Readouts | None = None, **tokens):
    """Of every piece in turn write, attend and merge: what is given of k, v and q, out, scale; and of a policy.

    k, v [T, G, D]; q, out [T, H, D]; sink_logits [H] or None. Sequences go together as far as there is room for
    their readouts. Raises RuntimeError when memory is short, or when PyTorch refuses the operands.
    """
    readouts = readouts or Readouts(slots)
    count, gone = len(pieces.slot), max((_memorised(slots, n) for n in pieces.end), default=0)
    most = readouts.make_room(gone) if gone else count
    if count <= most:
        _walk(slots, pieces, rope, policy, readouts, **tokens)
        return
    order = sorted(range(count), key=lambda i: pieces.slot[i] not in readouts)  # those at hand come first
    for first in range(0, count, most):
        _walk(slots, pieces.take(order[first : first + most]), rope, policy, readouts, **tokens)


def compile_walk(slots: LayerSlots, rope: Rope | None) -> None:
    """Compile what steps of this layer call, or load it from Numba's cache; slot 0 is looked at, and left as it is."""
    readouts = Readouts(slots)
    readouts.of(0, 1)
    with compiling():
        none = np.zeros((0, 1), np.int64)
        _walk(slots, Pieces([], [], [], none, np.zeros((0, 4), np.int64)), rope, None, readouts)


def _memorised(slots, tokens):
    """How many of a sequence's first tokens its memory has seen, once all merges are done."""
    return 0 if slots.sliding else left_ring(tokens + 1, slots)


def _walk(slots, pieces, rope, policy, readouts, k=None, v=None, q=None, out=None, scale=1.0, sink_logits=None):
    row, unread = np.zeros(len(pieces.slot), np.int64), np.zeros(len(pieces.slot), np.bool_)
    if q is not None or policy is not None:
        for i, (slot, *tokens) in enumerate(zip(*pieces[:3], strict=True)):
            before, after = (_memorised(slots, n) for n in tokens)
            if after:
                readout = readouts.of(slot, after, before)
                row[i], unread[i] = readout.row, policy is not None and after > before and not readout.has_plain
                readout.has_plain |= unread[i]
    layer, like = readouts.layer(rope, policy), slots.ring_k
    nothing = like.new_empty(0, *like.shape[1::2])
    tokens = [as_bits((nothing if x is None else x).contiguous()) for x in (k, v, q)]
    none = sink_logits is None
    sinks = np.full(tokens[2].shape[1], -np.inf, np.float32) if none else sink_logits.detach().float().numpy()
    tokens = chains.Tokens(*tokens, as_bits(nothing if out is None else out), float(scale), sinks)
    some = chains.Pieces(np.ascontiguousarray(pieces.slots), row, unread, pieces.table)
    chains.walk(layer, tokens, some, policy is not None, torch.get_num_threads())
