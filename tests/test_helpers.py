"""Helpers: what other threads attend to is what the caller would have, whatever it does in the meantime."""

import threading
from concurrent.futures import wait as futures_wait

import pytest
import torch

from tests.layers import make_batch, make_layer, make_policy, make_rope, make_tokens
from vllm_deltamem.kernels import cpu
from vllm_deltamem.kernels.helpers import OPEN, Helpers
from vllm_deltamem.kernels.readouts import Readouts


@pytest.mark.parametrize("trained", [0, 90], ids=["near", "far"])
@pytest.mark.parametrize("threads", [1, 3])
def test_prompt_is_attended_as_without_helpers(threads, trained):
    slab, views = make_layer(exact=(4, 9, 30), coarse=(40, 100, 25), dtype=torch.bfloat16, slots=2)
    rope, policy, (k, v, q) = make_rope("neox", 32, trained), make_policy(), make_tokens(300, dtype=torch.bfloat16)
    slabs, outs = [slab, slab.clone()], [torch.zeros_like(q), torch.zeros_like(q)]
    for slab, out, helpers in zip(slabs, outs, (None, Helpers(threads)), strict=True):
        slots = views(slab)
        readouts = Readouts(slots)
        for first in range(0, 300, 16):
            piece = slice(first, min(first + 16, 300))
            batch = make_batch([(1, piece.stop - first, piece.stop)])
            cpu.write(k[piece], v[piece], slots, *batch)
            cpu.attend(q[piece], slots, *batch, 32**-0.5, out[piece], rope, readouts=readouts, helpers=helpers)
            cpu.merge(slots, *batch, rope, policy, readouts=readouts)
        if helpers:
            helpers.finish()
    assert torch.equal(*outs) and outs[0].any(1).all()
    assert torch.equal(*slabs)


def test_every_task_is_done_once_and_open_ones_are_bounded():
    helpers, release, begun, callers = Helpers(1), threading.Event(), threading.Event(), []

    def note():
        callers.append(threading.current_thread())

    def wait():
        begun.set()
        assert release.wait(60)
        note()

    helpers.submit(wait)
    assert begun.wait(60)
    for _ in range(9):
        helpers.submit(note)
    assert len(callers) == 10 - OPEN and len(helpers._open) == OPEN
    threading.Timer(0.2, release.set).start()
    helpers.finish()
    assert len(callers) == 10 and not helpers._open
    assert callers.count(threading.current_thread()) == 9, "the caller does what the thread has not begun"
    helpers.finish()
    assert len(callers) == 10


@pytest.mark.parametrize("later", ["submit", "finish"])
def test_error_of_a_task_reaches_the_caller(later):
    helpers, done = Helpers(1), []

    def fail():
        raise RuntimeError("no such memory")

    helpers.submit(fail)
    with pytest.raises(RuntimeError, match="no such memory"):
        if later == "submit":
            futures_wait(helpers._open)
            helpers.submit(lambda: None)
        helpers.finish()
    helpers.submit(lambda: done.append(1))
    helpers.finish()
    assert done == [1]
