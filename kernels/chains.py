"""What a layer does with the new tokens of sequences on the CPU, compiled: chains of pieces, shared out among threads.

A piece is some tokens of one sequence in one segment: its keys enter the ring, its queries attend, and the segment that
it makes leave the window is merged. The pieces of a sequence are, for each kv head, a chain. Chains have nothing to
do with each other, and no thread waits for another one as long as any chain has something to do.
"""

from typing import NamedTuple

import numpy as np
from numba import types

from .arrays import LayerArrays, Weights, one_of, read_plain, ring_of
from .cpuattention import combine, count_passes, put, see
from .cpumerge import merge_head
from .cpupartial import Way
from .grid import Grid, far_limit, leaves, left_ring, rings, whole, width
from .lanes import ROWS
from .rows import compiled, inlined
from .team import add, each, replace, value

LEAST_ROWS = 64  # of a task: fewer take longer each
UNEVEN = 0.15  # of a thread's share that one of them may have to do more before pieces are divided more finely
FINEST = 4  # parts of a thread's share, at most
PUTS, MERGES, READS, COMBINES = 1, 2, 4, 8
PIECE, HEAD, FIRST, LAST, AFTER, DOES, BEGIN, END, OF, PLACE = range(10)  # columns of a task, see _tasks
_rest = types.ExternalFunction("sched_yield", types.int32())


class Layer(NamedTuple):
    """What every piece of a layer needs."""

    way: Way
    grid: Grid
    arrays: LayerArrays
    weights: Weights


class Tokens(NamedTuple):
    """New tokens of a batch as bits, in any order; T is 0 of what there is none of."""

    k: np.ndarray  # [T, G, D]
    v: np.ndarray  # [T, G, D]
    q: np.ndarray  # [T, H, D]
    out: np.ndarray  # [T, H, D]
    scale: float
    sink_logits: np.ndarray  # [H] fp32, minus infinity where a head has none


class Pieces(NamedTuple):
    """Pieces of B sequences, those of a sequence in order."""

    slots: np.ndarray  # [B, 1], or the parts that each has
    row: np.ndarray  # [B], in the storage of readouts
    unread: np.ndarray  # [B] bool, whether keys before RoPE are to be read first, which merging needs
    table: np.ndarray  # [N, 4]: sequence, first row of the batch, tokens, position of the first; by sequence


@compiled
def walk(layer, tokens, pieces, merges, threads):
    """Do what there is to do for these pieces: put keys where T is not 0, attend likewise, merge if told to.

    Raises RuntimeError when a task fails: short of memory, or because PyTorch refused its operands.
    """
    tasks, bounds, rows = _tasks(layer, tokens, pieces, merges, threads)
    claimed, done, failed = bounds[:-1].copy(), np.zeros(len(bounds) - 1, np.int64), np.zeros(1, np.int64)
    seen, lse = np.empty((rows, tokens.q.shape[2]), tokens.q.dtype), np.empty(rows, np.float32)
    lost = each(_work, threads, (layer, tokens, pieces, tasks, seen, lse, bounds, claimed, done, failed))
    if lost or failed[0]:
        raise RuntimeError("Attention or merging failed: short of memory, or PyTorch refused its operands.")


@compiled
def _work(number, given):
    """Do tasks until all have been begun, or one has failed: of another chain each time."""
    layer, tokens, pieces, tasks, seen, lse, bounds, claimed, done, failed = given
    chain, left = number - 1, True  # whoever comes first begins with the longest
    while left and not value(failed, 0):
        left, task = False, -1
        for _ in range(len(done)):
            chain = (chain + 1) % len(done)
            task = value(claimed, chain)
            if task < bounds[chain + 1]:
                left = True
                if value(done, chain) >= tasks[task, AFTER] and replace(claimed, chain, task, task + 1):
                    break
            task = -1
        if task >= 0:
            try:
                _do(tasks[task], layer, tokens, pieces, seen, lse)
            except Exception:
                add(failed, 0, 1)
            add(done, chain, 1)
        elif left:
            _rest()


