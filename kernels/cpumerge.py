"""Merging on the CPU, see reference.merge: compiled, but for the products that find the nearest entries.

A head's newcomers are the segment that leaves its ring, one row each. Where one takes an entry its row becomes what was
there, so that in the end the rows are the losers, EMPTY where nobody lost.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from .arrays import Arrays, gather, key_position, load_rows, store
from .readout import Readout
from .readouts import Readouts
from .rows import compiled, exponentiate, highest, load, pack_rank, summed, turn
from .slot import EMPTY, LayerSlots, Policy, Rope, forgetting

CLOSED = np.float32(0.01)  # see reference.gate
GELU = np.float32(-2 * math.sqrt(2 / math.pi)), np.float32(0.044715)
FARTHEST = np.float32(80)  # of an exponent: e to it is an fp32


class Newcomers(NamedTuple):
    """Rows [G, C, ...] of every head, newcomers at first, see above."""

    k: np.ndarray  # [G, C, D] bits
    v: np.ndarray  # [G, C, D] bits
    plain: np.ndarray  # [G, C, D] fp32, keys before RoPE
    values: np.ndarray  # [G, C, D] fp32
    rank: np.ndarray  # [G, C] int64
    mass: np.ndarray  # [G, C] fp32

    @classmethod
    def of(cls, heads: int, count: int, like: np.ndarray) -> "Newcomers":
        """Room for C rows as wide as `like` [..., D] and with bits as wide as its."""
        shape = heads, count, like.shape[-1]
        bits, plain = (np.empty((2, *shape), dtype) for dtype in (like.dtype, np.float32))
        return cls(*bits, *plain, np.empty(shape[:2], np.int64), np.ones(shape[:2], np.float32))


def merge_slot(slots: LayerSlots, first: int, gone: int, policy: Policy, readout: Readout) -> None:
    """Move the tokens at positions first..gone - 1 of the slot with that readout, prepared for merging, from its ring
    into its memory.
    """
    arrays, weights, rope, count = readout.arrays, readout.weights, readout.rope, gone - first
    rows = Newcomers.of(len(weights.gate), count, arrays.k)
    places, counts, begin = readout.looked_at(gone)
    centred, unit = (torch.empty(n, arrays.k.shape[1]) for n in (len(counts) * count, sum(counts)))
    fresh = rope.trained if rope is not None else 0, forgetting(rope, policy)
    searching = _exchange(
        arrays, rows, weights, first, slots.sinks, *fresh, places, begin, centred.numpy(), unit.numpy()
    ).tolist()
    if any(searching):
        losers, keys, cosine = centred.split(count), unit.split(counts), torch.empty(count * len(unit))
        found = cosine.split([count * n for n in counts])
        for g in (g for g, due in enumerate(searching) if due):
            torch.mm(losers[g], keys[g].T, out=found[g].view(count, -1))
        _merge_rest(arrays, rows, weights.gate, np.array(searching), places, begin, cosine.numpy())


def compile_merge(slots: LayerSlots, rope: Rope | None) -> None:
    """Compile what merges of this layer call, or load it from Numba's cache; slot 0 is looked at, and left as it is."""
    readout = Readouts(slots).of(0, 1)
    readout.prepare_merge(rope, Policy(None, torch.zeros(slots.ring_k.shape[1], 3)))
    arrays, weights, (places, counts, begin) = readout.arrays, readout.weights, readout.looked_at(1)
    rows, unit = Newcomers.of(len(weights.gate), 0, arrays.k), np.empty((sum(counts), arrays.k.shape[1]), np.float32)
    searching = _exchange(arrays, rows, weights, 0, slots.sinks, 0, 0.0, places, begin, unit[:0], unit)
    _merge_rest(arrays, rows, weights.gate, searching, places, begin, unit[:0].reshape(-1))


