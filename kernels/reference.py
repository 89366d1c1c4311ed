"""The definition of correct, in plain PyTorch: loops over sequences and heads, fp32 arithmetic.

cpu.py and cuda.py have `write`, `attend` and `merge`, too, which may take further arguments. README.md beside this file
has the maths.
A batch is N sequences; sequence i owns query rows cu_seqlens[i]:cu_seqlens[i+1], the last tokens of its
seq_lens[i], all inside one segment. slot_indices[i] < 0 or an empty row range marks padding. Where slots are parts,
slot_indices [N, parts] has those of a sequence in order, as many as its tokens take; the first marks padding.
"""

import torch

from .slot import (
    EMPTY,
    LayerSlots,
    Policy,
    Rope,
    candidates,
    decode,
    encode,
    forgetting,
    key_position,
    pack_rank,
    rank_position,
    rotate,
)


def left_ring(seq_len: int, slots: LayerSlots) -> int:
    """Tokens that the memory holds when the last query is token seq_len - 1: a function of position alone."""
    start = (seq_len - 1) // slots.segment * slots.segment
    return max(start - slots.window, 0)


def far_limit(seq_len: int, slots: LayerSlots, rope: Rope | None) -> int:
    """Tokens before this position are far from the segment of token seq_len - 1: a function of position alone.

    A far entry's key lies at position 0, and queries see it from position trained - 1. All others are at most
    that far away from every query of the segment.
    """
    if rope is None or not rope.trained or slots.sliding:
        return 0
    end = ((seq_len - 1) // slots.segment + 1) * slots.segment
    return max(end - rope.trained, 0)


def far_query(q, position, rope: Rope):
    """Queries [T, ..., D] at positions [T], turned to where they see far entries from; same dtype."""
    position = position.view(-1, *[1] * (q.dim() - 2)).expand(q.shape[:-1])
    plain = rotate(q.float(), position, rope, inverse=True)
    return rotate(plain, torch.full_like(position, rope.trained - 1), rope).to(q.dtype)


def ring_cells(slots: LayerSlots, slot: int | list[int], position):
    """Slot and ring cell [C] of a sequence's tokens at positions [C]."""
    cells = slots.ring_k.shape[2]
    row = torch.tensor(slot)[position // cells] if slots.parted else torch.full_like(position, slot)
    return row, position % cells


def write(k, v, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens) -> None:
    """Put the keys and values of new tokens into their ring cells. k, v [T, G, D] model dtype."""
    for slot, begin, end, seq_len in _rows(slot_indices, cu_seqlens, seq_lens):
        row, cell = ring_cells(slots, slot, torch.arange(seq_len - (end - begin), seq_len))
        slots.ring_k[row, :, cell], slots.ring_v[row, :, cell] = k[begin:end], v[begin:end]


def attend(
    q, slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, scale: float, out, rope=None, sink_logits=None
) -> None:
    """Attention of q [T, H, D] over memory, window and segment; writes out [T, H, D].

    A token sees every memory entry with log(mass) added to its logit (Bolya & Hoffman 2023, arXiv
    2303.17604, "proportional attention"), and the ring cells of the window and of its own segment up to itself.
    In a sliding layer it sees the last `window` tokens, itself among them, and no memory.
    Entries past the trained distance are seen from that distance (as in Xiao et al. 2024, arXiv 2402.04617);
    rope: may be None where no sequence gets that long.
    sink_logits [H]: of a key without a value that every query of a head sees, where the model has learned them
    (gpt-oss, arXiv 2508.10925).
    """
    kv_heads = slots.ring_k.shape[1]
    group = q.shape[1] // kv_heads
    for slot, begin, end, seq_len in _rows(slot_indices, cu_seqlens, seq_lens):
        gone, limit = left_ring(seq_len, slots), far_limit(seq_len, slots, rope)
        position = torch.arange(gone, seq_len)
        query = torch.arange(seq_len - (end - begin), seq_len)
        hidden = position[None] > query[:, None]  # [T, K]
        if slots.sliding:
            hidden |= position[None] <= query[:, None] - slots.window
        row, cell = ring_cells(slots, slot, position)
        seen_from_afar = far_query(q[begin:end], query, rope) if limit else q[begin:end]
        for g in range(kv_heads):
            mem_k, mem_v, mass, rank = _entries(slots, row[0], g)
            held = rank != EMPTY
            keys = torch.cat([mem_k[held].float(), slots.ring_k[row, g, cell].float()])
            values = torch.cat([mem_v[held].float(), slots.ring_v[row, g, cell].float()])
            bias = torch.zeros(len(query), len(keys))
            bias[:, : held.sum()] = mass[held].log()
            bias[:, held.sum() :].masked_fill_(hidden, -torch.inf)
            far = torch.cat([rank_position(rank[held]), position]) < limit
            for h in range(g * group, (g + 1) * group):
                near, afar = (x.float() @ keys.T * scale for x in (q[begin:end, h], seen_from_afar[:, h]))
                logits = torch.where(far, afar, near) + bias
                if sink_logits is not None:
                    logits = torch.cat([logits, sink_logits[h].float().expand(len(query), 1)], -1)
                weights = logits.softmax(-1)[:, : len(keys)]
                out[begin:end, h] = (weights @ values).to(out.dtype)


def merge(slots: LayerSlots, slot_indices, cu_seqlens, seq_lens, rope: Rope | None, policy: Policy) -> None:
    """Move the oldest segment out of the ring of every sequence whose last token completes a segment.

    Each outgoing token is scored once. Exact entries are the best-ranked tokens so far, coarse entries
    the next best; whatever loses its place is merged into the nearest coarse entry of slot.candidates
    as far as the gate lets it. All merges of a segment read the coarse entries as they stand after the
    replacements. Before all that, keys that become far are turned to position 0. A sliding layer keeps nothing of
    what leaves its ring.
    """
    if slots.sliding:
        return
    length = slots.segment
    for slot, _, _, seq_len in _rows(slot_indices, cu_seqlens, seq_lens):
        gone = seq_len - slots.window  # tokens that have left the ring once this segment has
        if seq_len % length or gone <= 0:
            continue
        position = torch.arange(gone - length, gone)
        live = position >= 0  # the first segment to leave is a shorter one if the window is no multiple
        cells = position % slots.ring_k.shape[2]
        pinned = is_pinned(slots, slot, position)
        rope = rope and rope._replace(limit=far_limit(seq_len + 1, slots, rope))
        for g in range(slots.ring_k.shape[1]):
            _turn_far(slots, slot, g, rope)
            k, v = slots.ring_k[slot, g, cells].float(), slots.ring_v[slot, g, cells].float()
            plain = rotate(k, position.clamp(min=0), rope, inverse=True)
            slots.key_sum[slot, g] += plain[live].sum(0)
            mean = slots.key_sum[slot, g] / gone
            score = importance(plain[None], v[None], mean[None], _head(policy, g))[0]
            score = score + freshness(position, rope, policy)
            rank = pack_rank(score.masked_fill(pinned, torch.inf), position).masked_fill(~live, EMPTY)
            k, v, rank = _keep_exact(slots, slot, g, k, v, rank)
            k, v, rank, mass = _keep_coarse(slots, slot, g, k, v, rank)
            _merge_rest(slots, slot, g, gone, k, v, rank, mass, mean, rope, policy.gate[g])


def is_pinned(slots: LayerSlots, slot: int, position):
    """Which positions [C] of a sequence are sinks or lie in a span that the client pinned."""
    first, end = slots.pins[slot].unbind(-1)
    return (position < slots.sinks) | ((position[:, None] >= first) & (position[:, None] < end)).any(1)


def importance(plain, v, mean, weights):
    """Score [G, C] fp32 of tokens from their pre-RoPE keys and values [G, C, D] fp32; mean key [G, D]."""
    unit = torch.nn.functional.normalize
    if weights is None:
        return -(unit(plain, dim=-1) * unit(mean, dim=-1)[:, None]).sum(-1)
    w1, b1, w2, b2 = weights
    features = torch.cat([unit(plain, dim=-1), unit(v, dim=-1)], -1)
    hidden = torch.nn.functional.gelu(torch.bmm(features, w1) + b1[:, None], approximate="tanh")
    return (hidden * w2[:, None]).sum(-1) + b2[:, None]


def freshness(position, rope: Rope | None, policy: Policy):
    """What tokens at positions [C] score above older ones of the same importance: 0 inside the trained context."""
    rate = forgetting(rope, policy)
    return (position - rope.trained).clamp(min=0) * rate if rate else 0.0


def gate(cosine, mass, weights):
    """How much of a loser the nearest entry takes up, in 0..1: sigmoid of (1, cosine, log mass) . weights.

    Below 0.01 the loser is dropped instead. cosine, mass [G, C]; weights [G, 3].
    """
    open_ = torch.sigmoid(weights[:, 0:1] + weights[:, 1:2] * cosine + weights[:, 2:3] * mass.log())
    return torch.where(open_ < 0.01, 0.0, open_)


def _rows(slot_indices, cu_seqlens, seq_lens):
    starts = cu_seqlens.tolist()
    first = slot_indices.reshape(len(slot_indices), -1)[:, 0]
    for live, slot, begin, end, seq_len in zip(
        (first >= 0).tolist(), slot_indices.tolist(), starts[:-1], starts[1:], seq_lens.tolist(), strict=True
    ):
        if live and end > begin:
            yield slot, begin, end, seq_len


def _head(policy: Policy, g: int):
    return policy.importance and tuple(w[g : g + 1] for w in policy.importance)


def _entries(slots: LayerSlots, slot: int, g: int):
    """All entries of one head as attention reads them: k, v [E, D], mass [E], rank [E]."""
    x = slice(slots.exact_start[g], slots.exact_start[g + 1])
    y = slice(slots.coarse_start[g], slots.coarse_start[g + 1])
    coarse_k, coarse_v = (part.to(slots.ring_k.dtype) for part in _coarse(slots, slot, g, y))
    mass = torch.cat([torch.ones(x.stop - x.start), slots.coarse_mass[slot, y]])
    rank = torch.cat([slots.exact_rank[slot, x], slots.coarse_rank[slot, y]])
    return torch.cat([slots.exact_k[slot, x], coarse_k]), torch.cat([slots.exact_v[slot, x], coarse_v]), mass, rank


def _turn_far(slots, slot, g, rope):
    """Turn the keys of entries that have become far with this segment to position 0."""
    x = slice(slots.exact_start[g], slots.exact_start[g + 1])
    y = slice(slots.coarse_start[g], slots.coarse_start[g + 1])
    entry, position = _new_far(slots.exact_rank[slot, x], slots.segment, rope)
    exact_k = slots.exact_k[slot, x]
    exact_k[entry] = rotate(exact_k[entry].float(), position, rope, inverse=True).to(exact_k.dtype)
    entry, position = _new_far(slots.coarse_rank[slot, y], slots.segment, rope)
    entry = entry + y.start
    turned = rotate(_coarse(slots, slot, g, entry)[0], position, rope, inverse=True)
    codes = encode(turned, slots.codec.key_bits, slots.ring_k.dtype, slots.pairs.of(g))
    slots.coarse_k[slot, entry], slots.coarse_k_affine[slot, entry] = codes


def _new_far(rank, segment, rope):
    """Entries [F] of ranks [E] that became far when the limit last rose, by a segment, and their positions."""
    position, limit = rank_position(rank), rope.limit if rope is not None else 0
    entry = ((rank != EMPTY) & (position < limit) & (position >= limit - segment)).nonzero().squeeze(1)
    return entry, position[entry]


def _duels(entry_rank, rank):
    """Pair the newcomers, best first, with the entries, worst first; a newcomer wins if it ranks higher.

    Empty entries are the worst, the first of them first. Returns (entry [P], newcomer [P]) of the winners.
    """
    order = torch.where(entry_rank == EMPTY, torch.arange(len(entry_rank)) - len(entry_rank), entry_rank)
    worst, best = order.argsort(), rank.argsort(descending=True)
    pairs = min(len(worst), len(best))
    worst, best = worst[:pairs], best[:pairs]
    won = (rank[best] > entry_rank[worst]) & (rank[best] != EMPTY)
    return worst[won], best[won]


def _keep_exact(slots, slot, g, k, v, rank):
    """Exact entries take the best-ranked tokens; returns what they turned away or gave up, [C, ...]."""
    x = slice(slots.exact_start[g], slots.exact_start[g + 1])
    entry, newcomer = _duels(slots.exact_rank[slot, x], rank)
    k, v, rank = k.clone(), v.clone(), rank.clone()
    for field, new in ((slots.exact_k, k), (slots.exact_v, v), (slots.exact_rank, rank)):
        given_up = field[slot, x][entry].to(new.dtype)
        field[slot, x.start + entry] = new[newcomer].to(field.dtype)
        new[newcomer] = given_up
    return k, v, rank


def _keep_coarse(slots, slot, g, k, v, rank):
    """Coarse entries take the next best; returns the losers [C, ...] with their masses [C]."""
    y = slice(slots.coarse_start[g], slots.coarse_start[g + 1])
    entry, newcomer = _duels(slots.coarse_rank[slot, y], rank)
    old = _coarse(slots, slot, g, y.start + entry)
    old_rank, old_mass = slots.coarse_rank[slot, y.start + entry], slots.coarse_mass[slot, y.start + entry]
    _store(slots, slot, g, y.start + entry, k[newcomer], v[newcomer], torch.ones(len(entry)), rank[newcomer])
    k, v, rank, mass = k.clone(), v.clone(), rank.clone(), torch.ones(len(k))
    k[newcomer], v[newcomer], rank[newcomer], mass[newcomer] = *old, old_rank, old_mass
    return k, v, rank, mass


def _merge_rest(slots, slot, g, gone, k, v, rank, mass, mean, rope, gate_weights):
    """entry += gate * mass * delta / (sum of masses), the loser's key turned to where the entry's lies."""
    y = slice(slots.coarse_start[g], slots.coarse_start[g + 1])
    losers, held = rank != EMPTY, slots.coarse_rank[slot, y] != EMPTY
    if not losers.any() or not held.any():
        return
    unit = torch.nn.functional.normalize
    k, v, mass = k[losers], v[losers], mass[losers]
    plain = rotate(k, key_position(rank[losers], rope), rope, inverse=True)
    among = torch.cat([torch.arange(r.start, r.stop) for r in candidates(len(held), gone, slots.segment)])
    entries = y.start + among[held[among]]
    entry_k, entry_v = _coarse(slots, slot, g, entries)
    entry_rank, entry_mass = slots.coarse_rank[slot, entries], slots.coarse_mass[slot, entries]
    entry_plain = rotate(entry_k, key_position(entry_rank, rope), rope, inverse=True)
    cosine, nearest = (unit(plain - mean, dim=-1) @ unit(entry_plain - mean, dim=-1).T).max(-1)
    weight = mass * gate(cosine[None], entry_mass[nearest][None], gate_weights[None])[0]
    for e in nearest.unique():
        mine = (nearest == e) & (weight > 0)
        if not mine.any():
            continue
        w, total = weight[mine], entry_mass[e] + weight[mine].sum()
        turned = rotate(plain[mine], key_position(entry_rank[e], rope).expand(len(w)), rope)
        new_k = entry_k[e] + (w[:, None] * (turned - entry_k[e])).sum(0) / total
        new_v = entry_v[e] + (w[:, None] * (v[mine] - entry_v[e])).sum(0) / total
        _store(slots, slot, g, entries[e : e + 1], new_k[None], new_v[None], total[None], entry_rank[e : e + 1])


def _coarse(slots, slot, g, entries):
    """Keys and values [E, D] fp32 of coarse entries of head g, as attention reads them."""
    dtype, codec, pairs = slots.ring_k.dtype, slots.codec, slots.pairs.of(g)
    k = decode(slots.coarse_k[slot, entries], slots.coarse_k_affine[slot, entries], codec.key_bits, dtype, pairs)
    v = decode(slots.coarse_v[slot, entries], slots.coarse_v_affine[slot, entries], codec.value_bits, dtype)
    return k.float(), v.float()


def _store(slots, slot, g, entries, k, v, mass, rank):
    dtype, codec = slots.ring_k.dtype, slots.codec
    key = encode(k, codec.key_bits, dtype, slots.pairs.of(g))
    slots.coarse_k[slot, entries], slots.coarse_k_affine[slot, entries] = key
    slots.coarse_v[slot, entries], slots.coarse_v_affine[slot, entries] = encode(v, codec.value_bits, dtype)
    slots.coarse_mass[slot, entries] = mass
    slots.coarse_rank[slot, entries] = rank
