"""Merging on the CPU, see reference.merge: products are PyTorch's, what lies between them is compiled.

A head's newcomers are the segment that leaves its ring, one row each. Where one takes an entry its row becomes what was
there, so that in the end the rows are the losers, EMPTY where nobody lost.
"""

import math

import numpy as np
import torch

from .arrays import Arrays, key_position, store
from .readout import Readout
from .readouts import Readouts
from .reference import freshness, importance
from .rows import as_bits, compiled, load, pack_rank, turn
from .slot import EMPTY, LayerSlots, Policy, Rope, candidates

CLOSED = np.float32(0.01)  # see reference.gate


def merge_slot(slots: LayerSlots, slot: int, gone: int, k, v, policy: Policy, readout: Readout) -> None:
    """Move the tokens k, v [G, C, D] at positions up to `gone` from the ring of one slot into its memory.

    k, v: contiguous copies, which are written over. readout: of that slot, prepared for merging.
    """
    first, arrays = gone - k.shape[1], readout.arrays
    k, v = as_bits(k), as_bits(v)
    plain, values, centred = (torch.empty(k.shape) for _ in range(3))
    _read(arrays, k, v, first, plain.numpy(), values.numpy())
    mean = slots.key_sum[slot].add_(plain.sum(1)) / gone
    score = importance(plain, values, mean, policy.importance)
    score += freshness(torch.arange(first, gone), readout.rope, policy)
    rank, gates = np.empty(score.shape, np.int64), policy.gate.contiguous().numpy()
    _rank(score.numpy(), first, slots.sinks, slots.pins[slot].numpy(), rank)
    losers = plain.numpy(), values.numpy(), rank, np.ones(rank.shape, np.float32)
    searching, written = _exchange(arrays, k, v, *losers, gates, mean.numpy(), centred.numpy())
    if searching.any():
        written = [written]
        for g in searching.nonzero()[0].tolist():
            first, coarse = readout.start[g] + readout.exact_count[g], readout.coarse_count[g]
            among = [range(first + r.start, first + r.stop) for r in candidates(coarse, gone, slots.segment) if r]
            cosine = _cosines(centred[g], readout.plain, among, mean[g])
            places = among[0].start, len(among[0]), among[-1].start
            mine = (field[g] for field in (*losers, gates))
            written.append(_merge_rest(arrays, g, cosine.numpy(), cosine.amax(-1).numpy(), places, *mine))
        written = np.concatenate(written)
    readout.weigh(torch.from_numpy(written))


def compile_merge(slots: LayerSlots, rope: Rope | None) -> None:
    """Compile what merges of this layer call, or load it from Numba's cache; slot 0 is looked at, and left as it is."""
    readout, (kv_heads, _, size) = Readouts(slots).of(0, 1), slots.ring_k.shape[1:]
    readout.prepare_merge(rope)
    arrays, nobody = readout.arrays, np.zeros((kv_heads, 1, size), np.float32)
    k = as_bits(torch.zeros(nobody.shape, dtype=slots.ring_k.dtype))
    score, rank, gates = nobody[..., 0].copy(), np.full((kv_heads, 1), EMPTY), np.zeros((kv_heads, 3), np.float32)
    _read(arrays, k, k, 0, nobody, nobody)
    _rank(score, 0, slots.sinks, slots.pins[0].numpy(), rank.copy())
    _exchange(arrays, k, k, nobody, nobody, rank, score, gates, nobody[:, 0].copy(), nobody)
    _merge_rest(arrays, 0, score, score[0], (0, 1, 0), nobody[0], nobody[0], rank[0], score[0], gates[0])


def _cosines(centred, entries, among, mean):
    """Cosines [C, K] of losers' centred unit keys [C, D] to those of the entries [N, D] at K places."""
    parts = []
    for places in among:
        unit = entries[places.start : places.stop] - mean
        unit.mul_(unit.square().sum(-1, keepdim=True).clamp_(min=1e-24).rsqrt_())
        parts.append(centred @ unit.T)
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


