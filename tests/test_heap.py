"""The heap of a CPU worker keeps what was freed."""

import subprocess
import sys

FAULTS = """
import resource, torch
from vllm_deltamem.heap import keep_freed

def work():
    return [torch.zeros(1 << 20) for _ in range(16)]

{prepare}
for _ in range(2):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(prepare: str) -> int:
    """Page faults of the last of a few times that a new process fills 64 MB and frees them."""
    code = FAULTS.format(prepare=prepare)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_what_was_freed_is_not_faulted_in_again():
    assert faults("keep_freed()") < faults("") / 4
