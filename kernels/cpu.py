"""The CPU's serving path: the functions of reference.py, which hand batches on to what is compiled.

Results of a row never depend on which other rows share the call: how many keys a product has is fixed by the
row's own position, and how many rows does not matter to it (see cpupartial.py, and KEY_BLOCK in readout.py).
`readouts`, one per layer, keep what steps before have read of the slots.
"""

import numpy as np
import torch

from .cpuattention import Ring, attention, put
from .cpumerge import merge_slot
from .cpupartial import way_of
from .readouts import Readouts
from .reference import _rows, far_limit, far_query, left_ring
from .rows import as_bits
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
    rows = list(_rows(slot_indices, cu_seqlens, seq_lens))
    if rows:
        put(_packed(k, rows), _packed(v, rows), _sequences(rows), as_bits(slots.ring_k), as_bits(slots.ring_v))


def attend(q, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, scale: float, out, rope=None, readouts=None):
    """See reference.attend."""
    readouts, near = readouts or Readouts(slots), []
    for row in _rows(slot_indices, cu_seqlens, seq_lens):
        limit = far_limit(row[3], slots, rope)
        if limit:
            _attend(q, slots, [row], scale, out, rope, readouts, limit)
        else:
            near.append(row)
    if len(near) > 1 and not slots.sliding:
        most = readouts.make_room(max(left_ring(row[3], slots) for row in near))
        near.sort(key=lambda row: row[0] not in readouts)  # if not all can be held at once, those at hand come first
    else:
        most = max(len(near), 1)
    for first in range(0, len(near), most):
        _attend(q, slots, near[first : first + most], scale, out, rope, readouts)


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
        readout, limit = readouts.of(slot, gone), far_limit(seq_len + 1, slots, rope)
        readout.prepare_merge(rope._replace(limit=limit) if limit else rope, policy)
        merge_slot(slots, first, gone, policy, readout)


def _sequences(rows) -> np.ndarray:
    """[B, 4]: slot, first row of the batch, tokens, and the position of the first."""
    return np.array([(slot, begin, end - begin, seq_len - (end - begin)) for slot, begin, end, seq_len in rows])


def _packed(x, rows) -> np.ndarray:
    """The bits of what x holds of these rows, one sequence after another."""
    parts = [x[begin:end] for _, begin, end, _ in rows]
    return as_bits(parts[0].contiguous() if len(parts) == 1 else torch.cat(parts))


def _attend(q, slots, rows, scale, out, rope, readouts, limit=0):
    """Rows of the batch, no more than there are readouts for. limit: of far entries, which a single row may see."""
    sequences, passes = _sequences(rows), _packed(q, rows)[None]
    places = readouts.places([(slot, left_ring(seq_len, slots)) for slot, *_, seq_len in rows])
    entries = readouts.entries
    if limit:
        slot, begin, end, seq_len = rows[0]
        turned = far_query(q[begin:end], torch.arange(seq_len - (end - begin), seq_len), rope)
        passes = np.concatenate([passes, as_bits(turned)[None]])
        places.row[0], entries = 0, readouts.of(slot, left_ring(seq_len, slots)).far(limit)
    ring, way = Ring(slots.window, slots.segment, slots.sliding), way_of(q.dtype, q.shape[2])
    threads = torch.get_num_threads()
    attention(way, threads, passes, ring, sequences, *readouts.ring, places, *entries, scale, as_bits(out))
