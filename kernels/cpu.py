"""The CPU's serving path: the functions of reference.py, vectorised over heads, entries and decoding sequences.

Results of a row never depend on which other rows share the call: every product has a shape fixed by the
row's own position, or is padded with masked keys up to a multiple of the attention kernel's key block.
`scratch` is a dict, one per layer, in which the readouts of the slots used last stay: at most READOUTS of them.
Whoever changes a slot other than by merge() takes it out.
"""

from functools import lru_cache

import torch

from .readout import MASKED, Readout, blocks, decode_keys, decode_values, known_position
from .reference import _rows, gate, importance, is_pinned, left_ring
from .slot import EMPTY, LayerSlots, Policy, Rope, encode, pack_rank, rank_position, rotate

ROW_BLOCK = 4  # with whole multiples of 4 query rows its products round alike however many rows there are
READOUTS = 4  # slots whose memory stays dequantised, per layer
PADDING = torch.iinfo(torch.int64).max  # rank of a table cell beyond a head's entries: nothing outranks it


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


def attend(q, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, scale: float, out, scratch=None) -> None:
    """See reference.attend. Single-token rows go through in one call, longer ones in a call each."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    single = (lengths == 1) & (slot_indices >= 0)
    if single.any():
        rows = cu_seqlens[:-1][single].long()
        _attend_single(q, slots, slot_indices[single].long(), rows, seq_lens[single].long(), scale, out, scratch)
    if lengths.max() > 1:
        for slot, begin, end, seq_len in _rows(slot_indices, cu_seqlens, seq_lens):
            if end - begin > 1:
                _attend_piece(q[begin:end], slots, slot, seq_len, scale, out[begin:end], scratch)


def merge(slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, rope: Rope | None, policy: Policy, scratch=None):
    """See reference.merge."""
    due = (seq_lens % slots.segment == 0) & (seq_lens > slots.window)
    if due.any():
        due = torch.where(due, slot_indices, -1)
        for slot, _, _, seq_len in _rows(due, cu_seqlens, seq_lens):
            _merge_slot(slots, slot, seq_len, rope, policy, scratch)


def _cells(first, count, ring):
    """Ring cells of `count` positions from `first` on: a slice where they do not wrap."""
    cell = first % ring
    return slice(cell, cell + count) if cell + count <= ring else torch.arange(cell, cell + count) % ring


def _readout(slots, slot, gone, scratch):
    """The readout of one slot, from scratch if it is there and wide enough."""
    if scratch is None:
        return Readout(slots, torch.tensor([slot]), gone)
    readout = scratch.pop(slot, None)
    if readout is None or readout.width < blocks(min(gone, int(readout.capacity.max()))):
        readout = Readout(slots, torch.tensor([slot]), 2 * gone)  # a sequence goes on growing
    scratch[slot] = readout  # the last used is the last in order
    if len(scratch) > READOUTS:
        del scratch[next(iter(scratch))]
    return readout


def _local_mask(position, seq_len, slots):
    """0 or MASKED for queries at position [..., T] over the ring cells, [..., T, L]; seq_len [..., 1]."""
    ring = slots.ring_k.shape[2]
    last = seq_len - 1
    cell = torch.arange(ring)
    held = last - (last - cell) % ring  # the newest token that each cell can hold
    start = position // slots.segment * slots.segment
    first = (start - slots.window).clamp(min=0)
    seen = (held[..., None, :] <= position[..., None]) & (held[..., None, :] >= first[..., None])
    return torch.zeros(seen.shape).masked_fill_(~seen, MASKED)


def _attend_single(q, slots, slot, rows, seq_lens, scale, out, scratch):
    """One query token per sequence: q[rows] [n, H, D] against slots [n]."""
    n, (heads, size), kv_heads = len(rows), q.shape[1:], slots.ring_k.shape[1]
    query = q[rows].view(n, kv_heads, heads // kv_heads, size)
    mask = _local_mask((seq_lens - 1)[:, None], seq_lens[:, None], slots)[:, None]  # [n, 1, 1, L]
    gone = [left_ring(s, slots) for s in seq_lens.tolist()]
    part = _flash(query, slots.ring_k[slot], slots.ring_v[slot], mask, scale)
    joined = part[0]
    if max(gone):
        if n == 1:
            readout = _readout(slots, int(slot), gone[0], scratch)
        else:
            readout = Readout(slots, slot, max(gone))
        k, v, bias = readout.part(torch.tensor(gone))
        joined = _combine(part, _flash(query, k, v, bias[:, :, None], scale))
    out[rows] = joined.to(out.dtype).reshape(n, heads, size)


def _attend_piece(q, slots, slot, seq_len, scale, out, scratch):
    """A run of query tokens of one sequence, all inside one segment: q [T, H, D]."""
    (count, heads, size), kv_heads = q.shape, slots.ring_k.shape[1]
    query = q.view(count, kv_heads, heads // kv_heads, size).permute(1, 2, 0, 3)  # [G, R, T, D]
    position = torch.arange(seq_len - count, seq_len)
    mask = _local_mask(position, torch.tensor([seq_len]), slots)[None, None]  # [1, 1, T, L]
    gone = left_ring(seq_len, slots)
    part = _flash(query, slots.ring_k[slot, :, None], slots.ring_v[slot, :, None], mask, scale)
    joined = part[0]
    if gone:
        k, v, bias = _readout(slots, slot, gone, scratch).part(torch.tensor([gone]))
        rows = query.reshape(kv_heads, 1, -1, size)  # the query heads of a group see the same keys: one product
        memory, lse = _flash(rows, k[0, :, None], v[0, :, None], bias[0, :, None, None], scale)
        joined = _combine(part, (memory.view(query.shape), lse.view(query.shape[:3])))
    out.view(count, kv_heads, heads // kv_heads, size).copy_(joined.permute(2, 0, 1, 3))


def _flash(q, k, v, mask, scale):
    """Partial attention and its log-sum-exp: q [B, P, T, D], k and v [B, P or 1, K, D], mask broadcast."""
    rows, spare = q.shape[2], -q.shape[2] % ROW_BLOCK
    if spare:
        q = torch.nn.functional.pad(q, (0, 0, 0, spare))
        if mask.shape[2] > 1:
            mask = torch.nn.functional.pad(mask, (0, 0, 0, spare))
    shape = (*q.shape[:2], *k.shape[2:])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k.expand(shape), v.expand(shape), attn_mask=mask, scale=scale
    )
    return out[:, :, :rows], lse[:, :, :rows]


def _combine(a, b):
    """Join two partial attentions [..., D] by their log-sum-exp [...] (Milakov & Gimelshein 2018, arXiv 1805.02867)."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    # torch.sigmoid rounds by a value's place in the tensor, exp does not
    share = (1 + torch.exp(lse_a.contiguous() - lse_b.contiguous())).reciprocal().unsqueeze(-1)
    return out_a.float().mul(1 - share).add_(out_b.float().mul(share))  # no fma, whatever the strides


