"""A row that decodes alone rounds as it does in a batch or a prompt, in products of every width."""

import pytest
import torch

from vllm_deltamem.patches import single_row

if torch.cuda.is_available():
    pytest.skip("vLLM's CPU build alone has these products", allow_module_level=True)


@pytest.fixture
def product(monkeypatch):
    """(weight [n, k], x [..., k], bias) -> [..., n], as vLLM's linear layers compute it once the patch is applied."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    single_row.apply()

    def multiply(weight, x, bias=None):
        return _custom_ops.onednn_mm(_custom_ops.create_onednn_mm(weight.t(), 32), x, bias)

    return multiply


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("inputs", [64, 1024, 1536, 4864])
def test_a_row_has_the_same_bits_alone_and_among_others(product, dtype, inputs):
    weight, x, bias = torch.randn(576, inputs).to(dtype), torch.randn(33, inputs).to(dtype), torch.randn(576).to(dtype)
    together = product(weight, x, bias)
    assert torch.allclose(together, torch.nn.functional.linear(x, weight, bias), rtol=0.02, atol=0.5)
    for count in (1, 2, 3, 16):
        parts = [product(weight, part, bias) for part in x.split(count)]
        assert torch.equal(torch.cat(parts), together), f"{count} rows at a time"
    assert product(weight, x[None, :1]).shape == (1, 1, 576) and product(weight, x[:0]).shape == (0, 576)
