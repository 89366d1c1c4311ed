"""Partial attentions on the CPU joined by their log-sum-exp, compiled: one pass where PyTorch takes twenty."""

import math

import numpy as np
import torch

from .rows import KINDS, as_bits, compiled, load, save


def combine(near, near_lse, parts, out) -> None:
    """Join what queries saw in their ring and in their memory (Milakov & Gimelshein 2018, arXiv 1805.02867).

    near [T, G, R or more, D] and near_lse [G, T, R or more] fp32, contiguous: of the ring, of every kv head.
    parts: of the memory, pass by pass, (partial [1, P, R * T or more, D], log-sum-exp) of some heads; may be empty.
    out [T, H, D]: written, in the dtype of the partials.
    """
    if not parts:
        rows = out.view(len(out), near.shape[1], -1, out.shape[2])
        rows.copy_(near[:, :, : rows.shape[2]])
        return
    memory, memory_lse = (torch.cat(column, 1)[0] for column in zip(*parts, strict=True))
    _combine(KINDS[out.dtype], as_bits(near), near_lse.numpy(), as_bits(memory), memory_lse.numpy(), as_bits(out))


def compile_combine(dtype: torch.dtype) -> None:
    """Compile it for a dtype, or load it from Numba's cache."""
    part, lse = torch.zeros(1, 1, 1, 2, dtype=dtype), torch.zeros(1, 1, 1)
    combine(part, lse, [(part, lse)], torch.empty(1, 1, 2, dtype=dtype))


@compiled
def _combine(kind, near, near_lse, memory, memory_lse, out):
    """memory [P * G, R * T or more, D]: P passes over the heads."""
    tokens, heads, size = out.shape
    kv_heads = len(near_lse)
    group, parts = heads // kv_heads, 1 + len(memory) // kv_heads
    lse, part, joined = np.empty(parts, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    for g in range(kv_heads):
        for r in range(group):
            for t in range(tokens):
                row = r * tokens + t
                lse[0] = near_lse[g, t, r]
                for p in range(1, parts):
                    lse[p] = memory_lse[(p - 1) * kv_heads + g, row]
                top, total = lse.max(), np.float32(0)
                joined[:] = 0
                for p in range(parts):
                    share = np.float32(math.exp(lse[p] - top))
                    load(near[t, g, r] if p == 0 else memory[(p - 1) * kv_heads + g, row], kind, part)
                    total += share
                    for d in range(size):
                        joined[d] += part[d] * share
                for d in range(size):
                    joined[d] /= total
                save(joined, kind, out[t, g * group + r])
