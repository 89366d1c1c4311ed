"""Which floats this machine multiplies fast."""

import torch


def fast_dtype(dtype: torch.dtype, device: str = "cpu") -> torch.dtype:
    """`dtype`, or float32 in place of bfloat16 on a CPU for whose instructions oneDNN has no products of that.

    PyTorch's own then take several times as long as those of float32: on x86 without AVX-512, say.
    """
    if dtype != torch.bfloat16 or torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return dtype
    return dtype if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
