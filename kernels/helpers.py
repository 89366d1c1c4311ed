"""The CPU's other cores, which attend to pieces of a prompt while the caller goes on to merge and to write."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch

MOST_THREADS = 8  # more would wait for the caller's merges
OPEN = 2  # tasks per thread, begun or waiting: each keeps a copy of the memory that it reads


class Helpers:
    """Threads besides the caller's, each with one of PyTorch's.

    A task should be few calls that take long: threads that run Python at the same time wait for one another.
    """

    def __init__(self, threads: int):
        threads = min(threads, MOST_THREADS)
        self._most = OPEN * threads
        self._pool = ThreadPoolExecutor(threads, "deltamem", settle)
        self._open: dict[Future, Callable[[], None]] = {}

    def submit(self, task: Callable[[], None]) -> None:
        """Have a task done by another thread, or at once where many are open: once finish() returns it is done."""
        for future in [future for future in self._open if future.done()]:
            del self._open[future]
            future.result()  # raises what the task raised
        if len(self._open) < self._most:
            self._open[self._pool.submit(torch.inference_mode()(task))] = task
        else:
            task()

    def finish(self) -> None:
        """Do what no thread has begun and wait for the rest. Raises what a task raised."""
        left, self._open = self._open, {}  # an idle server keeps no copies
        for future, task in reversed(left.items()):  # the threads begin with the first
            if future.cancel():
                task()
            else:
                future.result()


def settle() -> None:
    """One thread of PyTorch's for each of ours, on the cores of all threads here: vLLM may bind the caller's to one."""
    torch._C.set_num_threads(1)
    cores = set()
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended since
            cores |= os.sched_getaffinity(int(thread))
    os.sched_setaffinity(0, cores)
