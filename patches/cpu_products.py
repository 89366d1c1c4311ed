"""Gives a row the same bits alone as among others in products of vLLM's linear layers on the CPU."""

import torch

AMX = torch.cpu._is_amx_tile_supported()
# With AMX oneDNN splits sums by the number of rows, and by threads: products of 16-bit numbers all have as many rows.
BLOCK = 32
# Else by one row or more: two give the same bits; four are faster with AVX-512, slower without (benchmarks/NOTES.md).
FEWEST = 4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 2


def apply() -> None:
    """Replace vllm._custom_ops.onednn_mm, and have it take every unquantised linear layer and head on the CPU."""
    from vllm import _custom_ops
    from vllm.utils.torch_utils import direct_register_custom_op

    if hasattr(_custom_ops.onednn_mm, "deltamem"):
        return
    # An operator, since torch.compile traces the layers once for any number of rows and would drop a condition.
    direct_register_custom_op("deltamem_onednn_mm", product, fake_impl=empty_product)
    onednn_mm.deltamem = True
    _custom_ops.onednn_mm = onednn_mm
    if AMX:  # small weights go to a kernel that sums up to four rows otherwise than five
        from vllm.model_executor.layers import utils

        utils._CPU_SGL_GEMM_MAX_WEIGHT_BYTES = 0


def onednn_mm(dnnl_handler, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., k] times the handler's weight [k, n], plus bias [n]: [..., n], of x's dtype."""
    run = torch.ops.vllm.deltamem_onednn_mm if torch.compiler.is_compiling() else product
    return run(x, bias, dnnl_handler.handler_tensor, dnnl_handler.n)


def product(x: torch.Tensor, bias: torch.Tensor | None, handler: torch.Tensor, n: int) -> torch.Tensor:
    """Rows in blocks of BLOCK with AMX, else all at once; fewer than BLOCK or FEWEST go through beside other rows."""
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    block = BLOCK if AMX and x.dtype != torch.float32 else max(count, FEWEST)
    out = x.new_empty((count, n))
    whole = count - count % block
    for first in range(0, whole, block):
        torch.ops._C.onednn_mm(out[first : first + block], rows[first : first + block], bias, handler)
    if whole < count:
        padded, padded_out = x.new_zeros((block, x.shape[-1])), x.new_empty((block, n))
        padded[: count - whole] = rows[whole:]
        torch.ops._C.onednn_mm(padded_out, padded, bias, handler)
        out[whole:] = padded_out[: count - whole]
    return out.view(*x.shape[:-1], n)


def empty_product(x: torch.Tensor, bias: torch.Tensor | None, handler: torch.Tensor, n: int) -> torch.Tensor:
    """The shape of `product`, for torch.compile."""
    return x.new_empty((*x.shape[:-1], n))
