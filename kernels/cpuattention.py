"""Attention of the new tokens of sequences on the CPU, compiled: over ring and memory, joined."""

import math
from typing import NamedTuple

import numpy as np
import torch

from .arrays import MASKED
from .cpupartial import partial_attention, way_of
from .rows import as_bits, compiled, load, save
from .team import each

LEAST_ROWS = 64  # of a call: fewer take longer each
UNEVEN = 1.15  # times its share that a thread may have to do before heads are divided more finely
FINEST = 4  # parts of a thread's share, at most
AT_ONCE = 1 << 20  # logits of the ring, whose mask is as large


class Ring(NamedTuple):
    """What a layer's rings hold, see LayerSlots."""

    window: int
    segment: int
    sliding: bool


class Places(NamedTuple):
    """Where the entries of B sequences lie in a storage of readouts, which may be nowhere."""

    row: np.ndarray  # [B]
    start: np.ndarray  # [B, G]
    width: np.ndarray  # [B, G]


def compile_attention(dtype: torch.dtype) -> None:
    """Compile this for a dtype, or load it from Numba's cache."""
    ring, out = as_bits(torch.zeros(2, 1, 128, 4, dtype=dtype)[..., :2]), as_bits(torch.zeros(1, 1, 2, dtype=dtype))
    places, kept = Places(np.zeros(1, np.int64), *np.zeros((2, 1, 1), np.int64)), out[:, :0]
    bias, sequences = np.zeros((1, 1, 0), np.float32), np.array([[0, 0, 1, 0]])
    put(out, out, sequences, ring, ring)
    attention(
        way_of(dtype, 2), 1, out[None], Ring(64, 64, False), sequences, ring, ring, places, kept, kept, bias, 1.0, out
    )


@compiled
def put(k, v, sequences, ring_k, ring_v):
    """Keys and values of the tokens of B sequences [T, G, D] into their ring cells; see attention."""
    n = 0
    for i in range(len(sequences)):
        slot, _, tokens, first = sequences[i]
        for t in range(tokens):
            cell = (first + t) % ring_k.shape[2]
            for g in range(k.shape[1]):
                for d in range(k.shape[2]):
                    ring_k[slot, g, cell, d], ring_v[slot, g, cell, d] = k[n, g, d], v[n, g, d]
            n += 1


