"""Joining partial attentions on the CPU: against the formula in fp64, over ragged groups, passes and dtypes."""

import pytest
import torch

from vllm_deltamem.kernels.cpucombine import combine
from vllm_deltamem.kernels.readout import MASKED


def make(passes, tokens, kv_heads, group, size, dtype):
    """(near, near_lse, parts of one head each) with rows beyond what is asked for."""
    spare = 3
    near = torch.randn(tokens, kv_heads, group + spare, size).to(dtype)
    near_lse = 4 * torch.randn(kv_heads, tokens, group + spare)
    rows = group * tokens + spare
    calls = [(torch.randn(1, 1, rows, size).to(dtype), 4 * torch.randn(1, 1, rows)) for _ in range(passes * kv_heads)]
    return near, near_lse, calls


def runs(calls, kv_heads):
    """The same parts with all heads of a pass but the first in one."""
    found = []
    for first in range(0, len(calls), kv_heads):
        found.append(calls[first])
        if kv_heads > 1:
            found.append(tuple(torch.cat(x, 1) for x in zip(*calls[first + 1 : first + kv_heads], strict=True)))
    return found


def expected(near, near_lse, calls, tokens, kv_heads, group):
    """[T, G, R, D] fp64."""
    seen, weights = [near[:, :, :group].double()], [near_lse[:, :, :group].permute(1, 0, 2).double()]
    for first in range(0, len(calls), kv_heads):
        heads = calls[first : first + kv_heads]
        out = torch.stack([part[0, 0, : group * tokens].unflatten(0, (group, tokens)) for part, _ in heads])
        lse = torch.stack([lse[0, 0, : group * tokens].unflatten(0, (group, tokens)) for _, lse in heads])
        seen.append(out.permute(2, 0, 1, 3).double())
        weights.append(lse.permute(2, 0, 1).double())
    share = torch.stack(weights).softmax(0).unsqueeze(-1)
    return (torch.stack(seen) * share).sum(0)


@pytest.mark.parametrize("dtype,close", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("passes", [0, 1, 2])
@pytest.mark.parametrize("tokens,kv_heads,group,size", [(1, 3, 3, 64), (5, 2, 7, 32), (64, 1, 1, 80)])
def test_parts_are_joined_by_their_log_sum_exp(passes, tokens, kv_heads, group, size, dtype, close):
    torch.manual_seed(0)
    near, near_lse, calls = make(passes, tokens, kv_heads, group, size, dtype)
    out = torch.full((tokens, kv_heads * group, size), float("nan"), dtype=dtype)
    combine(near, near_lse, calls, out)
    wanted = expected(near, near_lse, calls, tokens, kv_heads, group)
    torch.testing.assert_close(out.double(), wanted.flatten(1, 2), atol=close, rtol=close)
    together = torch.empty_like(out)
    combine(near, near_lse, runs(calls, kv_heads), together)
    assert torch.equal(together, out)


def test_what_holds_nothing_adds_nothing():
    near, near_lse, calls = make(1, 4, 2, 3, 32, torch.bfloat16)
    calls = [(part, torch.full_like(lse, MASKED)) for part, lse in calls]
    out = torch.empty(4, 6, 32, dtype=torch.bfloat16)
    combine(near, near_lse, calls, out)
    assert torch.equal(out, near[:, :, :3].flatten(1, 2))


@pytest.mark.parametrize("tokens", [2, 7])
def test_a_row_gets_the_same_bits_alone(tokens):
    near, near_lse, calls = make(1, tokens, 2, 3, 64, torch.bfloat16)
    out, alone = torch.empty(tokens, 6, 64, dtype=torch.bfloat16), torch.empty(1, 6, 64, dtype=torch.bfloat16)
    combine(near, near_lse, calls, out)
    for t in range(tokens):
        rows = [r * tokens + t for r in range(3)]
        own = [(part[:, :, rows].contiguous(), lse[:, :, rows].contiguous()) for part, lse in calls]
        combine(near[t : t + 1], near_lse[:, t : t + 1].contiguous(), own, alone)
        assert torch.equal(alone[0], out[t])
