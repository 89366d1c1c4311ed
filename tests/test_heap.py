"""The heap of a CPU worker keeps what was freed."""

import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource
from vllm_deltamem.heap import keep_freed

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def work():
    blocks = [libc.malloc({size}) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, {size})
    for block in reversed(blocks):
        libc.free(ctypes.c_void_p(block))

{prepare}
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(prepare: str, size: int) -> int:
    """Page faults of a new process that fills four blocks and frees them, the last of a few times."""
    code = FAULTS.format(prepare=prepare, size=size)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("size", [8 << 20, 100 << 20])
def test_what_was_freed_is_not_faulted_in_again(size):
    assert faults("keep_freed()", size) < 100 < faults("", size)
