"""Partial attention on the CPU, compiled: what queries of one kv head see of some entries, and its log-sum-exp.

By PyTorch's flash attention; of many entries in bfloat16, which that does not multiply with AVX512_BF16, by oneDNN's
products, with a softmax between them. Either way a row rounds alike however many rows share the call, in whole
multiples of row_block: how many keys there are decides which way it goes.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from .aten import flash, product, product_less
from .rows import BFLOAT16, KINDS, compiled, exponentiate, highest, load, save, summed

MANY = 1 << 11  # keys from which on a decoded token loses little by the products' further calls
AT_ONCE = 1 << 20  # logits, in two parts of two bytes each, or beside a mask of as many numbers
AMX = torch.cpu._is_amx_tile_supported()
AMX_TILE = 32  # bfloat16 in a row


class Way(NamedTuple):
    """How a CPU multiplies a dtype."""

    kind: int  # see rows.KINDS
    block: int  # the rows of a call are a multiple of so many
    by_products: bool  # of many entries
    in_tiles: bool  # keys and columns are filled up to whole tiles


def way_of(dtype: torch.dtype, size: int) -> Way:
    """For rows of `size` columns."""
    bfloat16 = dtype == torch.bfloat16
    return Way(KINDS[dtype], row_block(dtype, size), bfloat16 and multiplies_bfloat16(), bfloat16 and AMX)


def row_block(dtype: torch.dtype, size: int) -> int:
    """The rows of a call are a multiple of so many, as fewer may be multiplied otherwise.

    MKL's fp32 products of rows longer than 64 columns need 16 on Intel's CPUs.
    """
    return 4 if dtype == torch.bfloat16 or size <= 64 else 16


def multiplies_bfloat16() -> bool:
    """Whether oneDNN does so faster than flash attention does, which knows AMX."""
    return torch.cpu._is_avx512_bf16_supported() and not AMX


@compiled
def rows_at_once(keys, block):
    """How many rows of `keys` logits are AT_ONCE at most, in whole blocks; one block in any case."""
    return max(AT_ONCE // keys // block, 1) * block


@compiled
def partial_attention(way, q, k, v, mask, scale, seen, lse):
    """Write what queries see [T, D], and its log-sum-exp [T] fp32.

    q [T, D], T a multiple of way.block; k and v [K, D]: bits; mask: [1 or T, K] fp32, finite. Raises RuntimeError when
    PyTorch refuses the operands.
    """
    if way.by_products and len(k) >= MANY:
        _by_products(way.block, q, k, v, mask, np.float32(scale), seen, lse)
        return
    columns, keys = (-q.shape[1] % AMX_TILE, -len(k) % AMX_TILE) if way.in_tiles else (0, 0)
    if not columns and not keys:
        flash(way.kind, q, k, v, mask, scale, seen, lse)
        return
    # 64 rows and more go another way than fewer do, which rounds otherwise unless all fill whole tiles
    none, wide = np.uint16(0), np.empty((len(q), q.shape[1] + columns), seen.dtype)
    k, v = _padded(k, keys, columns, none), _padded(v, keys, columns, none)
    flash(way.kind, _padded(q, 0, columns, none), k, v, _padded(mask, 0, keys, np.float32(-np.inf)), scale, wide, lse)
    for t in range(len(q)):
        for d in range(q.shape[1]):
            seen[t, d] = wide[t, d]


@compiled
def _padded(x, rows, columns, value):
    found = np.empty((x.shape[0] + rows, x.shape[1] + columns), x.dtype)
    found[:] = value
    for i in range(x.shape[0]):
        for d in range(x.shape[1]):
            found[i, d] = x[i, d]
    return found


@compiled
def _by_products(block, q, k, v, mask, scale, seen, lse):
    rows, keys = len(q), len(k)
    step = min(rows_at_once(keys, block), rows)
    parts = np.empty((2, step, keys), q.dtype)
    for first in range(0, rows, step):
        some = q[first : first + step]
        high, low = parts[0, : len(some)], parts[1, : len(some)]
        # A product rounds to bfloat16. The next one is what it leaves out: together, 16 bits of a logit.
        product(BFLOAT16, some, k, True, high)
        product_less(BFLOAT16, high, some, k, True, low)
        _softmax(high, low, mask, first, scale, lse[first : first + step])
        product(BFLOAT16, high, v, False, seen[first : first + step])


@compiled
def _softmax(high, low, mask, first, scale, lse):
    """Logits in two parts [T, K], bits of bfloat16: the first becomes their softmax; lse [T]."""
    logits, rest = np.empty(high.shape[1], np.float32), np.empty(high.shape[1], np.float32)
    for t in range(len(high)):
        load(high[t], BFLOAT16, logits)
        load(low[t], BFLOAT16, rest)
        _logits(logits, rest, scale, mask[(first + t) % len(mask)])
        top = highest(logits)
        exponentiate(logits, top)
        total = _total(logits)
        _multiply(logits, np.float32(1) / total)
        save(logits, BFLOAT16, high[t])
        lse[t] = top + np.float32(math.log(total))


# Loops as plain as that, each over one row, are what LLVM makes vectors of.


@compiled
def _logits(logits, rest, scale, mask):
    for i in range(len(logits)):
        logits[i] = (logits[i] + rest[i]) * scale + mask[i]


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
