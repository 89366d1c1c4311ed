"""Shared by all tests."""

import os
from importlib.util import find_spec

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: a second thread costs more than it gives
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB of a cache, whatever else the machine has in memory

if find_spec("triton") and not torch.cuda.is_available():
    # Triton decides at its first import whether its library runs in the interpreter, as test_triton.py needs it.
    # Servers that tests start must not inherit the variable.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton  # noqa: F401
