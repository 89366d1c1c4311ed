"""vLLM's CPU worker beside Numba, in a process of its own: this one may have been patched."""

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
