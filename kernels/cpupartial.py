"""Partial attention on the CPU, compiled: what queries of one kv head see of some entries, and its log-sum-exp.

By tiles of products (cpuflash.py); in bfloat16 with AMX, which multiplies faster than vectors do, by PyTorch's flash
attention. Either way a row rounds alike however many rows share the call, in whole multiples of ROWS.
"""

from typing import NamedTuple

import numpy as np
import torch

from . import aten, cpuflash
from .rows import KINDS, compiled

AMX = torch.cpu._is_amx_tile_supported()
AMX_TILE = 32  # bfloat16 in a row


class Way(NamedTuple):
    """How a CPU multiplies a dtype."""

    kind: int  # see rows.KINDS
    in_tiles: bool  # AMX's: keys and columns are filled up to whole ones


def way_of(dtype: torch.dtype) -> Way:
    """How this CPU does."""
    return Way(KINDS[dtype], AMX and dtype == torch.bfloat16)


@compiled
def partial_attention(way, q, k, v, mask, scale, seen, lse):
    """Write what queries see [T, D], and its log-sum-exp [T] fp32.

    q [T, D], T a multiple of lanes.ROWS; k and v [K, D]: bits; mask: [M, K] fp32, finite, row t % M is query t's.
    Raises RuntimeError when PyTorch refuses the operands.
    """
    if not way.in_tiles:
        cpuflash.flash(way.kind, q, k, v, mask, np.float32(scale), seen, lse)
        return
    columns, keys, masks = -q.shape[1] % AMX_TILE, -len(k) % AMX_TILE, mask
    if 1 < len(mask) < len(q):
        masks = np.empty((len(q), len(k)), np.float32)
        for t in range(len(q)):
            masks[t] = mask[t % len(mask)]
    if not columns and not keys:
        aten.flash(way.kind, q, k, v, masks, scale, seen, lse)
        return
    # 64 rows and more go another way than fewer do, which rounds otherwise unless all fill whole tiles
    none, wide = np.uint16(0), np.empty((len(q), q.shape[1] + columns), seen.dtype)
    k, v = _padded(k, keys, columns, none), _padded(v, keys, columns, none)
    masks = _padded(masks, 0, keys, np.float32(-np.inf))
    aten.flash(way.kind, _padded(q, 0, columns, none), k, v, masks, scale, wide, lse)
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
