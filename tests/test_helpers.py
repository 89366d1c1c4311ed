"""Helpers: what other threads attend to is what the caller would have, whatever it does in the meantime."""

import threading

import pytest
import torch

from tests.layers import make_batch, make_layer, make_policy, make_rope, make_tokens
from vllm_deltamem.kernels import cpu
from vllm_deltamem.kernels.helpers import OPEN, Helpers


@pytest.mark.parametrize("trained", [0, 90], ids=["near", "far"])
@pytest.mark.parametrize("threads", [1, 3])
def test_prompt_is_attended_as_without_helpers(threads, trained):
    slab, views = make_layer(exact=(4, 9, 30), coarse=(40, 100, 25), dtype=torch.bfloat16, slots=2)
    rope, policy, (k, v, q) = make_rope("neox", 32, trained), make_policy(), make_tokens(300, dtype=torch.bfloat16)
    slabs, outs = [slab, slab.clone()], [torch.zeros_like(q), torch.zeros_like(q)]
    for slab, out, helpers in zip(slabs, outs, (None, Helpers(threads)), strict=True):
        slots, scratch = views(slab), {}
        for first in range(0, 300, 16):
            piece = slice(first, min(first + 16, 300))
            batch = make_batch([(1, piece.stop - first, piece.stop)])
            cpu.write(k[piece], v[piece], slots, *batch)
            cpu.attend(q[piece], slots, *batch, 32**-0.5, out[piece], rope, scratch=scratch, helpers=helpers)
            cpu.merge(slots, *batch, rope, policy, scratch=scratch)
        if helpers:
            helpers.finish()
    assert torch.equal(*outs) and outs[0].any(1).all()
    assert torch.equal(*slabs)


def test_every_result_arrives_once_and_work_is_bounded():
    helpers, release, begun, results = Helpers(1), threading.Event(), threading.Event(), []
    caller = threading.current_thread()

    def wait():
        begun.set()
        assert release.wait(60)
        return [threading.current_thread() is caller]

    helpers.submit(wait, results.append)
    assert begun.wait(60)
    for _ in range(9):
        helpers.submit(lambda: [threading.current_thread() is caller], results.append)
    assert not results and len(helpers._open) <= OPEN
    threading.Timer(0.2, release.set).start()
    helpers.finish()
    assert len(results) == 10 and not helpers._open
    assert results.count([False]) == 1, "the caller does what the thread has not begun"
    helpers.finish()
    assert len(results) == 10


def test_error_of_a_task_reaches_the_caller():
    helpers = Helpers(1)

    def fail():
        raise RuntimeError("no such memory")

    helpers.submit(fail, lambda result: None)
    with pytest.raises(RuntimeError, match="no such memory"):
        helpers.finish()
    results = []
    helpers.submit(lambda: [1], results.append)
    helpers.finish()
    assert results == [[1]]