@inlined
def _do(task, layer, tokens, pieces, seen, lse):
    n, g, does = task[PIECE], task[HEAD], task[DOES]
    i, begin, count, position = pieces.table[n]
    own, end = slice(begin, begin + count), position + count
    slots, row = pieces.slots[i], pieces.row[i]
    if does & READS:
        arrays = one_of(layer.arrays, slots[0], row, far_limit(end, layer.grid))
        read_plain(arrays, np.arange(arrays.start[g], arrays.start[g + 1]))
    if does & PUTS:
        last_ring = sum(rings(position, layer.arrays.cells, layer.grid)) - 1
        put(tokens.k[own], tokens.v[own], g, position, ring_of(layer.arrays, slots[last_ring]))
    if task[LAST] > task[FIRST]:
        _attend(task, layer, slots, row, tokens.q[own], position, tokens, seen, lse, tokens.out[own])
    if does & MERGES:
        arrays = one_of(layer.arrays, slots[0], row, far_limit(end + 1, layer.grid))
        merge_head(arrays, layer.weights, g, leaves(end, layer.grid), layer.grid)


@compiled
def _attend(task, layer, slots, row, q, position, tokens, seen, lse, out):
    """Do a task's passes, and combine those of its rows if told to; seen and lse: rows that tasks share.

    Not part of _work: arrays that were made within its `try` broke the heap once another of them failed.
    """
    g, first, last, of, place = task[HEAD], task[FIRST], task[LAST], task[OF], task[PLACE]
    (_, heads, size), rows = q.shape, whole(last - first, ROWS)
    if place < 0:
        seen, lse, place = np.empty((of * rows, size), q.dtype), np.empty(of * rows, np.float32), 0
    own = slice(place, place + of * rows)
    seen, lse = seen[own].reshape(of, rows, size), lse[own].reshape(of, rows)
    seeing = layer.way, layer.grid, layer.arrays, slots, row, g, q, position, first, last, task[BEGIN], task[END]
    see(*seeing, tokens.scale, seen, lse)
    if task[DOES] & COMBINES:
        group = heads // (len(layer.arrays.exact_start) - 1)
        combine(layer.way.kind, seen, lse, tokens.sink_logits, g * group, first, last, out)


@compiled
def _tasks(layer, tokens, pieces, merges, threads):
    """Tasks [N, 10], where those of each chain begin [C + 1], the longest chain first, and rows that tasks share.

    PIECE and kv HEAD; FIRST and LAST row of the head's queries; AFTER how many tasks of the chain it comes; what else
    it DOES (READS and PUTS before, COMBINES and MERGES after); BEGIN and END of its passes, OF how many; and the PLACE
    of the rows that it shares with others, -1 where it has its own.
    """
    heads, table, puts = len(layer.arrays.exact_start) - 1, pieces.table, PUTS if len(tokens.k) else 0
    group = tokens.q.shape[1] // heads if len(tokens.q) else 0
    order, parts, begin, passes = _shares(layer, group, pieces, threads)
    most_tasks = len(table) * heads * (2 + parts.max()) if len(order) else 0
    found, bounds, m, shared = np.empty((most_tasks, PLACE + 1), np.int64), np.zeros(len(order) + 1, np.int64), 0, 0
    for j in range(len(order)):
        i, g, before = order[j] // heads, order[j] % heads, m
        for n in range(begin[i], begin[i + 1]):
            _, _, count, position = table[n]
            rows, merging = group * count, MERGES if merges and leaves(position + count, layer.grid) else 0
            now = puts | READS if n == begin[i] and pieces.unread[i] else puts
            of, shares = passes[n, g], min(parts[j], _most(rows, passes[n, g]))
            if shares < 2:
                m = _task(found, m, n, g, 0, rows, m - before, now | merging | (COMBINES if rows else 0), 0, of, of, -1)
                continue
            m = _task(found, m, n, g, 0, 0, m - before, now, 0, 0, of, -1)
            after = m - before
            if rows < 2 * LEAST_ROWS:
                end = 0
                for share in range(1, shares + 1):
                    start, end = end, 1 + share * (of - 1) // shares  # the first one looks at a ring more
                    m = _task(found, m, n, g, 0, rows, after, 0, start, end, of, shared)
                m = _task(found, m, n, g, 0, rows, m - before, COMBINES | merging, 0, 0, of, shared)
                shared += of * whole(rows, ROWS)
                continue
            size = whole(rows, ROWS * shares) // shares
            for first in range(0, rows, size):
                m = _task(found, m, n, g, first, min(first + size, rows), after, COMBINES, 0, of, of, -1)
            m = _task(found, m, n, g, 0, 0, m - before, merging, 0, 0, of, -1)
        bounds[j + 1] = m
    return found[:m], bounds, shared