@compiled
def _read(arrays: Arrays, k, v, first, plain, values):
    """Newcomers from position `first` on as plain keys and values fp32 [G, C, D]."""
    key = np.empty(k.shape[2], np.float32)
    for g in range(k.shape[0]):
        for c in range(k.shape[1]):
            load(k[g, c], arrays.kind, key)
            turn(key, arrays.cos[first + c], arrays.sin[first + c], arrays.interleaved, True, plain[g, c])
            load(v[g, c], arrays.kind, values[g, c])


@compiled
def _rank(score, first, sinks, pins, rank):
    """See slot.pack_rank and reference.is_pinned: ranks [G, C] of newcomers at positions from `first` on."""
    for c in range(score.shape[1]):
        position = first + c
        pinned = position < sinks
        for i in range(len(pins)):
            pinned |= pins[i, 0] <= position < pins[i, 1]
        for g in range(score.shape[0]):
            rank[g, c] = pack_rank(np.float32(np.inf) if pinned else score[g, c], position)


@compiled
def _duels(entries, newcomers):
    """See reference._duels: (entry [W], newcomer [W]) of the winners, from ranks [E] and [C]."""
    order = np.where(entries == EMPTY, np.arange(len(entries)) - len(entries), entries)
    best = np.argsort(-newcomers)
    pairs = min(len(order), len(best))
    worst = np.nonzero(order <= np.partition(order, pairs - 1)[pairs - 1])[0]
    worst = worst[np.argsort(order[worst])]
    won = 0
    while won < pairs and newcomers[best[won]] > entries[worst[won]]:
        won += 1
    return worst[:won], best[:won]


@compiled
def _exchange(arrays: Arrays, k, v, plain, values, rank, mass, gates, mean, centred):
    """Exact entries take the best newcomers, coarse ones the next best; rows become what they drove out.

    Returns which heads [G] have losers that their gate may let in, and the places that were written. `centred` becomes
    the unit keys of those losers about `mean` [G, D].
    """
    kv_heads, count, size = plain.shape
    kind = arrays.kind
    searching, written, n = np.zeros(kv_heads, np.bool_), np.empty(2 * kv_heads * count, np.int64), 0
    taken_k, taken_v = np.empty((count, size), np.float32), np.empty((count, size), np.float32)
    taken, ones = np.empty(count, np.int64), np.ones(count, np.float32)
    for g in range(kv_heads):
        first, exact = arrays.exact_start[g], arrays.exact_start[g + 1] - arrays.exact_start[g]
        start, stop = arrays.start[g], arrays.start[g + 1]
        last = min(start + exact + arrays.coarse_start[g + 1] - arrays.coarse_start[g], stop)
        if exact:
            entries, newcomers = _duels(arrays.rank[start : min(start + exact, stop)], rank[g])
            for i in range(len(entries)):
                entry, place, c = first + entries[i], start + entries[i], newcomers[i]
                arrays.exact_k[entry], arrays.exact_v[entry] = k[g, c], v[g, c]
                arrays.exact_rank[entry] = rank[g, c]
                _swap(arrays.k[place], k[g, c])
                _swap(arrays.v[place], v[g, c])
                _swap(arrays.plain[place], plain[g, c])
                arrays.rank[place], rank[g, c] = rank[g, c], arrays.rank[place]
                load(v[g, c], kind, values[g, c])
                written[n] = place
                n += 1
        if last > start + exact:
            entries, newcomers = _duels(arrays.rank[start + exact : last], rank[g])
            places = start + exact + entries
            won = len(places)
            for i in range(won):
                place, c = places[i], newcomers[i]
                load(k[g, c], kind, taken_k[i])
                taken_v[i] = values[g, c]
                load(arrays.v[place], kind, values[g, c])
                plain[g, c], mass[g, c] = arrays.plain[place], arrays.mass[place]
                taken[i], rank[g, c] = rank[g, c], arrays.rank[place]
            store(arrays, g, places, taken_k, taken_v, ones, taken)
            written[n : n + won] = places
            n += won
            heaviest = arrays.mass[start:stop].max() if gates[g, 2] > 0 else np.float32(1)
            closest = np.float32(1) if gates[g, 1] > 0 else np.float32(-1)
            searching[g] = (rank[g] != EMPTY).any() and _gate(closest, heaviest, gates[g]) > 0
        if searching[g]:
            for c in range(count):
                _centre(plain[g, c], mean[g], centred[g, c])
    return searching, written[:n]