@lru_cache(maxsize=None)
def _sizes(starts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded table of a layer's ragged heads: flat entry index [G, E] and which cells are real."""
    counts = [b - a for a, b in zip(starts, starts[1:])]
    cell = torch.arange(max(counts)).expand(len(counts), -1)
    real = cell < torch.tensor(counts)[:, None]
    return torch.where(real, cell + torch.tensor(starts[:-1])[:, None], 0), real


def _starts(start: torch.Tensor) -> tuple[int, ...]:
    return tuple(start.tolist())


def _merge_slot(slots, slot, seq_len, rope, policy, scratch):
    gone = seq_len - slots.window
    position = torch.arange(gone - slots.segment, gone)
    live = position >= 0
    cells = _cells(gone - slots.segment, slots.segment, slots.ring_k.shape[2])
    k, v = slots.ring_k[slot, :, cells], slots.ring_v[slot, :, cells]  # [G, C, D]
    plain = rotate(k.float(), position.clamp(min=0), rope, inverse=True)
    slots.key_sum[slot] += torch.where(live[:, None], plain, 0.0).sum(1)
    mean = slots.key_sum[slot] / gone
    score = importance(plain, v.float(), mean, policy.importance)
    score = score.masked_fill(is_pinned(slots, slot, position), torch.inf)
    rank = pack_rank(score, position.expand_as(score)).masked_fill(~live, EMPTY)
    readout = _readout(slots, slot, gone, scratch)
    k, v, rank = _keep_exact(slots, slot, k, v, rank, readout)
    k, v, rank, mass = _keep_coarse(slots, slot, k, v, rank, rope, readout)
    _merge_rest(slots, slot, k, v, rank, mass, mean, rope, policy.gate, readout)


def _duels(entry_rank, start, rank):
    """See reference._duels, over all heads: (head, flat entry, newcomer) of the winners, [W] each."""
    table, real = _table(_starts(start))
    width = table.shape[1]
    entry = torch.where(real, entry_rank[table], PADDING)
    order = torch.where(entry == EMPTY, torch.arange(width) - width, entry)
    pairs = min(width, rank.shape[1])
    worst = order.topk(pairs, largest=False, sorted=True).indices
    best = rank.argsort(descending=True, stable=True)[:, :pairs]
    challenger = rank.gather(1, best)
    won = (challenger > entry.gather(1, worst)) & (challenger != EMPTY)
    head, pair = won.nonzero(as_tuple=True)
    return head, table[head, worst[head, pair]], best[head, pair]


def _keep_exact(slots, slot, k, v, rank, readout):
    if not slots.exact_rank.shape[1]:
        return k, v, rank
    head, entry, newcomer = _duels(slots.exact_rank[slot], slots.exact_start, rank)
    k, v, rank = k.clone(), v.clone(), rank.clone()
    for field, new in ((slots.exact_k[slot], k), (slots.exact_v[slot], v), (slots.exact_rank[slot], rank)):
        given_up = field[entry]
        field[entry] = new[head, newcomer]
        new[head, newcomer] = given_up
    readout.refresh_exact(head, entry)
    return k, v, rank


def _keep_coarse(slots, slot, k, v, rank, rope, readout):
    k, v, rank, mass = k.float(), v.float(), rank.clone(), torch.ones(rank.shape)
    if not slots.coarse_rank.shape[1] or not (rank != EMPTY).any():
        return k, v, rank, mass
    head, entry, newcomer = _duels(slots.coarse_rank[slot], slots.coarse_start, rank)
    old_k, old_v = decode_keys(slots, slot, entry), decode_values(slots, slot, entry)
    old_rank, old_mass = slots.coarse_rank[slot, entry], slots.coarse_mass[slot, entry]
    ones = torch.ones(len(entry))
    _store(slots, slot, entry, k[head, newcomer], v[head, newcomer], ones, rank[head, newcomer])
    readout.refresh_coarse(head, entry, rope)
    k[head, newcomer], v[head, newcomer] = old_k, old_v
    rank[head, newcomer], mass[head, newcomer] = old_rank, old_mass
    return k, v, rank, mass


def _merge_rest(slots, slot, k, v, rank, mass, mean, rope, gate_weights, readout):
    if not slots.coarse_rank.shape[1] or not (rank != EMPTY).any():
        return
    table, real = _table(_starts(slots.coarse_start))
    entry_rank = torch.where(real, slots.coarse_rank[slot][table], EMPTY)
    entry_plain, entry_square = readout.plain_keys(table, entry_rank, rope)
    plain = rotate(k, known_position(rank, rope), rope, inverse=True)
    cosine, nearest = _nearest(plain, entry_plain, entry_square, entry_rank == EMPTY, mean)
    entry = table.gather(1, nearest)
    entry_mass = slots.coarse_mass[slot][entry]
    held = (rank != EMPTY) & (cosine > MASKED)
    weight = torch.where(held, mass * gate(cosine, entry_mass.clamp(min=1.0), gate_weights), 0.0)
    same = (nearest[:, :, None] == nearest[:, None]) & (weight > 0)[:, None]  # [G, C, C]
    leads = (weight > 0) & (same.int().argmax(-1) == torch.arange(rank.shape[1]))
    if not leads.any():
        return
    share = same * weight[:, None]
    total = entry_mass + share.sum(-1)
    target_k, target_v = decode_keys(slots, slot, entry), decode_values(slots, slot, entry)
    turned = rotate(plain, rank_position(slots.coarse_rank[slot][entry]).clamp(max=_last(rope)), rope)
    target_k += torch.bmm(share, turned - target_k) / total[..., None]
    target_v += torch.bmm(share, v - target_v) / total[..., None]
    head, entry = leads.nonzero(as_tuple=True)[0], entry[leads]
    _store(slots, slot, entry, target_k[leads], target_v[leads], total[leads], slots.coarse_rank[slot, entry])
    readout.refresh_coarse(head, entry, rope)


def _nearest(plain, entry_plain, entry_square, empty, mean):
    """Highest cosine [G, C] between centred keys, and the entry [G, C] that has it.

    Centring is done on the products: (k - m).(e - m) = (k - m).e - (k - m).m
    """
    centred = plain - mean[:, None]
    centred = torch.nn.functional.normalize(centred, dim=-1)
    offset = (centred * mean[:, None]).sum(-1, keepdim=True)
    along = torch.bmm(entry_plain, mean[:, :, None]).squeeze(-1)
    norm = (entry_square - 2 * along + mean.square().sum(-1, keepdim=True)).clamp(min=1e-12).rsqrt()
    cosine = torch.bmm(centred, entry_plain.transpose(1, 2)).sub_(offset).mul_(norm[:, None])
    if empty.any():
        cosine.masked_fill_(empty[:, None], MASKED)
    return cosine.max(-1)


@lru_cache(maxsize=None)
def _table(starts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded table of a layer's ragged heads: flat entry index [G, E] and which cells are real."""
    counts = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    cell = torch.arange(max(counts)).expand(len(counts), -1)
    real = cell < torch.tensor(counts)[:, None]
    return torch.where(real, cell + torch.tensor(starts[:-1])[:, None], 0), real


def _starts(start: torch.Tensor) -> tuple[int, ...]:
    return tuple(start.tolist())


def _last(rope):
    """Highest position a table holds; empty entries carry a meaningless one."""
    return rope.cos.shape[0] - 1 if rope is not None else torch.iinfo(torch.int64).max


def _store(slots, slot, entries, k, v, mass, rank):
    dtype = slots.ring_k.dtype
    slots.coarse_k[slot, entries], slots.coarse_k_affine[slot, entries] = encode(k, slots.codec.key_bits, dtype)
    slots.coarse_v[slot, entries], slots.coarse_v_affine[slot, entries] = encode(v, slots.codec.value_bits, dtype)
    slots.coarse_mass[slot, entries] = mass
    slots.coarse_rank[slot, entries] = rank
