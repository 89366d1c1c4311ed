"""A row that decodes alone rounds as it does in a batch or a prompt, in products of every width."""

import pytest
import torch

from vllm_deltamem.patches import cpu_products

if torch.cuda.is_available():
    pytest.skip("vLLM's CPU build alone has these products", allow_module_level=True)


@pytest.fixture
def linear():
    """(weight [n, k], bias) -> a function of x [..., k], as vLLM's linear layers compute it once the patch is applied.

    That is oneDNN, or PyTorch where oneDNN has no products of the dtype on this machine.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    cpu_products.apply()

    def make(weight, bias):
        layer = torch.nn.Linear(*weight.shape[::-1], dtype=weight.dtype).requires_grad_(False)
        layer.weight.copy_(weight), layer.bias.copy_(bias)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        return lambda x: layer.cpu_linear(x, layer.weight, layer.bias)

    return make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("outputs, inputs", [(128, 64), (100, 72), (128, 896), (576, 1536), (896, 4864), (100, 1000)])
def test_a_row_has_the_same_bits_alone_and_among_others(linear, dtype, outputs, inputs):
    """Also of shapes that vLLM's own kernel for AMX does not take."""
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    x, product = torch.randn(300, inputs).to(dtype), linear(weight, bias)
    together = product(x)
    assert torch.allclose(together, torch.nn.functional.linear(x, weight, bias), rtol=0.02, atol=0.5)
    for count in (1, 2, 3, 16, 33, 100):
        parts = [product(part) for part in x.split(count)]
        assert torch.equal(torch.cat(parts), together), f"{count} rows at a time"
    assert product(x[None, :1]).shape == (1, 1, outputs) and product(x[:0]).shape == (0, outputs)