@compiled
def _centre(key, mean, unit):
    square = np.float32(0)
    for d in range(len(key)):
        unit[d] = key[d] - mean[d]
        square += unit[d] * unit[d]
    scale = np.float32(1) / max(math.sqrt(square), np.float32(1e-12))
    for d in range(len(key)):
        unit[d] *= scale


@compiled
def _swap(a, b):
    for d in range(len(a)):
        a[d], b[d] = b[d], a[d]


@compiled
def _gate(cosine, mass, weights):
    """See reference.gate, of one loser and one entry."""
    exponent = weights[0] + weights[1] * cosine + weights[2] * math.log(mass)
    opened = np.float32(1) / (np.float32(1) + math.exp(-exponent))
    return opened if opened >= CLOSED else np.float32(0)


@compiled
def _merge_rest(arrays: Arrays, g, cosine, best, places, plain, values, rank, mass, gate):
    """Every loser of head g into the coarse entry nearest to it, as far as the gate lets it; returns places written.

    cosine [C, K], best [C] its maxima; places: where the first of the K lie, how many lie there, where the others do.
    """
    count, size = plain.shape
    heaviest = arrays.mass[arrays.start[g] : arrays.start[g + 1]].max() if gate[2] > 0 else np.float32(1)
    group, weight = np.full(count, -1), np.zeros(count, np.float32)
    target, groups = np.empty(count, np.int64), 0
    for c in range(count):
        # which entry it is costs most: only for losers that some mass would let in
        if rank[c] == EMPTY or _gate(best[c], heaviest, gate) == 0:
            continue
        i = 0
        while cosine[c, i] != best[c]:
            i += 1
        place = places[0] + i if i < places[1] else places[2] + i - places[1]
        weight[c] = mass[c] * _gate(best[c], arrays.mass[place], gate)
        if weight[c] > 0:
            same = 0
            while same < groups and target[same] != place:
                same += 1
            target[same], group[c] = place, same
            groups = max(groups, same + 1)
    k, v = np.empty((groups, size), np.float32), np.empty((groups, size), np.float32)
    total, delta_k, delta_v = np.empty(groups, np.float32), np.zeros_like(k), np.zeros_like(v)
    turned = np.empty(size, np.float32)
    for i in range(groups):
        load(arrays.k[target[i]], arrays.kind, k[i])
        load(arrays.v[target[i]], arrays.kind, v[i])
        total[i] = arrays.mass[target[i]]
    for c in range(count):
        i = group[c]
        if i >= 0:
            position = key_position(arrays.rank[target[i]], arrays.limit)
            turn(plain[c], arrays.cos[position], arrays.sin[position], arrays.interleaved, False, turned)
            total[i] += weight[c]
            for d in range(size):
                delta_k[i, d] += weight[c] * (turned[d] - k[i, d])
                delta_v[i, d] += weight[c] * (values[c, d] - v[i, d])
    for i in range(groups):
        for d in range(size):
            k[i, d] += delta_k[i, d] / total[i]
            v[i, d] += delta_v[i, d] / total[i]
    target = target[:groups]
    store(arrays, g, target, k, v, total, arrays.rank[target])
    return target