@inlined
def _shares(layer, group, pieces, threads):
    """Chains [C], the longest first, and in how many parts the attention of each one's pieces is divided [C].

    Also where the pieces of each sequence begin [B + 1], and how many passes each piece takes for a head [N, G].
    """
    heads, table = len(layer.arrays.exact_start) - 1, pieces.table
    chains, ends = len(pieces.row) * heads, layer.arrays.exact_start + layer.arrays.coarse_start
    cost, last, most = np.zeros(chains), np.zeros(chains), np.ones(chains, np.int64)
    begin, passes = np.zeros(len(pieces.row) + 1, np.int64), np.ones((len(table), heads), np.int64)
    for n in range(len(table)):
        i, _, count, position = table[n]
        begin[i + 1], end = n + 1, position + count
        for g in range(heads):
            chain, gone = i * heads + g, left_ring(end, layer.grid)
            entries = width(ends[g + 1] - ends[g], gone, layer.grid)
            n_rings = rings(position, layer.arrays.cells, layer.grid)[1]
            passes[n, g] = count_passes(n_rings, entries, far_limit(end, layer.grid), layer.grid)
            last[chain] = group * count * (entries + n_rings * layer.arrays.cells)
            cost[chain] += last[chain]
            most[chain] = max(most[chain], _most(group * count, passes[n, g]))
    order = np.argsort(-cost, kind="mergesort")
    return order, _parts(cost[order], last[order], most[order], threads), begin, passes


@compiled
def _most(rows, passes):
    """How many tasks can share the attention of a piece: its rows, or, where those are few, its passes but one."""
    return rows // LEAST_ROWS if rows >= 2 * LEAST_ROWS else passes - 1 if rows else 1


@compiled
def _task(found, m, n, g, first, last, after, does, begin_pass, end_pass, of, place):
    """Note a task as the next one, unless there is nothing to do; returns how many there are."""
    if last == first and not does:
        return m
    found[m, PIECE], found[m, HEAD], found[m, FIRST], found[m, LAST] = n, g, first, last
    found[m, AFTER], found[m, DOES], found[m, PLACE] = after, does, place
    found[m, BEGIN], found[m, END], found[m, OF] = begin_pass, end_pass, of
    return m + 1


@compiled
def _parts(cost, last, most, threads):
    """In how many parts the attention of a chain's pieces is divided.

    Many rows at a time are quicker: pieces are divided only where threads would else be without work, because a
    chain is longer than a thread's share, or when all chains but some have come to their end.
    """
    parts, share = np.ones(len(cost), np.int64), cost.sum() / threads
    if (most == 1).all():
        return parts
    for finer in range(1, FINEST + 1):
        load, longest = np.zeros(threads), 0.0
        for j in range(len(cost)):
            parts[j] = min(max(np.rint(finer * cost[j] / share), 1), most[j])
            longest = max(longest, cost[j] / parts[j])
            for _ in range(parts[j]):
                load[np.argmin(load)] += last[j] / parts[j]
        if max(load.max() - last.sum() / threads, longest - share) <= UNEVEN * share:
            break
    return parts
