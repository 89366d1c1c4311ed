"""Compiled rows against slot.py, to the bit."""

import numpy as np
import pytest
import torch

from tests.layers import make_pairs, make_rope
from vllm_deltamem.kernels import rows, slot
from vllm_deltamem.kernels.pairs import pair_code, pair_counts

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def test_every_half_and_what_rounds_to_it():
    every = torch.arange(1 << 16).to(torch.uint16).view(torch.float16)
    numbers = every[every.isfinite()].float()
    between = torch.cat([numbers, numbers.nextafter(torch.tensor(1e9)), numbers.nextafter(torch.tensor(-1e9))])
    near = numbers.unique()
    halfway = (near[1:] + near[:-1]) / 2
    x = torch.cat([between, halfway, torch.tensor([65519.0, 65520.0, 1e30, -1e30, torch.inf, -torch.inf])])
    row = np.empty(len(x), np.uint16)
    rows.save(x.numpy(), rows.KINDS[torch.float16], row)
    assert torch.equal(torch.from_numpy(row).view(torch.float16), x.half())
    back = torch.empty(len(x))
    rows.load(row, rows.KINDS[torch.float16], back.numpy())
    assert torch.equal(back, x.half().float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_rounded_as_pytorch_does(dtype):
    x = torch.cat([torch.randn(9999) * 3.0**i for i in range(-9, 10)])
    rounded = torch.empty(len(x), dtype=dtype)
    rows.save(x.numpy(), rows.KINDS[dtype], rows.as_bits(rounded))
    assert torch.equal(rounded, x.to(dtype))
    back = torch.empty(len(x))
    rows.load(rows.as_bits(rounded), rows.KINDS[dtype], back.numpy())
    assert torch.equal(back, rounded.float())


@pytest.mark.parametrize("kind", ["neox", "interleaved", "partial"])
@pytest.mark.parametrize("back", [False, True])
def test_turning(kind, back):
    x, rope, position = torch.randn(40, 32), make_rope(kind, 32), torch.arange(40) * 50
    out = torch.empty_like(x)
    angles = (rope.cos.contiguous().numpy(), rope.sin.contiguous().numpy())
    rows.turn(x.numpy(), position.numpy(), *angles, rope.interleaved, back, out.numpy())
    assert torch.equal(out, slot.rotate(x, position, rope, inverse=back))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("size", [32, 48, 80, 128])
@pytest.mark.parametrize("spread", [1e-6, 0.01, 1.0, 300.0, 9e4])
def test_codes(dtype, width, size, spread):
    torch.manual_seed(0)
    x = torch.randn(50, size) * spread + torch.randn(50, 1)
    x[0] = 3.0  # a constant vector has no range to scale
    x = x.to(dtype).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).float()
    codes, affine = slot.encode(x, width, dtype)
    read = slot.decode(codes, affine, width, dtype)
    assert read.isfinite().all()
    mine = torch.zeros_like(codes), torch.zeros_like(affine), torch.zeros_like(read)
    rows.encode(x.numpy(), width, rows.KINDS[dtype], mine[0].view(torch.uint8).numpy(), *map(rows.as_bits, mine[1:]))
    for actual, expected in zip(mine, (codes, affine, read), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 32, 80, 128])
@pytest.mark.parametrize("bits", [3, 5])
@pytest.mark.parametrize("spread", [1e-6, 0.01, 1.0, 300.0])
def test_codes_of_pairs(dtype, bits, size, spread):
    torch.manual_seed(0)
    x = torch.randn(50, size) * spread + torch.randn(50, 1) * spread
    pairs = pair_code(make_pairs(1, size), bits, 1, "cpu").of(0)
    x[0], x[1, ::3] = 0, 1e9
    codes, gain = slot.encode(x, bits, dtype, pairs)
    read = slot.decode(codes, gain, bits, dtype, pairs)
    mine = torch.zeros_like(codes), torch.zeros_like(gain), torch.zeros_like(read)
    place, step, wide = pairs.place.numpy(), pairs.step.numpy(), pair_counts(size, bits)[0]
    rows.encode_pairs(x.numpy(), place, step, wide, rows.KINDS[dtype], *map(rows.as_bits, mine))
    for actual, expected in zip(mine, (codes, gain, read), strict=True):
        assert torch.equal(actual, expected)
