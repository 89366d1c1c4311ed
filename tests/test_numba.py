"""vLLM's CPU worker beside Numba, and Numba without a cache, in processes of their own: this one may be patched."""

import subprocess
import sys

SCAN = """
import numba
from vllm.triton_utils import dispatcher
from vllm_deltamem.patches import cpu_numba
if {patched}:
    cpu_numba.apply()
dispatcher._rebind_kernels([(len, dispatcher.KernelOverride(len, len))])
"""


def scan(patched: bool) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", SCAN.format(patched=patched)], capture_output=True, text=True)


def test_a_worker_starts_where_numba_is_loaded():
    done = scan(patched=True)
    assert done.returncode == 0, done.stderr


def test_the_patch_is_still_needed():
    assert "_lib_fn_wrapper" in scan(patched=False).stderr


def test_without_a_folder_to_write_to_every_process_compiles_anew():
    code = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
from vllm_deltamem.kernels import rows
assert rows.half_bits(1.0) == 0x3C00
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