@compiled
def _exchange(arrays: Arrays, rows, weights, first, sinks, trained, rate, places, begin, centred, unit):
    """Exact entries take the best newcomers, coarse ones the next best; rows become what they drove out.

    places, begin: see Readout.looked_at. Returns which heads [G] have losers that their gate may let in. Of these,
    `centred` [G * C, D] becomes the unit keys about the mean of all keys, and `unit` [K, D] those of the entries at
    `places`.
    """
    kv_heads, count, size = rows.plain.shape
    mean, score = np.empty(size, np.float32), np.empty(count, np.float32)
    searching = np.zeros(kv_heads, np.bool_)
    for g in range(kv_heads):
        _read(arrays, g, first, rows)
        _add(rows.plain[g], arrays.key_sum[g])
        for d in range(size):
            mean[d] = arrays.key_sum[g, d] / np.float32(first + count)
        _score(rows.plain[g], rows.values[g], mean, weights, g, score)
        for c in range(count):
            position = first + c
            fresh = score[c] + np.float32(max(position - trained, 0)) * np.float32(rate)
            pinned = _is_pinned(position, sinks, arrays.pins)
            rows.rank[g, c] = pack_rank(np.float32(np.inf) if pinned else fresh, position)
        _keep_exact(arrays, g, rows)
        _keep_coarse(arrays, g, rows)
        gate = weights.gate[g]
        heaviest = arrays.mass[arrays.start[g] : arrays.start[g + 1]].max() if gate[2] > 0 else np.float32(1)
        closest = np.float32(1) if gate[1] > 0 else np.float32(-1)
        searching[g] = begin[g + 1] > begin[g] and (rows.rank[g] != EMPTY).any() and _gate(closest, heaviest, gate) > 0
        if searching[g]:
            _centre(rows.plain[g], mean, 0, count, centred[g * count : (g + 1) * count])
            n = begin[g]
            for i in range(2):
                start, end = places[g, i, 0], places[g, i, 1]
                _centre(arrays.plain, mean, start, end, unit[n : n + end - start])
                n += end - start
    return searching


@compiled
def _read(arrays, g, first, rows):
    """The newcomers of head g, from position `first` on, out of its ring."""
    count, size = rows.plain.shape[1:]
    cells, key = np.empty(count, np.int64), np.empty((count, size), np.float32)
    for c in range(count):
        cells[c] = (first + c) % arrays.ring_k.shape[1]
    gather(arrays.ring_k[g], cells, rows.k[g])
    gather(arrays.ring_v[g], cells, rows.v[g])
    load(rows.k[g].reshape(-1), arrays.kind, key.reshape(-1))
    load(rows.v[g].reshape(-1), arrays.kind, rows.values[g].reshape(-1))
    turn(key, np.arange(first, first + count), arrays.cos, arrays.sin, arrays.interleaved, True, rows.plain[g])


@compiled
def _add(x, total):
    for c in range(x.shape[0]):
        for d in range(x.shape[1]):
            total[d] += x[c, d]


@compiled
def _is_pinned(position, sinks, pins):
    """See reference.is_pinned."""
    pinned = position < sinks
    for i in range(len(pins)):
        pinned |= pins[i, 0] <= position < pins[i, 1]
    return pinned


@summed
def _score(plain, values, mean, weights, g, score):
    """See reference.importance, of the rows [C, D] of head g."""
    (count, size), units = plain.shape, weights.w1.shape[2]
    unit, nowhere = np.empty((count, size), np.float32), np.zeros(size, np.float32)
    _centre(plain, nowhere, 0, count, unit)
    if not units:
        direction = np.empty((1, size), np.float32)
        _centre(mean.reshape(1, -1), nowhere, 0, 1, direction)
        for c in range(count):
            cosine = np.float32(0)
            for d in range(size):
                cosine += unit[c, d] * direction[0, d]
            score[c] = -cosine
        return
    hidden = np.empty((count, units), np.float32)
    for c in range(count):
        for u in range(units):
            hidden[c, u] = weights.b1[g, u]
    _multiply(unit, weights.w1[g, :size], hidden)
    _centre(values, nowhere, 0, count, unit)
    _multiply(unit, weights.w1[g, size:], hidden)
    _gelu(hidden.reshape(-1))
    for c in range(count):
        score[c] = weights.b2[g]
        for u in range(units):
            score[c] += hidden[c, u] * weights.w2[g, u]


