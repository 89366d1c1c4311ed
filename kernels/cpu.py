"""The CPU's serving path: the functions of reference.py, and all of them at once for many pieces of prompts.

Results of a row never depend on which other rows share the call: how many keys a product has is fixed by the
row's own position, and how many rows does not matter to it (see cpupartial.py, and KEY_BLOCK in grid.py).
`readouts`, one per layer, keep what steps before have read of the slots.
"""

from typing import NamedTuple

import numpy as np
import torch

from . import chains
from .cpupartial import way_of
from .grid import Grid, far_limit
from .readouts import Readouts
from .rows import as_bits
from .slot import LayerSlots, Policy, Rope


class Pieces(NamedTuple):
    """Pieces of B sequences, of each in order."""

    slot: np.ndarray  # [B]
    seq_len: np.ndarray  # [B], tokens up to the end of its last piece
    table: np.ndarray  # [N, 4], see chains.Pieces

    @classmethod
    def of(cls, steps) -> "Pieces":
        """Of steps (slot_indices, cu_seqlens, seq_lens), in each of which a slot has one piece at most."""
        parts = [np.stack([x.numpy() for x in (s, cu[:-1], cu.diff(), lens)], 1) for s, cu, lens in steps]
        rows = np.concatenate(parts).astype(np.int64)
        rows = rows[(rows[:, 0] >= 0) & (rows[:, 2] > 0)]
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        slot, sequence = np.unique(rows[:, 0], return_inverse=True)
        seq_len = np.zeros(len(slot), np.int64)
        seq_len[sequence] = rows[:, 3]  # the last one stays
        return cls(slot, seq_len, np.column_stack([sequence, rows[:, 1], rows[:, 2], rows[:, 3] - rows[:, 2]]))

    def take(self, sequences: np.ndarray) -> "Pieces":
        """Those of some of them, which come in this order."""
        table = [self.table[self.table[:, 0] == i] for i in sequences]
        table = np.concatenate([np.column_stack([np.full(len(t), i), t[:, 1:]]) for i, t in enumerate(table)])
        return Pieces(self.slot[sequences], self.seq_len[sequences], table)


def reset(slab, slot_indices, cu_seqlens, seq_lens) -> list[int]:
    """Zero the slots [S, bytes] uint8 of sequences whose first token is in this batch; returns them."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    fresh = slot_indices[(lengths > 0) & (lengths == seq_lens) & (slot_indices >= 0)].tolist()
    for slot in fresh:
        slab[slot].zero_()
    return fresh


def write(k, v, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens) -> None:
    """See reference.write. The index tensors live on the CPU."""
    pieces = Pieces.of([(slot_indices, cu_seqlens, seq_lens)])
    _walk(slots, pieces, Readouts(slots), np.zeros(len(pieces.slot), np.int64), None, None, k=k, v=v)


def attend(q, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, scale: float, out, rope=None, readouts=None):
    """See reference.attend."""
    walk(slots, Pieces.of([(slot_indices, cu_seqlens, seq_lens)]), rope, None, readouts, q=q, out=out, scale=scale)


def merge(slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, rope: Rope | None, policy: Policy, readouts=None):
    """See reference.merge."""
    due = slot_indices.where((seq_lens % slots.segment == 0) & (seq_lens > slots.window), -1)
    walk(slots, Pieces.of([(due, cu_seqlens, seq_lens)]), rope, policy, readouts)


def walk(slots: LayerSlots, pieces: Pieces, rope, policy: Policy | None, readouts: Readouts | None = None, **tokens):
    """Of every piece in turn write, attend and merge: what is given of k, v and q, out, scale; and of a policy.

    Sequences go together as far as there is room for their readouts.
    """
    readouts = readouts or Readouts(slots)
    gone = np.maximum(pieces.seq_len // slots.segment * slots.segment - slots.window, 0) * (not slots.sliding)
    most, count = readouts.make_room(int(gone.max(initial=0))) if gone.any() else len(gone), len(gone)
    parts = [np.arange(count)]
    if count > most:  # those at hand come first
        order = np.array(sorted(range(count), key=lambda i: pieces.slot[i] not in readouts))
        parts = [order[first : first + most] for first in range(0, count, most)]
    for part in parts:
        some = pieces if len(part) == count else pieces.take(part)
        needed = zip(some.slot.tolist(), gone[part].tolist(), strict=True)
        row = np.array([readouts.of(*x).row if x[1] else 0 for x in needed], np.int64)
        _walk(slots, some, readouts, row, rope, policy, **tokens)


def compile_walk(slots: LayerSlots, rope: Rope | None) -> None:
    """Compile what steps of this layer call, or load it from Numba's cache; slot 0 is looked at, and left as it is."""
    readouts, nobody = Readouts(slots), Pieces(*np.zeros((2, 0), np.int64), np.zeros((0, 4), np.int64))
    readouts.of(0, 1).prepare_merge(readouts.arrays(rope), 0)
    _walk(slots, nobody, readouts, nobody.slot, rope, None)


def _walk(slots, pieces, readouts, row, rope, policy, k=None, v=None, q=None, out=None, scale=1.0):
    """rows: of the sequences in the storage of readouts."""
    grid, arrays, like = Grid.of(slots, rope), readouts.arrays(rope), slots.ring_k
    if policy is not None:
        _prepare_merges(pieces, readouts, grid, arrays)
    nothing = like.new_empty(0, *like.shape[1::2])
    tokens = [as_bits((nothing if x is None else x).contiguous()) for x in (k, v, q)]
    tokens.append(as_bits(nothing if out is None else out))
    layer = chains.Layer(way_of(like.dtype, like.shape[3]), grid, arrays, readouts.weights(policy, rope))
    merges = policy is not None and not slots.sliding
    some = chains.Pieces(pieces.slot, row, pieces.table)
    chains.walk(layer, chains.Tokens(*tokens, float(scale)), some, merges, torch.get_num_threads())


def _prepare_merges(pieces, readouts, grid, arrays):
    """Of sequences that merge."""
    ends = pieces.table[:, 2] + pieces.table[:, 3]
    due = (ends % grid.segment == 0) & (ends > grid.window)
    for i in np.unique(pieces.table[due, 0]).tolist() if due.any() and not grid.sliding else ():
        first = ends[np.searchsorted(pieces.table[:, 0], i)]
        readouts.of(int(pieces.slot[i]), 0).prepare_merge(arrays, int(far_limit(first, grid)))
