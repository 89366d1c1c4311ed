"""Gives a row the same bits alone as among others in products of vLLM's linear layers on the CPU."""

import sys

import torch

AMX = torch.cpu._is_amx_tile_supported()
# Rows of a product: two give the same bits; four are faster with AVX-512, slower without (benchmarks/NOTES.md).
FEWEST = 4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 2
# With AMX oneDNN splits sums by the number of rows, and by threads: a product of 16-bit numbers has as many as this.
BLOCK = 32
FEWEST_PACKED = 8  # vLLM's own kernel for AMX sums up to four rows otherwise than five


def apply() -> None:
    """Replace what unquantised linear layers and heads call on the CPU in vllm._custom_ops."""
    from vllm import _custom_ops
    from vllm.utils.torch_utils import direct_register_custom_op

    if hasattr(_custom_ops.onednn_mm, "deltamem"):
        return
    # Operators, since torch.compile traces the layers once for any number of rows and would drop a condition.
    direct_register_custom_op("deltamem_onednn_mm", product, fake_impl=empty_product)
    direct_register_custom_op("deltamem_packed_mm", packed_product, fake_impl=empty_product)
    onednn_mm.deltamem = True
    _custom_ops.onednn_mm, _custom_ops.weight_packed_linear_cpu = onednn_mm, packed_mm
    if AMX:
        from vllm.model_executor.layers import utils

        utils._CPU_SGL_GEMM_MAX_WEIGHT_BYTES = sys.maxsize  # its own kernel, else taken for small weights only


def onednn_mm(dnnl_handler, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., k] times the handler's weight [k, n], plus bias [n]: [..., n], of x's dtype."""
    run = torch.ops.vllm.deltamem_onednn_mm if torch.compiler.is_compiling() else product
    return run(x, bias, dnnl_handler.handler_tensor, dnnl_handler.n)


def packed_mm(x: torch.Tensor, packed: torch.Tensor, n: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., k] times a weight [n, k] packed for AMX, plus bias [n]: [..., n], of x's dtype."""
    run = torch.ops.vllm.deltamem_packed_mm if torch.compiler.is_compiling() else packed_product
    return run(x, bias, packed, n)


def product(x: torch.Tensor, bias: torch.Tensor | None, handler: torch.Tensor, n: int) -> torch.Tensor:
    """See onednn_mm."""
    rows = x.reshape(-1, x.shape[-1])
    block = BLOCK if AMX and x.dtype != torch.float32 else max(len(rows), FEWEST)
    out = _by_blocks(rows, block, n, lambda out, some: torch.ops._C.onednn_mm(out, some, bias, handler))
    return out.view(*x.shape[:-1], n)


def packed_product(x: torch.Tensor, bias: torch.Tensor | None, packed: torch.Tensor, n: int) -> torch.Tensor:
    """See packed_mm."""
    rows = x.reshape(-1, x.shape[-1])
    block = max(len(rows), FEWEST_PACKED)
    out = _by_blocks(rows, block, n, lambda out, some: torch.ops._C.weight_packed_linear(out, some, packed, bias, True))
    return out.view(*x.shape[:-1], n)


def empty_product(x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, n: int) -> torch.Tensor:
    """The shape of both, for torch.compile."""
    return x.new_empty((*x.shape[:-1], n))


def _by_blocks(rows, block, n, multiply):
    """[T, n] of rows [T, k]: multiply(out, rows) with `block` of them at a time, the last ones beside rows of zeros."""
    out = rows.new_empty((len(rows), n))
    whole = len(rows) - len(rows) % block
    for first in range(0, whole, block):
        multiply(out[first : first + block], rows[first : first + block])
    if whole < len(rows):
        left = rows.new_zeros((block, rows.shape[1]))
        left[: len(rows) - whole] = rows[whole:]
        found = rows.new_empty((block, n))
        multiply(found, left)
        out[whole:] = found[: len(rows) - whole]
    return out