@summed
def _multiply(x, w, out):
    """out [C, U] += x [C, D] w [D, U], D a multiple of four."""
    for c in range(x.shape[0]):
        for d in range(0, x.shape[1], 4):
            a, b, e, f = x[c, d], x[c, d + 1], x[c, d + 2], x[c, d + 3]
            for u in range(w.shape[1]):
                out[c, u] += a * w[d, u] + b * w[d + 1, u] + e * w[d + 2, u] + f * w[d + 3, u]


@compiled
def _gelu(x):
    """By tanh, written as x times a sigmoid."""
    share = np.empty_like(x)
    for i in range(len(x)):
        exponent = GELU[0] * (x[i] + GELU[1] * x[i] * x[i] * x[i])
        share[i] = min(max(exponent, -FARTHEST), FARTHEST)
    exponentiate(share, np.float32(0))
    for i in range(len(x)):
        x[i] /= np.float32(1) + share[i]


@summed
def _centre(keys, mean, first, end, unit):
    """Keys [N, D] from the first to the end, less their mean [D], of unit length."""
    for i in range(end - first):
        square = np.float32(0)
        for d in range(len(mean)):
            x = keys[first + i, d] - mean[d]
            unit[i, d] = x
            square += x * x
        scale = np.float32(1) / max(np.sqrt(square), np.float32(1e-12))
        for d in range(len(mean)):
            unit[i, d] *= scale


@compiled
def _duels(entries, newcomers):
    """See reference._duels: (entry [W], newcomer [W]) of the winners, from ranks [E] and [C]."""
    pairs = min(len(entries), len(newcomers))
    order, won = np.empty_like(entries), 0
    for e in range(len(entries)):
        order[e] = entries[e] if entries[e] != EMPTY else e - len(entries)
    best, worst = _lowest(-newcomers, pairs), _lowest(order, pairs)
    while won < pairs and newcomers[best[won]] > entries[worst[won]]:
        won += 1
    return worst[:won], best[:won]


@compiled
def _lowest(numbers, count):
    """Where the lowest `count` of them are, the lowest first."""
    found, held = np.empty(count, np.int64), np.empty(count, np.int64)
    for e in range(len(numbers) if count else 0):
        i = min(e, count - 1)
        if e >= count and numbers[e] >= held[i]:
            continue
        while i > 0 and held[i - 1] > numbers[e]:
            found[i], held[i] = found[i - 1], held[i - 1]
            i -= 1
        found[i], held[i] = e, numbers[e]
    return found


@compiled
def _keep_exact(arrays, g, rows):
    """See reference._keep_exact."""
    start, exact = arrays.start[g], arrays.exact_start[g + 1] - arrays.exact_start[g]
    entries, newcomers = _duels(arrays.rank[start : min(start + exact, arrays.start[g + 1])], rows.rank[g])
    places = start + entries
    for i in range(len(entries)):
        entry, place, c = arrays.exact_start[g] + entries[i], places[i], newcomers[i]
        for d in range(rows.k.shape[2]):
            arrays.exact_k[entry, d], arrays.exact_v[entry, d] = rows.k[g, c, d], rows.v[g, c, d]
            arrays.k[place, d], rows.k[g, c, d] = rows.k[g, c, d], arrays.k[place, d]
            arrays.v[place, d], rows.v[g, c, d] = rows.v[g, c, d], arrays.v[place, d]
            arrays.plain[place, d], rows.plain[g, c, d] = rows.plain[g, c, d], arrays.plain[place, d]
        arrays.exact_rank[entry] = rows.rank[g, c]
        arrays.bias[place] = 0
        arrays.rank[place], rows.rank[g, c] = rows.rank[g, c], arrays.rank[place]
        load(rows.v[g, c], arrays.kind, rows.values[g, c])


