"""PyTorch's flash attention and products as compiled functions call them, without Python: by C functions of ATen's.

They are those that code of torch.compile's calls. Rows [N, D] are contiguous, floats of the model's dtype their bits,
with a `kind` as in rows.KINDS. How many threads take part is what PyTorch was told in the thread that calls.
"""

from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import torch
from numba import types

from .rows import BFLOAT16, FLOAT16, FLOAT32, compiled

llvm.load_library_permanently(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def _function(name, *arguments, result=types.int32):
    return types.ExternalFunction(name, result(*arguments))


_ADDRESS, _INT = types.intp, types.int32  # pointers come and go as their addresses
_bfloat16, _float16, _float32 = (_function(f"aoti_torch_dtype_{name}") for name in ("bfloat16", "float16", "float32"))
_make = _function(
    "aoti_torch_create_tensor_from_blob", *[_ADDRESS] * 4, types.int64, _INT, _INT, _INT, _ADDRESS
)  # address, dimensions, sizes, strides, offset, dtype, device and its number, result
_address = _function("aoti_torch_get_data_ptr", _ADDRESS, _ADDRESS)
_delete = _function("aoti_torch_delete_tensor_object", _ADDRESS)
_flash = _function(
    "aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu", *[_ADDRESS] * 3, types.float64, _INT, *[_ADDRESS] * 4
)
_mm_out = _function("aoti_torch_cpu_mm_out", *[_ADDRESS] * 3)
_memcpy = _function("memcpy", *[_ADDRESS] * 3, result=_ADDRESS)


@compiled
def flash(kind, q, k, v, mask, scale, seen, lse):
    """What queries [T, D] see of entries [K, D]: seen [T, D], log-sum-exp [T] fp32. mask: [1 or T, K] fp32.

    Raises RuntimeError when PyTorch refuses the operands.
    """
    (rows, size), keys = q.shape, len(k)
    made, sizes, strides = np.zeros(6, np.int64), np.array([1, 1, rows, size]), np.array([0, 0, size, 1])
    _tensor(kind, q.ctypes.data, sizes, strides, made[0:])
    sizes[2] = keys
    _tensor(kind, k.ctypes.data, sizes, strides, made[1:])
    _tensor(kind, v.ctypes.data, sizes, strides, made[2:])
    sizes[2], sizes[3], strides[2] = len(mask), keys, mask.strides[0] // mask.itemsize
    _tensor(FLOAT32, mask.ctypes.data, sizes, strides, made[3:])
    factor = np.array([scale], np.float64)
    given = made[3:].ctypes.data, factor.ctypes.data, made[4:].ctypes.data, made[5:].ctypes.data
    failed = _flash(made[0], made[1], made[2], 0.0, 0, *given)
    if not failed:
        address = np.empty(2, np.int64)
        _address(made[4], address[0:].ctypes.data)
        _address(made[5], address[1:].ctypes.data)
        _memcpy(seen.ctypes.data, address[0], seen.nbytes)
        _memcpy(lse.ctypes.data, address[1], lse.nbytes)
    _drop(made)
    if failed:
        raise RuntimeError("PyTorch refused the operands of a flash attention.")


@compiled
def product(kind, x, y, transposed, out):
    """out [M, N] = x [M, K] y [K, N], or y [N, K] that is transposed.

    Raises RuntimeError when PyTorch refuses the operands.
    """
    made = np.zeros(3, np.int64)
    _matrix(kind, out, False, made[0:])
    _matrix(kind, x, False, made[1:])
    _matrix(kind, y, transposed, made[2:])
    failed = _mm_out(made[0], made[1], made[2])
    _drop(made)
    if failed:
        raise RuntimeError("PyTorch refused the operands of a matrix product.")


@compiled
def _matrix(kind, x, transposed, made):
    sizes, strides = np.array(x.shape), np.array([x.shape[1], 1])
    if transposed:
        sizes, strides = sizes[::-1].copy(), strides[::-1].copy()
    _tensor(kind, x.ctypes.data, sizes, strides, made)


@compiled
def _tensor(kind, address, sizes, strides, made):
    """made[0] becomes a tensor of PyTorch's that lies there."""
    dtype = _bfloat16() if kind == BFLOAT16 else _float16() if kind == FLOAT16 else _float32()
    _make(address, len(sizes), sizes.ctypes.data, strides.ctypes.data, 0, dtype, 0, 0, made.ctypes.data)


@compiled
def _drop(made):
    for i in range(len(made)):
        if made[i]:
            _delete(made[i])
