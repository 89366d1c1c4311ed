"""Which floats this machine multiplies fast."""

import torch


def fast_dtype(dtype: torch.dtype, device: str = "cpu") -> torch.dtype:
    """`dtype`, or float32 in its place on a CPU that has no instructions for it.

    Products of 16 bits then take several times as long as those of float32: on x86 without AVX-512, say.
    """
    if torch.device(device).type != "cpu":
        return dtype
    has_instructions = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype not in has_instructions or has_instructions[dtype]() else torch.float32
