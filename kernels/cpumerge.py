"""Merging on the CPU, see reference.merge, compiled.

A head's newcomers are the segment that leaves its ring, one row each. Where one takes an entry its row becomes what was
there, so that in the end the rows are the losers, EMPTY where nobody lost.
"""

import math
from typing import NamedTuple

import numpy as np

from .arrays import gather, key_position, load_rows, rank_position, read_plain, store, store_keys
from .aten import product
from .grid import candidates
from .rows import FLOAT32, compiled, exponentiate, highest, inlined, load, pack_rank, save, summed, turn
from .slot import EMPTY

CLOSED = np.float32(0.01)  # see reference.gate
GELU = np.float32(-2 * math.sqrt(2 / math.pi)), np.float32(0.044715)
FARTHEST = np.float32(80)  # of an exponent: e to it is an fp32


class Newcomers(NamedTuple):
    """Rows [C, ...] of one head, newcomers at first, see above."""

    k: np.ndarray  # [C, D] bits
    v: np.ndarray  # [C, D] bits
    plain: np.ndarray  # [C, D] fp32, keys before RoPE
    values: np.ndarray  # [C, D] fp32
    rank: np.ndarray  # [C] int64
    mass: np.ndarray  # [C] fp32


@inlined
def merge_head(arrays, weights, g, gone, grid):
    """Move the tokens before `gone` that are still in the ring of head g into its memory.

    Exact entries take the best newcomers, coarse ones the next best, and what they drove out is merged.
    """
    first = max(gone - grid.segment, 0)  # the first segment to leave is a shorter one if the window is no multiple
    count, size = gone - first, arrays.k.shape[1]
    bits, plain = np.empty((2, count, size), arrays.k.dtype), np.empty((2, count, size), np.float32)
    rows = Newcomers(bits[0], bits[1], plain[0], plain[1], np.empty(count, np.int64), np.empty(count, np.float32))
    mean, score = np.empty(size, np.float32), np.empty(count, np.float32)
    if arrays.limit:
        _turn_far(arrays, g, grid.segment)
    _read(arrays, g, first, rows)
    _add(rows.plain, arrays.key_sum[g])
    for d in range(size):
        mean[d] = arrays.key_sum[g, d] / np.float32(gone)
    _score(rows.plain, rows.values, mean, weights, g, score)
    for c in range(count):
        position = first + c
        fresh = score[c] + np.float32(max(position - grid.trained, 0)) * np.float32(weights.forgetting)
        pinned = _is_pinned(position, grid.sinks, arrays.pins)
        rows.rank[c] = pack_rank(np.float32(np.inf) if pinned else fresh, position)
        rows.mass[c] = 1
    _keep_exact(arrays, g, rows)
    _keep_coarse(arrays, g, rows)
    places, gate = _among(arrays, g, gone, grid), weights.gate[g]
    if (places[:, 1] > places[:, 0]).any():
        heaviest = arrays.mass[arrays.start[g] : arrays.start[g + 1]].max() if gate[2] > 0 else np.float32(1)
        if _may_enter(rows, heaviest, gate):
            target, group, weight = _nearest(arrays, g, rows, heaviest, gate, places, mean)
            if len(target):
                _update(arrays, g, rows, target, group, weight)


@compiled
def _turn_far(arrays, g, segment):
    """See reference._turn_far."""
    start, due, count = arrays.start[g], np.empty(arrays.start[g + 1] - arrays.start[g], np.int64), 0
    position = np.empty(len(due), np.int64)
    for place in range(start, start + len(due)):
        position[count] = rank_position(arrays.rank[place])
        if arrays.rank[place] != EMPTY and arrays.limit - segment <= position[count] < arrays.limit:
            due[count] = place
            count += 1
    # Exact entries come first
    exact, places = arrays.exact_start[g + 1] - arrays.exact_start[g], due[:count]
    key, turned = np.empty((count, arrays.k.shape[1]), np.float32), np.empty((count, arrays.k.shape[1]), np.float32)
    load_rows(arrays.k, places, arrays.kind, key)
    turn(key, position[:count], arrays.cos, arrays.sin, arrays.interleaved, True, turned)
    n = 0
    while n < count and places[n] - start < exact:
        save(turned[n], arrays.kind, arrays.k[places[n]])
        for d in range(key.shape[1]):
            arrays.exact_k[arrays.exact_start[g] + places[n] - start, d] = arrays.k[places[n], d]
        n += 1
    store_keys(arrays, g, places[n:], turned[n:])
    read_plain(arrays, places)


@compiled
def _among(arrays, g, gone, grid):
    """The places [2, 2] where the coarse entries begin and end that a merge looks among, in two runs."""
    exact = arrays.exact_start[g + 1] - arrays.exact_start[g]
    room = max(arrays.start[g + 1] - arrays.start[g] - exact, 0)
    runs = candidates(min(arrays.coarse_start[g + 1] - arrays.coarse_start[g], room), gone, grid)
    return np.array(runs) + (arrays.start[g] + exact)


@compiled
def _may_enter(rows, heaviest, gate):
    """Whether anybody lost, and the gate would let it into an entry that is as close and heavy as can be."""
    closest = np.float32(1) if gate[1] > 0 else np.float32(-1)
    return (rows.rank != EMPTY).any() and _gate(closest, heaviest, gate) > 0


