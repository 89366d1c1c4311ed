"""Slots carry nothing from one sequence to the next: looking for the bytes."""

import pytest
import torch

from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.kernels import cpu
from vllm_deltamem.kernels.slot import Rope
from vllm_deltamem.memory import Shape, plan_layout
from vllm_deltamem.plan import MemoryPlan
from vllm_deltamem.pool import SlotPool

SHAPE = Shape(layers=2, kv_heads=2, head_size=32, dtype=torch.float32, max_model_len=512)
SLOTS, LENGTH, SCALE = 3, 300, 32**-0.5
MARK = 1234.5  # in every value of the first tenant


def make_pool():
    layout = plan_layout(SHAPE, DeltaMemConfig(memory=96, segment=16, window=24, pinned=8))
    plan = MemoryPlan(layout, layout, profile=None, merge=True, heads=slice(0, 2), workers=1)
    slab = torch.zeros(SLOTS + 1, layout.slot_bytes, dtype=torch.uint8)
    caches = [slab[:, None, None, i * layout.page_bytes : (i + 1) * layout.page_bytes] for i in range(2)]
    angles = torch.outer(torch.arange(512.0), 1e4 ** -(torch.arange(16) / 16))
    return SlotPool.from_caches(plan, caches, [Rope(angles.cos(), angles.sin(), False)] * 2)


@pytest.fixture
def pool():
    return make_pool()


def run(pool, slot, length, seed, mark=0.0):
    """A sequence of random tokens through all layers; its outputs [length, 4, 32]."""
    generator = torch.Generator().manual_seed(seed)
    segment, outputs = pool.layers[0].segment, torch.empty(length, 4, 32)
    for begin in range(0, length, segment):
        count = min(segment, length - begin)
        rows = torch.tensor([slot]), torch.tensor([0, count]), torch.tensor([begin + count])
        cpu.reset(pool.slab, *rows)
        pool.write_pins()
        for slots, policy, rope in zip(pool.layers, pool.policies, pool.ropes, strict=True):
            q = torch.randn(count, 4, 32, generator=generator)
            k, v = torch.randn(2, count, 2, 32, generator=generator)
            cpu.write(k, v + mark, slots, *rows)
            cpu.attend(q, slots, *rows, SCALE, outputs[begin : begin + count])
            cpu.merge(slots, *rows, rope, policy)
    return outputs


def test_a_used_slot_is_as_good_as_new(pool):
    expected = run(pool, 1, LENGTH, seed=7), pool.slab[1].clone()
    run(pool, 2, LENGTH, seed=1, mark=MARK)
    assert (pool.slab[2].view(torch.float32) > MARK / 2).any(), "the first sequence left its mark"
    again = run(pool, 2, LENGTH, seed=7)
    assert torch.equal(again, expected[0]) and torch.equal(pool.slab[2], expected[1])


def test_a_short_sequence_leaves_nothing_of_a_long_one(pool):
    run(pool, 2, LENGTH, seed=1, mark=MARK)
    before = pool.slab[2].clone()
    run(pool, 2, 3, seed=7)
    kept = (pool.slab[2] == before) & (before != 0)
    assert kept.sum() < 200, "chance hits within the few bytes that three tokens take"
    assert not (pool.slab[2].view(torch.float32) > MARK / 2).any()


def test_reset_touches_only_slots_that_begin(pool):
    pool.slab.fill_(7)
    slots, cu_seqlens = torch.tensor([1, 2, -1]), torch.tensor([0, 5, 6, 8])
    cpu.reset(pool.slab, slots, cu_seqlens, torch.tensor([5, 40, 2]))
    assert [bool(row.any()) for row in pool.slab] == [True, False, True, True]


def test_pins_go_with_their_sequence(pool):
    pool.pin({1: [[3, 9]]})
    run(pool, 1, 64, seed=3)
    assert pool.layers[0].pins[1, 0].tolist() == [3, 9]
    pool.pin({1: []})
    run(pool, 1, 64, seed=3)
    assert not pool.layers[0].pins[1].any()


def test_pages_must_lie_side_by_side(pool):
    layout = plan_layout(SHAPE, DeltaMemConfig(memory=96, segment=16, window=24, pinned=8))
    plan = MemoryPlan(layout, layout, profile=None, merge=True, heads=slice(0, 2), workers=1)
    apart = [torch.zeros(2, 1, 1, layout.page_bytes, dtype=torch.uint8) for _ in range(2)]
    with pytest.raises(RuntimeError, match="needs the layout BLHNC"):
        SlotPool.from_caches(plan, apart, [None, None])
