"""Attention of the new tokens of a piece on the CPU, for one kv head, compiled: over ring and memory, in passes."""

import math

import numpy as np

from .arrays import MASKED, one_of, rank_position, ring_of
from .cpupartial import partial_attention
from .grid import far_limit, left_ring, parts, rings, width
from .lanes import ROWS
from .rows import compiled, load, save, turn
from .slot import EMPTY

MASKED_AT_ONCE = 1 << 20  # logits of a ring


@compiled
def put(k, v, g, position, ring):
    """Keys and values of tokens [T, G, D] from a position on into the cells of head g of a ring."""
    for t in range(len(k)):
        cell = (position + t) % ring[0].shape[1]
        for d in range(k.shape[2]):
            ring[0][g, cell, d], ring[1][g, cell, d] = k[t, g, d], v[t, g, d]


@compiled
def count_passes(n_rings, entries, limit, grid):
    """How many times queries look: at each ring, and at each part of the entries, once more for those that are far."""
    return n_rings + parts(entries, grid) * (2 if limit else 1)


@compiled
def see(way, grid, layer, slots, readout, g, q, position, first, last, begin, end, scale, seen, lse):
    """Write what tokens from a position on, those of a piece, see in the passes from begin to end.

    layer: LayerArrays; slots: those of the sequence, with the row of its readout; q [T, H, D]; first and last: of the
    rows of the head's group, N with those that fill up a tile; seen [P, N, D]; lse [P, N] fp32.
    """
    tokens, heads, _ = q.shape
    query = np.zeros(seen.shape[1:], q.dtype)
    _side_by_side(q, g * (heads // (len(layer.exact_start) - 1)), first, last, query)
    first_ring, n_rings = rings(position, layer.cells, grid)
    for p in range(begin, min(end, n_rings)):
        k, v = ring_of(layer, slots[first_ring + p])
        newest = position + tokens - 1 - ((first_ring + p) * layer.cells if grid.parted else 0)
        # PyTorch's flash attention rounds by how many keys there are
        count = layer.cells if way.in_tiles else min(layer.cells, newest + 1)
        step = max(MASKED_AT_ONCE // count // ROWS, 1) * ROWS
        for here in range(0, len(query), step):
            there = min(here + step, len(query))
            masks = min(tokens, there - here)
            mask = _mask(grid, layer.cells, first_ring + p, position, tokens, first + here, masks, count)
            own, held = slice(here, there), slice(0, count)
            partial_attention(way, query[own], k[g, held], v[g, held], mask, scale, seen[p, own], lse[p, own])
    if end > n_rings:  # a tuple of so many arrays takes its time
        arrays = one_of(layer, slots[0], readout, far_limit(position + tokens, grid))
        _see_entries(way, grid, arrays, g, query, position, tokens, first, begin, end, n_rings, scale, seen, lse)


@compiled
def _see_entries(way, grid, arrays, g, query, position, tokens, first, begin, end, n_rings, scale, seen, lse):
    """The passes that follow those at rings."""
    capacity = arrays.exact_start[g + 1] - arrays.exact_start[g] + arrays.coarse_start[g + 1] - arrays.coarse_start[g]
    entries = width(capacity, left_ring(position + tokens, grid), grid)
    near = parts(entries, grid)
    for p in range(max(begin, n_rings), end):
        part, far = (p - n_rings) % near, p >= n_rings + near
        held = slice(part * grid.part, entries if part == near - 1 else (part + 1) * grid.part)
        held = slice(arrays.start[g] + held.start, arrays.start[g] + held.stop)
        bias = arrays.bias[held]
        if arrays.limit:
            bias = _hide(bias, arrays.rank[held], arrays.limit, not far)
        if p == max(begin, n_rings + near):  # the first that is seen from afar
            _see_from_afar(way.kind, arrays, grid, position, tokens, first, query)
        partial_attention(way, query, arrays.k[held], arrays.v[held], bias.reshape(1, -1), scale, seen[p], lse[p])


@compiled
def _hide(bias, rank, limit, far):
    """A bias that hides the entries before the limit, if those are what is far, or else the others."""
    found = bias.copy()
    for e in range(len(found)):
        if far == (rank[e] != EMPTY and rank_position(rank[e]) < limit):
            found[e] = MASKED
    return found


@compiled
def _see_from_afar(kind, arrays, grid, position, tokens, first, query):
    """Turn rows of queries to where they see far entries from, see reference.far_query."""
    own, afar = np.empty(len(query), np.int64), np.full(len(query), grid.trained - 1)
    near, plain = np.empty(query.shape, np.float32), np.empty(query.shape, np.float32)
    for row in range(len(query)):
        own[row] = position + (first + row) % tokens
    load(query.reshape(-1), kind, near.reshape(-1))
    turn(near, own, arrays.cos, arrays.sin, arrays.interleaved, True, plain)
    turn(plain, afar, arrays.cos, arrays.sin, arrays.interleaved, False, near)
    save(near.reshape(-1), kind, query.reshape(-1))


@compiled
def _mask(grid, cells, ring, position, tokens, first, rows, count):
    """0 or MASKED over the first cells of a ring [rows, count], for rows from the first on of a piece's tokens."""
    newest = position + tokens - 1
    mask, held = np.zeros((rows, count), np.float32), np.empty(count, np.int64)
    for cell in range(count):
        # the newest token that it can hold
        held[cell] = ring * cells + cell if grid.parted else newest - (newest - cell) % cells
    for row in range(len(mask)):
        own = position + (first + row) % tokens
        begin = max(own - grid.window + 1 if grid.sliding else own // grid.segment * grid.segment - grid.window, 0)
        for cell in range(count):
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
def combine(kind, seen, lse, sink_logits, head, first, last, out):
    """Combine passes [P, N, D] by their log-sum-exp [P, N] (Milakov & Gimelshein 2018, arXiv 1805.02867).

    They are rows from the first to the last, and come into out [T, H, D]; head: the first of the group. sink_logits [H]
    take part of a head's weight.
    """
    (passes, _, size), count = seen.shape, last - first
    share, part = np.empty((passes, count), np.float32), seen[0, :count]
    combined = np.zeros((2, count, size), np.float32)
    for row in range(count):
        sink = sink_logits[head + (first + row) // len(out)]
        top = sink
        for p in range(passes):
            top = max(top, lse[p, row])
        total = np.float32(math.exp(sink - top))
        for p in range(passes):
            share[p, row] = math.exp(lse[p, row] - top)
            total += share[p, row]
        for p in range(passes):
            share[p, row] /= total
    for p in range(passes):
        load(seen[p, :count].reshape(-1), kind, combined[1].reshape(-1))
        for row in range(count):
            for d in range(size):
                combined[0, row, d] += combined[1, row, d] * share[p, row]
    save(combined[0].reshape(-1), kind, part.reshape(-1))
    for row in range(count):
        t, r = (first + row) % len(out), (first + row) // len(out)
        for d in range(size):
            out[t, head + r, d] = part[row, d]