@compiled
def _keep_coarse(arrays, g, rows):
    """See reference._keep_coarse."""
    first = arrays.start[g] + arrays.exact_start[g + 1] - arrays.exact_start[g]
    last = min(first + arrays.coarse_start[g + 1] - arrays.coarse_start[g], arrays.start[g + 1])
    if last <= first:
        return
    entries, newcomers = _duels(arrays.rank[first:last], rows.rank[g])
    places, shape = first + entries, (len(entries), rows.plain.shape[2])
    k, v = np.empty(shape, np.float32), np.empty(shape, np.float32)
    rank, mass = np.empty(len(entries), np.int64), np.ones(len(entries), np.float32)
    load_rows(rows.k[g], newcomers, arrays.kind, k)
    gather(rows.values[g], newcomers, v)
    for i in range(len(places)):
        place, c = places[i], newcomers[i]
        load(arrays.v[place], arrays.kind, rows.values[g, c])
        for d in range(rows.plain.shape[2]):
            rows.plain[g, c, d] = arrays.plain[place, d]
        rows.mass[g, c] = arrays.mass[place]
        rank[i], rows.rank[g, c] = rows.rank[g, c], arrays.rank[place]
    store(arrays, g, places, k, v, mass, rank)


@compiled
def _gate(cosine, mass, weights):
    """See reference.gate, of one loser and one entry."""
    exponent = weights[0] + weights[1] * cosine + weights[2] * math.log(mass)
    opened = np.float32(1) / (np.float32(1) + math.exp(-exponent))
    return opened if opened >= CLOSED else np.float32(0)


@compiled
def _merge_rest(arrays: Arrays, rows, gates, searching, places, begin, cosine):
    """Every loser of the heads [G] that are searching into the coarse entry nearest to it, as far as the gate lets it.

    cosine: of these heads, each where it begins, [C, K], losers' to the entries at `places`.
    """
    count = rows.rank.shape[1]
    for g in np.nonzero(searching)[0]:
        near = cosine[count * begin[g] : count * begin[g + 1]].reshape(count, -1)
        target, group, weight = _nearest(arrays, g, rows, gates[g], places[g], near)
        if len(target):
            _join(arrays, g, rows, target, group, weight)


@compiled
def _nearest(arrays, g, rows, gate, places, cosine):
    """The places that take something up; of every row [C] which of them takes it, or -1, and with what weight."""
    count, groups = len(cosine), 0
    heaviest = arrays.mass[arrays.start[g] : arrays.start[g + 1]].max() if gate[2] > 0 else np.float32(1)
    group, weight, target = np.full(count, -1), np.zeros(count, np.float32), np.empty(count, np.int64)
    for c in range(count):
        if rows.rank[g, c] == EMPTY:
            continue
        best = highest(cosine[c])
        if _gate(best, heaviest, gate) == 0:  # no entry of any mass would let it in: no need to know which it is
            continue
        i = 0
        while cosine[c, i] != best:
            i += 1
        front = places[0, 1] - places[0, 0]
        place = places[0, 0] + i if i < front else places[1, 0] + i - front
        weight[c] = rows.mass[g, c] * _gate(best, arrays.mass[place], gate)
        if weight[c] > 0:
            same = 0
            while same < groups and target[same] != place:
                same += 1
            target[same], group[c] = place, same
            groups = max(groups, same + 1)
    return target[:groups], group, weight


@compiled
def _join(arrays, g, rows, target, group, weight):
    """entry += weight * delta / (sum of masses), see reference._merge_rest."""
    count, size = rows.plain.shape[1:]
    shape = len(target), size
    k, v = np.empty(shape, np.float32), np.empty(shape, np.float32)
    load_rows(arrays.k, target, arrays.kind, k)
    load_rows(arrays.v, target, arrays.kind, v)
    delta_k, delta_v, total = np.zeros(shape, np.float32), np.zeros(shape, np.float32), arrays.mass[target]
    position, turned = np.zeros(count, np.int64), np.empty((count, size), np.float32)
    for c in range(count):
        if group[c] >= 0:
            position[c] = key_position(arrays.rank[target[group[c]]], arrays.limit)
    turn(rows.plain[g], position, arrays.cos, arrays.sin, arrays.interleaved, False, turned)
    for c in range(count):
        i = group[c]
        if i >= 0:
            total[i] += weight[c]
            for d in range(size):
                delta_k[i, d] += weight[c] * (turned[c, d] - k[i, d])
                delta_v[i, d] += weight[c] * (rows.values[g, c, d] - v[i, d])
    for i in range(len(target)):
        for d in range(size):
            k[i, d] += delta_k[i, d] / total[i]
            v[i, d] += delta_v[i, d] / total[i]
    store(arrays, g, target, k, v, total, arrays.rank[target])
