"""The CPU's serving path: the functions of reference.py, vectorised over heads, entries and tokens.

Results of a row never depend on which other rows share the call: how many keys a product has is fixed by the
row's own position, and how many rows does not matter to it (see ROW_BLOCK, and KEY_BLOCK in readout.py).
`scratch` is a dict, one per layer, in which the readouts of the slots used last stay, as far as READOUT_BYTES
go. Whoever changes a slot other than by merge() takes it out.
"""

from contextlib import contextmanager, nullcontext
from functools import lru_cache, reduce
from math import lcm

import torch

from .cpumerge import merge_slot
from .readout import MASKED, Readout
from .reference import _rows, far_limit, far_query, left_ring
from .slot import LayerSlots, Policy, Rope

ROW_BLOCK = 4  # with whole multiples of 4 query rows its products round alike however many rows there are
SMALL = 1 << 14  # logits of a call that one thread has done before another one is awake
READOUT_BYTES = 32 << 20  # of dequantised memory that stay from step to step, per layer


def reset(slab, slot_indices, cu_seqlens, seq_lens) -> list[int]:
    """Zero the slots [S, bytes] uint8 of sequences whose first token is in this batch; returns them."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    fresh = slot_indices[(lengths > 0) & (lengths == seq_lens) & (slot_indices >= 0)].tolist()
    for slot in fresh:
        slab[slot].zero_()
    return fresh


def write(k, v, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens) -> None:
    """See reference.write. The index tensors live on the CPU."""
    ring = slots.ring_k.shape[2]
    for slot, begin, end, seq_len in _rows(slot_indices, cu_seqlens, seq_lens):
        cells = _cells(seq_len - (end - begin), end - begin, ring)
        slots.ring_k[slot, :, cells] = k[begin:end].transpose(0, 1)
        slots.ring_v[slot, :, cells] = v[begin:end].transpose(0, 1)


def attend(
    q, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, scale: float, out, rope=None, scratch=None, helpers=None
) -> None:
    """See reference.attend. The rings of single-token rows go through in one call, longer rows in a call each.

    helpers: may attend to the longer rows from copies of what these see now; `out` is whole when they have finished.
    """
    scratch = {} if scratch is None else scratch
    rows = list(_rows(slot_indices, cu_seqlens, seq_lens))
    single = [(slot, begin, seq_len) for slot, begin, end, seq_len in rows if end - begin == 1]
    if single:
        _attend_single(q, slots, single, scale, out, rope, scratch)
    with _one_thread() if helpers else nullcontext():  # the other cores are theirs
        for slot, begin, end, seq_len in rows:
            if end - begin > 1:
                _attend_piece(q[begin:end], slots, slot, seq_len, scale, out[begin:end], rope, scratch, helpers)


def merge(slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, rope: Rope | None, policy: Policy, scratch=None):
    """See reference.merge."""
    if slots.sliding:
        return
    scratch = {} if scratch is None else scratch
    for slot, _, _, seq_len in _rows(slot_indices, cu_seqlens, seq_lens):
        gone = seq_len - slots.window
        if seq_len % slots.segment or gone <= 0:
            continue
        first = max(gone - slots.segment, 0)  # the first segment to leave is a shorter one if the window is no multiple
        cells = _cells(first, gone - first, slots.ring_k.shape[2])
        with _one_thread():
            readout = _readout(slots, slot, gone, scratch)
            readout.prepare_merge(rope and rope._replace(limit=far_limit(seq_len + 1, slots, rope)))
            merge_slot(slots, slot, gone, slots.ring_k[slot, :, cells], slots.ring_v[slot, :, cells], policy, readout)


@contextmanager
def _one_thread():
    """For many small operations: to wake other threads for one takes longer than the operation."""
    threads = torch.get_num_threads()
    torch._C.set_num_threads(1)  # vLLM replaces torch.set_num_threads, as it binds threads to cores: they stay so
    try:
        yield
    finally:
        torch._C.set_num_threads(threads)


def _cells(first, count, ring):
    """Ring cells of `count` positions from `first` on: a slice where they do not wrap."""
    cell = first % ring
    return slice(cell, cell + count) if cell + count <= ring else torch.arange(cell, cell + count) % ring


def _readout(slots, slot, gone, scratch):
    """The readout of one slot, from scratch if it is there and wide enough."""
    readout = scratch.pop(slot, None)
    fresh = readout is None or readout.width < max(readout.widths(gone))
    if fresh:
        readout = Readout(slots, slot, 2 * gone)  # a sequence goes on growing
    scratch[slot] = readout  # the last used is the last in order
    while fresh and len(scratch) > 1 and sum(kept.nbytes for kept in scratch.values()) > READOUT_BYTES:
        del scratch[next(iter(scratch))]
    return readout


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


def _attend_single(q, slots, single, scale, out, rope, scratch):
    """One query token per sequence: single is a list of (slot, row of q, seq_len)."""
    kv_heads = slots.ring_k.shape[1]
    tokens, held, mask = _single_tables(tuple(single), slots.window, slots.segment, slots.sliding)
    query = q[tokens].view(len(single), kv_heads, -1, q.shape[2])
    near, lse = _partial(*_operands(query, slots.ring_k[held], slots.ring_v[held], mask), scale)
    near, lse = near[:, :, : query.shape[2], None], lse[:, :, : query.shape[2], None]
    for i, (slot, row, seq_len) in enumerate(single):
        passes = _passes(q[row : row + 1], slots, slot, seq_len, rope, scratch)
        memory = [_memory(rows, _partials(_memory_operands(rows, heads), scale)) for rows, heads in passes]
        out[row] = _combine([(near[i], lse[i]), *memory]).reshape(q.shape[1:])


@lru_cache(maxsize=4)  # the layers of a step ask for the same ones, or for two
def _single_tables(single, window, segment, sliding):
    """Rows of q, slots, and masks [N, 1, 1, L] of single tokens, see _attend_single."""
    slots, rows, seq_lens = zip(*single, strict=True)
    mask = torch.stack([_local_mask(n - 1, n - 1, window, segment, sliding) for n in seq_lens])
    return _index(rows), _index(slots), mask[:, None]


def _index(places: tuple[int, ...]) -> slice | torch.Tensor:
    """A slice where places follow one another, as most do while sequences decode: a view instead of a copy."""
    run = range(places[0], places[0] + len(places))
    return slice(run.start, run.stop) if places == tuple(run) else torch.tensor(places)


def _attend_piece(q, slots, slot, seq_len, scale, out, rope, scratch, helpers):
    """A run of query tokens of one sequence, all inside one segment: q [T, H, D]."""
    mask = _local_mask(seq_len - len(q), seq_len - 1, slots.window, slots.segment, slots.sliding)[None, None]
    kv_heads = slots.ring_k.shape[1]
    ring = slots.ring_k[slot, :, None], slots.ring_v[slot, :, None]
    passes = _passes(q, slots, slot, seq_len, rope, scratch)
    if helpers:  # what they read must stay as it is
        ring = [x.clone() for x in ring]
        passes = [(rows, [[x.clone() for x in head] for head in heads]) for rows, heads in passes]
    calls = [[_operands(_by_head(q, kv_heads), *ring, mask)], *(_memory_operands(*seen) for seen in passes)]

    def see():
        return [_partials(heads, scale) for heads in calls]

    def join(parts):
        (near, lse), *memory = parts[0][0], *(_memory(q, heads) for heads in parts[1:])
        _by_head(out, kv_heads).copy_(_combine([(near[:, :, : len(q)], lse[:, :, : len(q)]), *memory]))

    if helpers:
        helpers.submit(see, join)
    else:
        join(see())


def _by_head(q, kv_heads):
    """[T, H, D] seen as [G, R, T, D]."""
    return q.view(len(q), kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3)


def _passes(q, slots, slot, seq_len, rope, scratch):
    """How queries [T, H, D] at the end of a sequence see its memory: near entries, and far ones in a second pass.

    Returns (queries, Readout.heads) of each pass.
    """
    gone, limit = left_ring(seq_len, slots), far_limit(seq_len, slots, rope)
    if not gone or slots.sliding:
        return []
    readout = _readout(slots, slot, gone, scratch)
    if not limit:
        return [(q, readout.heads(gone))]
    far = readout.far(limit)
    turned = far_query(q, torch.arange(seq_len - len(q), seq_len), rope)
    return [(rows, readout.heads(gone, unseen)) for rows, unseen in ((q, far), (turned, ~far))]


def _memory_operands(q, heads):
    """Of each head, for queries [T, H, D]; heads: see Readout.heads."""
    query = _by_head(q, len(heads))
    together = _whole_blocks(query.reshape(len(query), 1, -1, q.shape[2]))  # the heads of a group see the same keys
    return [(rows, *head) for rows, head in zip(together.split(1), heads, strict=True)]


def _memory(q, parts):
    """Partial attention of queries [T, H, D] to the entries of all heads."""
    shape = len(parts), q.shape[1] // len(parts), len(q)
    out, lse = (torch.cat(column)[:, :, : shape[1] * shape[2]] for column in zip(*parts, strict=True))
    return out.reshape(*shape, q.shape[2]), lse.reshape(shape)


def _operands(q, k, v, mask):
    """For _partial: q [B, P, T, D], k and v [B, P or 1, K, D], mask broadcast; T becomes whole blocks."""
    q = _whole_blocks(q)
    if mask.shape[2] > 1:
        mask = _whole_blocks(mask)
    shape = (*q.shape[:2], *k.shape[2:])
    return q, k.expand(shape), v.expand(shape), mask


def _partials(heads, scale):
    return [_partial(*operands, scale) for operands in heads]


def _partial(q, k, v, mask, scale):
    """Partial attention and its log-sum-exp, of operands as above."""
    with _one_thread() if q.shape[:3].numel() * k.shape[2] < SMALL else nullcontext():
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)


def _whole_blocks(x):
    """x [B, P, T, ...] with empty rows up to a multiple of ROW_BLOCK."""
    spare = -x.shape[2] % ROW_BLOCK
    return torch.nn.functional.pad(x, (0, 0, 0, spare)) if spare else x


@_one_thread()
def _combine(parts):
    """Join partial attentions [..., D] by their log-sum-exp [...] (Milakov & Gimelshein 2018, arXiv 1805.02867)."""
    if len(parts) == 1:
        return parts[0][0]
    top = reduce(torch.maximum, [lse for _, lse in parts])
    # torch.sigmoid and logaddexp round by a value's place in the tensor, exp does not
    shares = [(lse - top).contiguous().exp().unsqueeze(-1) for _, lse in parts]
    joined = [out.float().mul(share) for (out, _), share in zip(parts, shares, strict=True)]  # no fma
    return reduce(torch.add, joined).div_(reduce(torch.add, shares))
