"""Partial attention on the CPU: what queries see of some entries, and its log-sum-exp.

By PyTorch's flash attention; of many entries in bfloat16, which that does not multiply with AVX512_BF16, by oneDNN's
products, with a softmax between them that is compiled. Either way a row rounds alike however many rows share the call,
in whole multiples of row_block: how many keys there are decides which way it goes.
"""

import functools
import math
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch.nn.functional import pad

from .rows import KINDS, as_bits, compiled, exponentiate, highest, load, save, summed

BFLOAT16 = KINDS[torch.bfloat16]
SMALL = 1 << 10  # logits of a call that one thread has done before another one is awake
FEW_ROWS = 8  # of a head: keys are read as fast by one thread as by two, which wait for one another
TASK_ROWS = 32  # so many rows of a head are one task to PyTorch, whose products may then start threads of their own
MANY = 1 << 11  # keys from which on a decoded token loses little by the products' further calls
AT_ONCE = 1 << 20  # logits, in two parts of two bytes each
AMX = torch.cpu._is_amx_tile_supported()
AMX_TILE = 32  # bfloat16 in a row


def partial_attention(q, k, v, mask, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what queries see [B, P, T, D], in their dtype, and its log-sum-exp [B, P, T] fp32.

    q [B, P, T, D], T a multiple of row_block; k and v [B, P, K, D]; mask fp32, broadcast to [B, P, T, K], finite.
    """
    by_products = k.shape[2] >= MANY and q.dtype == torch.bfloat16 and multiplies_bfloat16()
    if q.shape[:3].numel() * k.shape[2] < SMALL or (by_products and q.shape[2] <= FEW_ROWS):
        threads = one_thread()
    elif q.shape[2] <= TASK_ROWS and (by_products or q.shape[:2].numel() == 1):
        threads = at_most(2)  # three and more round a product otherwise than one does, two as one
    else:
        threads = nullcontext()
    with threads:
        if by_products:
            return _by_products(q, k, v, mask, scale)
        return _flash(q, k, v, mask, scale)


def row_block(q) -> int:
    """The rows of a call are a multiple of so many, for queries [..., D]: fewer may be multiplied otherwise.

    Those of MKL's fp32 products are, of long rows on a CPU of Intel's.
    """
    return 4 if q.dtype == torch.bfloat16 or q.shape[-1] <= 64 else 16


def compile_partial(dtype: torch.dtype) -> None:
    """Compile what this needs for a dtype, or load it from Numba's cache."""
    keys = torch.zeros(1, 1, MANY, 16, dtype=dtype)
    partial_attention(keys[:, :, : row_block(keys)], keys, keys, torch.zeros(1, 1, 1, MANY), 1.0)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether oneDNN does so faster than flash attention does, which knows AMX."""
    return torch.cpu._is_avx512_bf16_supported() and not AMX


def _flash(q, k, v, mask, scale):
    """With AMX, 64 rows and more go another way than fewer do, which rounds otherwise unless all fill whole tiles."""
    size = q.shape[3]
    if AMX and q.dtype == torch.bfloat16:
        columns, keys = -size % AMX_TILE, -k.shape[2] % AMX_TILE
        if columns or keys:
            q, k, v = pad(q, (0, columns)), pad(k, (0, columns, 0, keys)), pad(v, (0, columns, 0, keys))
            mask = pad(mask, (0, keys), value=-math.inf)
    seen, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    return seen[..., :size], lse


def one_thread():
    """For many small operations: to wake other threads for one takes longer than the operation."""
    return at_most(1)


@contextmanager
def at_most(most):
    """With no more of PyTorch's threads."""
    threads = torch.get_num_threads()
    # vLLM replaces torch.set_num_threads, as it binds threads to cores: they stay so
    torch._C.set_num_threads(min(most, threads))
    try:
        yield
    finally:
        torch._C.set_num_threads(threads)


def _by_products(q, k, v, mask, scale):
    """One head at a time, in few operations of PyTorch's, views included: a decoded token waits for each of them."""
    rows, keys = q.shape[2], k.shape[2]
    step = min(max(AT_ONCE // keys // row_block(q), 1) * row_block(q), rows)
    seen, high, low = q.new_empty(q.shape), *(q.new_empty(step, keys) for _ in range(2))
    lse, masks = np.empty(q.shape[:3], np.float32), mask.expand(*q.shape[:2], -1, -1).numpy()
    parts, scale = (high, low, as_bits(high), as_bits(low)), np.float32(scale)
    for b in range(len(q)):
        heads = (x.unbind() for x in (q[b], k[b].mT, v[b], seen[b]))
        for query, turned, value, out, found, bias in zip(*heads, lse[b], masks[b], strict=True):
            bias = np.ascontiguousarray(bias)
            for first in range(0, rows, step):
                some = slice(first, first + step)
                high, low, *bits = parts if first + step <= rows else [x[: rows - first] for x in parts]
                # A product rounds to bfloat16. The next one is what it leaves out: together, 16 bits of a logit.
                torch.mm(query[some], turned, out=high)
                torch.addmm(high, query[some], turned, beta=-1, out=low)
                _softmax(*bits, bias, first, scale, found[some])
                torch.mm(high, value, out=out[some])
    return seen, torch.from_numpy(lse)


@compiled
def _softmax(high, low, mask, first, scale, lse):
    """Logits in two parts [T, K], bits of bfloat16: the first becomes their softmax; lse [T]."""
    logits, rest = np.empty(high.shape[1], np.float32), np.empty(high.shape[1], np.float32)
    for t in range(len(high)):
        load(high[t], BFLOAT16, logits)
        load(low[t], BFLOAT16, rest)
        _join(logits, rest, scale, mask[(first + t) % len(mask)])
        top = highest(logits)
        exponentiate(logits, top)
        total = _total(logits)
        _multiply(logits, np.float32(1) / total)
        save(logits, BFLOAT16, high[t])
        lse[t] = top + np.float32(math.log(total))


# Loops as plain as that, each over one row, are what LLVM makes vectors of.


@compiled
def _join(logits, rest, scale, mask):
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