@compiled
def _read(arrays, g, first, rows):
    """The newcomers of head g, from position `first` on, out of its ring."""
    count, size = rows.plain.shape
    cells, key = np.empty(count, np.int64), np.empty((count, size), np.float32)
    for c in range(count):
        cells[c] = (first + c) % arrays.ring_k.shape[1]
    gather(arrays.ring_k[g], cells, rows.k)
    gather(arrays.ring_v[g], cells, rows.v)
    load(rows.k.reshape(-1), arrays.kind, key.reshape(-1))
    load(rows.v.reshape(-1), arrays.kind, rows.values.reshape(-1))
    turn(key, np.arange(first, first + count), arrays.cos, arrays.sin, arrays.interleaved, True, rows.plain)


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
    entries, newcomers = _duels(arrays.rank[start : min(start + exact, arrays.start[g + 1])], rows.rank)
    places = start + entries
    for i in range(len(entries)):
        entry, place, c = arrays.exact_start[g] + entries[i], places[i], newcomers[i]
        for d in range(rows.k.shape[1]):
            arrays.exact_k[entry, d], arrays.exact_v[entry, d] = rows.k[c, d], rows.v[c, d]
            arrays.k[place, d], rows.k[c, d] = rows.k[c, d], arrays.k[place, d]
            arrays.v[place, d], rows.v[c, d] = rows.v[c, d], arrays.v[place, d]
            arrays.plain[place, d], rows.plain[c, d] = rows.plain[c, d], arrays.plain[place, d]
        arrays.exact_rank[entry] = rows.rank[c]
        arrays.bias[place] = 0
        arrays.rank[place], rows.rank[c] = rows.rank[c], arrays.rank[place]
        load(rows.v[c], arrays.kind, rows.values[c])


@compiled
def _keep_coarse(arrays, g, rows):
    """See reference._keep_coarse."""
    first = arrays.start[g] + arrays.exact_start[g + 1] - arrays.exact_start[g]
    last = min(first + arrays.coarse_start[g + 1] - arrays.coarse_start[g], arrays.start[g + 1])
    if last <= first:
        return
    entries, newcomers = _duels(arrays.rank[first:last], rows.rank)
    places, shape = first + entries, (len(entries), rows.plain.shape[1])
    k, v = np.empty(shape, np.float32), np.empty(shape, np.float32)
    rank, mass = np.empty(len(entries), np.int64), np.ones(len(entries), np.float32)
    load_rows(rows.k, newcomers, arrays.kind, k)
    gather(rows.values, newcomers, v)
    for i in range(len(places)):
        place, c = places[i], newcomers[i]
        load(arrays.v[place], arrays.kind, rows.values[c])
        for d in range(rows.plain.shape[1]):
            rows.plain[c, d] = arrays.plain[place, d]
        rows.mass[c] = arrays.mass[place]
        rank[i], rows.rank[c] = rows.rank[c], arrays.rank[place]
    store(arrays, g, places, k, v, mass, rank)


@compiled
def _gate(cosine, mass, weights):
    """See reference.gate, of one loser and one entry."""
    exponent = weights[0] + weights[1] * cosine + weights[2] * math.log(mass)
    opened = np.float32(1) / (np.float32(1) + math.exp(-exponent))
    return opened if opened >= CLOSED else np.float32(0)


@compiled
def _nearest(arrays, g, rows, heaviest, gate, places, mean):
    """See reference._merge_rest, of all losers of a head: the places that take something up; of every row [C] which of
    them takes it, or -1, and with what weight.
    """
    (count, size), groups, front = rows.plain.shape, 0, places[0, 1] - places[0, 0]
    group, weight, target = np.full(count, -1), np.zeros(count, np.float32), np.empty(count, np.int64)
    unit = np.empty((front + places[1, 1] - places[1, 0], size), np.float32)
    centred, cosine = np.empty((count, size), np.float32), np.empty((count, len(unit)), np.float32)
    _centre(rows.plain, mean, 0, count, centred)
    _centre(arrays.plain, mean, places[0, 0], places[0, 1], unit[:front])
    _centre(arrays.plain, mean, places[1, 0], places[1, 1], unit[front:])
    product(FLOAT32, centred, unit, True, cosine)
    for c in range(count):
        if rows.rank[c] == EMPTY:
            continue
        best = highest(cosine[c])
        if _gate(best, heaviest, gate) == 0:  # no entry of any mass would let it in: no need to know which it is
            continue
        i = 0
        while cosine[c, i] != best:
            i += 1
        place = places[0, 0] + i if i < front else places[1, 0] + i - front
        weight[c] = rows.mass[c] * _gate(best, arrays.mass[place], gate)
        if weight[c] > 0:
            same = 0
            while same < groups and target[same] != place:
                same += 1
            target[same], group[c] = place, same
            groups = max(groups, same + 1)
    return target[:groups], group, weight


@compiled
def _update(arrays, g, rows, target, group, weight):
    """entry += weight * delta / (sum of masses), see reference._merge_rest."""
    count, size = rows.plain.shape
    shape = len(target), size
    k, v = np.empty(shape, np.float32), np.empty(shape, np.float32)
    load_rows(arrays.k, target, arrays.kind, k)
    load_rows(arrays.v, target, arrays.kind, v)
    delta_k, delta_v, total = np.zeros(shape, np.float32), np.zeros(shape, np.float32), arrays.mass[target]
    position, turned = np.zeros(count, np.int64), np.empty((count, size), np.float32)
    for c in range(count):
        if group[c] >= 0:
            position[c] = key_position(arrays.rank[target[group[c]]], arrays.limit)
    turn(rows.plain, position, arrays.cos, arrays.sin, arrays.interleaved, False, turned)
    for c in range(count):
        i = group[c]
        if i >= 0:
            total[i] += weight[c]
            for d in range(size):
                delta_k[i, d] += weight[c] * (turned[c, d] - k[i, d])
                delta_v[i, d] += weight[c] * (rows.values[c, d] - v[i, d])
    for i in range(len(target)):
        for d in range(size):
            k[i, d] += delta_k[i, d] / total[i]
            v[i, d] += delta_v[i, d] / total[i]
    store(arrays, g, target, k, v, total, arrays.rank[target])
