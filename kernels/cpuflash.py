"""Attention of a few queries or many to some keys of a head, compiled: by tiles of fp32 products, online softmax.

Keys come in blocks of BLOCK, whose maxima and sums are carried along (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao
et al. 2022, arXiv 2205.14135). What a row sees does not depend on the rows beside it, nor on keys that are hidden
from it, of which its blocks may have any number at their end.
"""

import math

import numpy as np

from .grid import whole
from .lanes import LANES, ROWS, WIDTH, add_products, put, scale, take, transpose, zeros
from .rows import compiled, exponentiate, highest, load, save, summed

BLOCK = 256  # keys at a time: in fp32, turned over, they stay in a core's cache
LOWEST = np.float32(-3e38)  # below any logit


@compiled
def flash(kind, q, k, v, mask, factor, seen, lse):
    """Write what queries see [T, D], and its log-sum-exp [T] fp32.

    q [T, D], T a multiple of ROWS; k and v [K, D]: finite, bits, see rows.KINDS; mask [M, K] fp32, finite: row t % M
    is added to the logits of query t, which are multiplied by `factor` before.
    """
    (rows, size), most = q.shape, min(whole(len(k), WIDTH), BLOCK)
    wide = whole(size, WIDTH)
    query, found = _room(rows, size, whole(size, LANES)), np.zeros((rows, wide), np.float32)
    top, total, fade = np.full(rows, LOWEST), np.zeros(rows, np.float32), np.empty(ROWS, np.float32)
    keys, values = _room(most, size, query.shape[1]), _room(most, size, wide)
    weights = np.zeros((ROWS, BLOCK), np.float32)
    turned = np.empty((most // WIDTH, query.shape[1], WIDTH), np.float32)
    _load(q, kind, query)
    for begin in range(0, len(k), BLOCK):
        count = min(len(k) - begin, BLOCK)
        held = whole(count, WIDTH)
        _load(k[begin : begin + count], kind, keys)
        _load(v[begin : begin + count], kind, values)
        _turn_over(keys, held, turned)
        values[count:held] = 0
        weights[:, held:] = 0  # sums of a row go over all of it, in one order
        for row in range(0, rows, ROWS):
            _logits(query, row, turned, held, weights)
            for r in range(ROWS):
                own, added = weights[r, :held], mask[(row + r) % len(mask), begin : begin + count]
                _add(own, factor, added)
                own[count:] = 0
                before, top[row + r] = top[row + r], max(top[row + r], highest(own[:count]))
                exponentiate(own[:count], top[row + r])
                fade[r] = math.exp(before - top[row + r])
                total[row + r] = total[row + r] * fade[r] + _total(weights[r])
            _gather(weights, values, held, found, row, fade)
    for row in range(rows):
        _multiply(found[row], np.float32(1) / total[row])
        save(found[row, :size], kind, seen[row])
        lse[row] = top[row] + np.float32(math.log(total[row]))


@compiled
def _room(rows, used, columns):
    """Room for rows [N, D], with zeros beside what is used of it."""
    room = np.empty((rows, columns), np.float32)
    for row in range(rows):
        room[row, used:] = 0
    return room


@compiled
def _load(x, kind, out):
    """Rows [N, D] into the first ones of `out`, which may be wider."""
    if x.shape[1] == out.shape[1]:
        load(x.reshape(-1), kind, out.reshape(-1))
        return
    for row in range(len(x)):
        load(x[row], kind, out[row])


@compiled
def _turn_over(keys, count, turned):
    """The first keys [K, D], as columns of groups [K / WIDTH, D, WIDTH]."""
    size = keys.shape[1]
    for j in range(0, count, LANES):
        group = j // WIDTH * size * WIDTH + j % WIDTH
        for d in range(0, size, LANES):
            transpose(keys, j * size + d, size, turned, group + d * WIDTH, WIDTH)


@compiled
def _logits(query, row, turned, count, logits):
    """Products of a tile's rows of queries [T, D], from a row on, with the first keys, turned: logits [ROWS, BLOCK]."""
    size, begin = query.shape[1], row * query.shape[1]
    for j in range(0, count, WIDTH):
        products = zeros()
        for d in range(size):
            products = add_products(products, query, begin + d, size, turned, j * size + d * WIDTH)
        put(products, logits, j, logits.shape[1])


@compiled
def _gather(weights, values, count, found, row, fade):
    """What a tile's rows of `found` [T, D] saw before, faded, and the first values [K, D] by weights [ROWS, BLOCK]."""
    size, most = values.shape[1], weights.shape[1]
    for d in range(0, size, WIDTH):
        sums = scale(take(found, row * size + d, size), fade)
        for j in range(count):
            sums = add_products(sums, weights, j, most, values, j * size + d)
        put(sums, found, row * size + d, size)


# Loops as plain as that, each over one row, are what LLVM makes vectors of.


@compiled
def _add(logits, factor, mask):
    for j in range(len(mask)):
        logits[j] = logits[j] * factor + mask[j]


@summed
def _total(x):
    """In an order that only the length decides."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i]
    return total


@compiled
def _multiply(x, share):
    for i in range(len(x)):
        x[i] *= share