@compiled
def attention(way, threads, q, ring, sequences, ring_k, ring_v, places, k, v, bias, scale, out):
    """Write what tokens of B sequences see, those of each in one segment.

    q [Q, T, H, D]: all of them, as near entries are seen, and as far ones where there are any. sequences [B, 4]: slot,
    row of the first token in `out` [all, H, D], tokens, position of the first. ring_k, ring_v [S, G, L, D]. k, v
    [R, N, D] and bias [P, R, N] of the storage: in every pass, the first of near entries.
    """
    _, kv_heads, cells, _ = ring_k.shape
    tasks = _tasks(sequences, places.width, cells, q.shape[2] // kv_heads, threads, way.block)
    if each(_attend, len(tasks), (way, tasks, q, ring, sequences, ring_k, ring_v, places, k, v, bias, scale, out)):
        raise RuntimeError("PyTorch refused to attend to these queries.")


@compiled
def _tasks(sequences, width, cells, group, threads, block):
    """What a thread does at a time [N, 5]: sequence, its place in q, kv head, first and last row; the largest first.

    Many rows at a time are quicker: heads are divided only where threads would else be without work.
    """
    count, heads = width.shape
    rows = group * sequences[:, 2]
    cost = ((width + cells) * rows.reshape(-1, 1)).reshape(-1)
    order = np.argsort(-cost, kind="mergesort")
    most, parts = np.maximum(rows // LEAST_ROWS, 1), np.empty(len(order), np.int64)
    for finer in range(1, FINEST + 1):
        load = np.zeros(threads)
        for j in range(len(order)):
            parts[j] = min(max(np.rint(finer * threads * cost[order[j]] / cost.sum()), 1), most[order[j] // heads])
            for _ in range(parts[j]):
                load[np.argmin(load)] += cost[order[j]] / parts[j]
        if load.max() * threads <= UNEVEN * cost.sum():
            break
    found, n = np.empty((parts.sum(), 5), np.int64), 0
    first_in_q = np.cumsum(sequences[:, 2]) - sequences[:, 2]
    for j in range(len(order)):
        i, g = order[j] // heads, order[j] % heads
        step = block * parts[j]
        size = (rows[i] + step - 1) // step * block
        for first in range(0, rows[i], size):
            found[n, 0], found[n, 1], found[n, 2] = i, first_in_q[i], g
            found[n, 3], found[n, 4] = first, min(first + size, rows[i])
            n += 1
    return found[:n]


@compiled
def _attend(number, given):
    """One of the tasks."""
    way, tasks, q, ring, sequences, ring_k, ring_v, places, k, v, bias, scale, out = given
    i, at, g, first, last = tasks[number]
    (slot, begin, tokens, position), (heads, size) = sequences[i], q.shape[2:]
    head, rows = g * (heads // ring_k.shape[1]), (last - first + way.block - 1) // way.block * way.block
    passes = len(bias) if places.width[i, g] else 0
    query = np.zeros((len(q), rows, size), q.dtype)
    seen, lse = np.empty((1 + passes, rows, size), q.dtype), np.empty((1 + passes, rows), np.float32)
    for p in range(len(q)):
        _side_by_side(q[p, at : at + tokens], head, first, last, query[p])
    step = max(AT_ONCE // ring_k.shape[2] // way.block, 1) * way.block
    for here in range(0, rows, step):
        there = min(here + step, rows)
        cells = ring_k[slot, g], ring_v[slot, g], _mask(ring, position, tokens, first + here, there - here)
        partial_attention(way, query[0, here:there], *cells, scale, seen[0, here:there], lse[0, here:there])
    row, start = places.row[i], places.start[i, g]
    held = slice(start, start + places.width[i, g])
    for p in range(passes):
        entries = k[row, held], v[row, held], bias[p, row, held].reshape(1, -1)
        partial_attention(way, query[p], *entries, scale, seen[1 + p], lse[1 + p])
    join(way.kind, seen, lse, head, first, last, out[begin : begin + tokens])


@compiled
def _mask(ring, position, tokens, first, rows):
    """0 or MASKED over the ring cells [1 or rows, L], for rows from the first on of tokens from a position on."""
    cells, newest = ring.window + ring.segment, position + tokens - 1
    mask, held = np.zeros((rows if tokens > 1 else 1, cells), np.float32), np.empty(cells, np.int64)
    for cell in range(cells):
        held[cell] = newest - (newest - cell) % cells  # the newest token that it can hold
    for row in range(len(mask)):
        own = position + (first + row) % tokens
        begin = max(own - ring.window + 1 if ring.sliding else own // ring.segment * ring.segment - ring.window, 0)
        for cell in range(cells):
            mask[row, cell] = np.float32(0) if begin <= held[cell] <= own else MASKED
    return mask


# The queries of a head's group are its rows, all tokens of one before those of the next.


@compiled
def _side_by_side(q, head, first, last, query):
    """Rows of queries [T, H, D] from the first to the last; head: the first of the group."""
    for row in range(first, last):
        t, r = row % len(q), row // len(q)
        for d in range(q.shape[2]):
            query[row - first, d] = q[t, head + r, d]


@compiled
def join(kind, seen, lse, head, first, last, out):
    """Join passes [P, N, D] by their log-sum-exp [P, N] (Milakov & Gimelshein 2018, arXiv 1805.02867).

    They are rows from the first to the last, and come into out [T, H, D]; head: the first of the group.
    """
    (passes, _, size), count = seen.shape, last - first
    share, joined, part = np.empty((passes, count), np.float32), np.zeros((2, count, size), np.float32), seen[0, :count]
    for row in range(count):
        top, total = lse[0, row], np.float32(0)
        for p in range(1, passes):
            top = max(top, lse[p, row])
        for p in range(passes):
            share[p, row] = math.exp(lse[p, row] - top)
            total += share[p, row]
        for p in range(passes):
            share[p, row] /= total
    for p in range(passes):
        load(seen[p, :count].reshape(-1), kind, joined[1].reshape(-1))
        for row in range(count):
            for d in range(size):
                joined[0, row, d] += joined[1, row, d] * share[p, row]
    save(joined[0].reshape(-1), kind, part.reshape(-1))
    for row in range(count):
        t, r = (first + row) % len(out), (first + row) // len(out)
        for d in range(size):
            out[t, head + r, d] = part[row, d]
