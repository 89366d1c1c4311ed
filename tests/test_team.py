"""PyTorch's threads for compiled functions: every task is done once, by whom it may be, and failures are told."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.layers import make_layer
from vllm_deltamem.kernels import cpu
from vllm_deltamem.kernels.rows import compiled
from vllm_deltamem.kernels.team import add, each, replace, value

ALONE = """
import torch
from tests.layers import make_layer
from vllm_deltamem.kernels import chains, cpu
torch.set_num_threads(2)
slab, views = make_layer()
cpu.compile_walk(views(slab), None)
assert chains.walk.stats.cache_hits and not chains.walk.stats.cache_misses
"""

BESIDE_NUMBAS = """
import ctypes
from pathlib import Path
import numba, numpy as np, torch
from tests.layers import make_layer
from vllm_deltamem.kernels import cpu
library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), "libgomp.so.1")))
numba.njit(parallel=True)(lambda x: x + 1)(np.ones(1000))
library.omp_set_max_active_levels(5)  # as Numba's threads do, where they are OpenMP's
slab, views = make_layer()
cpu.compile_walk(views(slab), None)
assert library.omp_get_max_active_levels() == 1
"""


@compiled
def task(i, given):
    done, failing = given
    done[i] += 1
    if i == failing:
        raise ValueError("as it was told to")


@compiled
def run(done, failing):
    return each(task, len(done), (done, failing))


@compiled
def count(i, given):
    """Add to a number in three ways, which others do at the same time."""
    numbers, _ = given
    for _ in range(1000):
        add(numbers, 0, 2)
        old = value(numbers, 1)
        while not replace(numbers, 1, old, old + 3):
            old = value(numbers, 1)


@compiled
def count_together(numbers, times):
    return each(count, times, (numbers, times))


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    most = torch.get_num_threads()
    torch._C.set_num_threads(request.param)  # vLLM replaces torch.set_num_threads
    yield
    torch._C.set_num_threads(most)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
def test_every_task_is_done_once(threads, count):
    done = np.zeros(count, np.int64)
    assert run(done, -1) == 0 and (done == 1).all()


def test_a_failure_is_told_and_stops_no_other_task(threads):
    done = np.zeros(100, np.int64)
    assert run(done, 40) == 1 and (done == 1).all()


def test_no_count_is_lost(threads):
    numbers = np.zeros(2, np.int64)
    assert count_together(numbers, 8) == 0 and numbers.tolist() == [16_000, 24_000]


def test_another_process_takes_it_from_numbas_cache():
    slab, views = make_layer()
    cpu.compile_walk(views(slab), None)
    subprocess.run([sys.executable, "-c", ALONE], check=True)


def test_products_stay_in_their_thread_beside_numbas_own():
    subprocess.run([sys.executable, "-c", BESIDE_NUMBAS], check=True)
