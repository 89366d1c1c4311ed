"""Combining partial attentions on the CPU: against the formula in fp64, over ragged groups, passes and dtypes."""

import numpy as np
import pytest
import torch

from vllm_deltamem.kernels.cpuattention import combine
from vllm_deltamem.kernels.readout import MASKED
from vllm_deltamem.kernels.rows import KINDS, as_bits

SPARE = 3  # rows beyond what is asked for


def make(passes, tokens, group, size, dtype):
    """What so many passes of a group of heads saw [P, rows, D], and its log-sum-exp."""
    rows = group * tokens + SPARE
    return torch.randn(passes, rows, size).to(dtype), 4 * torch.randn(passes, rows)


def combined(seen, lse, head, group, out, cut=0, sink_logits=None):
    """All rows of a group, those before a cut apart from the others."""
    sink_logits = torch.full(out.shape[1:2], -torch.inf) if sink_logits is None else sink_logits
    for first, last in ((0, cut), (cut, group * len(out))):
        part = [x[:, first : max(last, first + 1)].contiguous() for x in (seen, lse)]
        combine(
            KINDS[out.dtype], as_bits(part[0]), part[1].numpy(), sink_logits.numpy(), head, first, last, as_bits(out)
        )


@pytest.mark.parametrize("dtype,close", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("tokens,group,size", [(1, 3, 64), (5, 7, 32), (64, 1, 80)])
def test_passes_are_combined_by_their_log_sum_exp(passes, tokens, group, size, dtype, close):
    torch.manual_seed(0)
    seen, lse = make(passes, tokens, group, size, dtype)
    out = torch.full((tokens, 2 * group, size), float("nan"), dtype=dtype)
    combined(seen, lse, group, group, out)
    wanted = (seen.double() * lse.double().softmax(0).unsqueeze(-1)).sum(0)[:-SPARE]
    wanted = wanted.unflatten(0, (group, tokens)).transpose(0, 1)
    torch.testing.assert_close(out[:, group:].double(), wanted, atol=close, rtol=close)
    assert out[:, :group].isnan().all(), "the heads of another group"
    parts = torch.empty_like(out)
    combined(seen, lse, group, group, parts, group * tokens // 2)
    assert torch.equal(parts[:, group:], out[:, group:])


def test_what_holds_nothing_adds_nothing():
    seen, lse = make(2, 4, 3, 32, torch.bfloat16)
    lse[1] = MASKED
    out = torch.empty(4, 3, 32, dtype=torch.bfloat16)
    combined(seen, lse, 0, 3, out)
    assert torch.equal(out, seen[0, :-SPARE].unflatten(0, (3, 4)).transpose(0, 1))


@pytest.mark.parametrize("tokens", [2, 7])
def test_a_row_gets_the_same_bits_alone(tokens):
    seen, lse = make(2, tokens, 3, 64, torch.bfloat16)
    out, alone = torch.empty(tokens, 3, 64, dtype=torch.bfloat16), torch.empty(1, 3, 64, dtype=torch.bfloat16)
    combined(seen, lse, 0, 3, out)
    for t in range(tokens):
        rows = np.arange(3) * tokens + t
        combined(seen[:, rows].contiguous(), lse[:, rows].contiguous(), 0, 3, alone)
        assert torch.equal(alone[0], out[t])
