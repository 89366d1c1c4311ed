"""Keeps single rows out of vLLM's oneDNN products, whose sums are taken otherwise for one row than for several."""

import torch

# Rows of a product: two give the same bits; four are faster with AVX-512, slower without (benchmarks/NOTES.md).
FEWEST = 4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 2


def apply() -> None:
    """Replace vllm._custom_ops.onednn_mm, the product of every unquantised linear layer and head on the CPU."""
    from vllm import _custom_ops
    from vllm.utils.torch_utils import direct_register_custom_op

    if hasattr(_custom_ops.onednn_mm, "deltamem"):
        return
    # An operator, since torch.compile traces the layers once for any number of rows and would drop a condition.
    direct_register_custom_op("deltamem_onednn_mm", product, fake_impl=empty_product)
    onednn_mm.deltamem = True
    _custom_ops.onednn_mm = onednn_mm


def onednn_mm(dnnl_handler, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., k] times the handler's weight [k, n], plus bias [n]: [..., n], of x's dtype."""
    run = torch.ops.vllm.deltamem_onednn_mm if torch.compiler.is_compiling() else product
    return run(x, bias, dnnl_handler.handler_tensor, dnnl_handler.n)


def product(x: torch.Tensor, bias: torch.Tensor | None, handler: torch.Tensor, n: int) -> torch.Tensor:
    """A row of x gives the same bits alone as among others: fewer than FEWEST rows go through beside their copies."""
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count < FEWEST:
        rows = torch.cat([rows] * FEWEST)
    out = x.new_empty((len(rows), n))
    torch.ops._C.onednn_mm(out, rows, bias, handler)
    return out[:count].view(*x.shape[:-1], n)


def empty_product(x: torch.Tensor, bias: torch.Tensor | None, handler: torch.Tensor, n: int) -> torch.Tensor:
    """The shape of `product`, for torch.compile."""
    return x.new_empty((*x.shape[:-1], n))
