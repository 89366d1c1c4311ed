"""Partial attention on the CPU, by tiles of ours and as with AMX: exact, and a row's bits are its own."""

import itertools

import numpy as np
import pytest
import torch

from vllm_deltamem.kernels.cpupartial import Way, partial_attention, way_of
from vllm_deltamem.kernels.lanes import ROWS
from vllm_deltamem.kernels.rows import KINDS, as_bits

LONG = 2112


@pytest.fixture(params=[False, True], ids=["tiles", "as with AMX"])
def way(request):
    """PyTorch's flash attention is tried on every CPU: what it gives is right everywhere, only slower."""
    return lambda dtype: Way(KINDS[dtype], request.param and dtype == torch.bfloat16)


def attend(q, k, v, mask, scale, way=way_of):
    """partial_attention of tensors."""
    seen, lse = torch.empty_like(q), torch.empty(len(q))
    rows = as_bits(q), as_bits(k), as_bits(v), mask.numpy()
    partial_attention(way(q.dtype), *rows, scale, as_bits(seen), lse.numpy())
    return seen, lse


def tensors(t, k, d=64, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    q, key, value = (2 * torch.randn(n, d, generator=generator).to(dtype) for n in (t, k, k))
    return q, key, value, torch.randn(t, k, generator=generator)


def expected(q, k, v, mask, scale):
    logits = q.double() @ k.double().T * scale + mask
    return logits.softmax(-1) @ v.double(), logits.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("t, k", [(16, LONG), (208, LONG), (64, 96), (64, 83), (4, 1)])
@pytest.mark.parametrize("size", [64, 80, 20])
@pytest.mark.parametrize("rows", ["all alike", "each its own", "by turns"])
def test_it_is_attention(way, dtype, t, k, size, rows):
    q, key, value, mask = tensors(t, k, size, dtype=dtype)
    mask = mask[: {"all alike": 1, "each its own": t, "by turns": t // 4}[rows]]
    seen, lse = attend(q, key, value, mask, 0.125, way)
    exact, exact_lse = expected(q, key, value, mask.repeat(t // len(mask), 1), 0.125)
    close, lse_close = (5e-5, 5e-5) if dtype == torch.float32 else (0.04, 5e-4)
    assert seen.dtype == dtype and (seen - exact).abs().max() < close
    assert lse.dtype == torch.float and (lse - exact_lse).abs().max() < lse_close


def test_masked_keys_weigh_nothing(way):
    q, key, value, mask = tensors(8, LONG)
    mask[:, 70:] = -1e30
    value[70:] = 1e30
    seen, lse = attend(q, key, value, mask, 0.125, way)
    exact, exact_lse = expected(q, key[:70], value[:70], mask[:, :70], 0.125)
    assert (seen - exact).abs().max() < 0.04 and (lse - exact_lse).abs().max() < 5e-4
    mask[:] = -1e30
    seen, lse = attend(q, key, value.clamp(max=1), mask, 0.125, way)
    assert (lse < -1e29).all() and seen.isfinite().all(), "an empty memory has no weight beside anything else"


def test_hidden_keys_leave_no_bit():
    """However many come after those that a row sees, as where a piece of a prompt has later tokens."""
    q, key, value, _ = tensors(8, LONG)
    for seen in (1, 31, 32, 200, 256, 257, 700):
        mask = torch.zeros(1, LONG)
        mask[:, seen:] = -1e30
        rows = ((q, key[:k], value[:k], mask[:, :k], 0.125) for k in (LONG, seen))
        whole, alone = (attend(*row, lambda dtype: Way(KINDS[dtype], False)) for row in rows)
        assert all(torch.equal(a, b) for a, b in zip(whole, alone, strict=True)), f"{seen} keys"


def test_logits_are_more_than_bfloat16(way):
    """As large as some models have them, where bfloat16 alone would be off by a fourth."""
    q, key, value, mask = tensors(64, LONG, d=128)
    q, key = 6 * q, 4 * key
    exact, exact_lse = expected(q, key, value, mask, 128**-0.5)
    seen, lse = attend(q, key, value, mask, 128**-0.5, way)
    assert exact_lse.max() > 100 and (lse - exact_lse).abs().max() < 0.01
    assert (seen - exact).abs().max() < 0.06


def test_what_pytorch_refuses_is_an_error():
    q, key, value, mask = tensors(8, 64)
    with pytest.raises(RuntimeError, match="refused the operands"):
        rows = as_bits(q), as_bits(key), as_bits(value), np.zeros((9, 64), np.float32)  # masks of 9 rows for 8
        partial_attention(Way(KINDS[q.dtype], True), *rows, 0.1, as_bits(q), np.empty(8, np.float32))


def check_rows(keys, sizes, rows, threads, dtype=torch.bfloat16):
    """Rows among many and rows alone, in few threads and in many."""
    most = torch.get_num_threads()
    for k, d in itertools.product(keys, sizes):
        q, key, value, mask = tensors(max(rows), k, d, dtype=dtype)
        whole, whole_lse = attend(q, key, value, mask[:1], 0.1)
        for t, count in itertools.product(rows, threads):
            torch._C.set_num_threads(count)
            for first in {0, ROWS, max(rows) - t}:
                part = slice(first, first + t)
                seen, lse = attend(q[part], key, value, mask[:1], 0.1)
                same = torch.equal(seen, whole[part]) and torch.equal(lse, whole_lse[part])
                assert same, f"{t} rows of {d} among {k} keys, {count} threads"
        order = torch.randperm(len(q), generator=torch.Generator().manual_seed(k))
        seen, lse = attend(q[order], key, value, mask[:1], 0.1)
        assert torch.equal(seen, whole[order]) and torch.equal(lse, whole_lse[order]), "each in another place of a tile"
        torch._C.set_num_threads(most)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [32, 64, 80, 128, 256])
def test_a_row_rounds_alike_in_any_company(dtype, d):
    check_rows((40, 67, 281, 320, LONG), (d,), (4, 8, 16, 32, 48, 64, 208, 464), (1, 2), dtype)


@pytest.mark.slow
def test_a_row_rounds_alike_in_any_company_at_length():
    check_rows((2049, 3065, 6400, 12608), (48, 80, 96, 256), (4, 16, 36, 100, 384, 1792), (1, 2, 3, 8))
