"""Slots carry nothing from one sequence to the next: looking for the bytes."""

from unittest.mock import patch

import pytest
import torch

from vllm_deltamem import memory
from vllm_deltamem.blocks import Slot
from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.kernels import cpu
from vllm_deltamem.kernels.slot import Rope
from vllm_deltamem.memory import Shape, align, plan_layout, plan_part
from vllm_deltamem.plan import MemoryPlan
from vllm_deltamem.pool import Due, Rows, SlotPool

SHAPE = Shape(layers=2, kv_heads=2, head_size=32, dtype=torch.float32, max_model_len=512)
SLOTS, LENGTH, SCALE = 3, 300, 32**-0.5
MARK = 1234.5  # in every value of the first tenant


def make_pool(parts=1):
    """Slots of so many parts, each for 32 tokens if they are several."""
    whole = plan_layout(SHAPE, DeltaMemConfig(memory=96, segment=16, window=24, pinned=8))
    with patch.object(memory, "PART_TOKENS", 32):
        part = plan_part(whole).with_parts(parts) if parts > 1 else None
    page = align(-(-whole.page_bytes // parts))
    plan = MemoryPlan(
        whole.with_page(page * parts), whole, profile=None, merge=True, heads=slice(0, 2), workers=1,
        part=part and part.with_page(page), parts=parts,
    )  # fmt: skip
    blocks = torch.zeros(SLOTS * parts + 1, 2 * page, dtype=torch.uint8)
    caches = [blocks[:, None, None, i * page : (i + 1) * page] for i in range(2)]
    angles = torch.outer(torch.arange(512.0), 1e4 ** -(torch.arange(16) / 16))
    return SlotPool.from_caches(plan, caches, [Rope(angles.cos(), angles.sin(), False)] * 2)


@pytest.fixture
def pool():
    return make_pool()


def run(pool, row, length, seed, mark=0.0):
    """A sequence of random tokens through all layers; its outputs [length, 4, 32]."""
    generator = torch.Generator().manual_seed(seed)
    segment, outputs = pool.whole.layers[0].segment, torch.empty(length, 4, 32)
    for begin in range(0, length, segment):
        count = min(segment, length - begin)
        rows = torch.tensor([row]), torch.tensor([0, count]), torch.tensor([begin + count])
        pool.reset([Rows(*rows)])
        for slots, policy, rope in zip(pool.whole.layers, pool.policies, pool.ropes, strict=True):
            q = torch.randn(count, 4, 32, generator=generator)
            k, v = torch.randn(2, count, 2, 32, generator=generator)
            cpu.write(k, v + mark, slots, *rows)
            cpu.attend(q, slots, *rows, SCALE, outputs[begin : begin + count])
            cpu.merge(slots, *rows, rope, policy)
    return outputs


def test_a_used_slot_is_as_good_as_new(pool):
    expected = run(pool, 0, LENGTH, seed=7), pool.whole.rows[0].clone()
    run(pool, 1, LENGTH, seed=1, mark=MARK)
    assert (pool.whole.rows[1].view(torch.float32) > MARK / 2).any(), "the first sequence left its mark"
    again = run(pool, 1, LENGTH, seed=7)
    assert torch.equal(again, expected[0]) and torch.equal(pool.whole.rows[1], expected[1])


def test_a_short_sequence_leaves_nothing_of_a_long_one(pool):
    run(pool, 1, LENGTH, seed=1, mark=MARK)
    before = pool.whole.rows[1].clone()
    run(pool, 1, 3, seed=7)
    kept = (pool.whole.rows[1] == before) & (before != 0)
    assert kept.sum() < 200, "chance hits within the few bytes that three tokens take"
    assert not (pool.whole.rows[1].view(torch.float32) > MARK / 2).any()


def test_reset_touches_only_slots_that_begin(pool):
    pool.whole.rows.fill_(7)
    slots, cu_seqlens = torch.tensor([0, 1, -1]), torch.tensor([0, 5, 6, 8])
    cpu.reset(pool.whole.rows, slots, cu_seqlens, torch.tensor([5, 40, 2]))
    assert [bool(row.any()) for row in pool.whole.rows] == [False, True, True]


def test_pins_go_with_their_sequence(pool):
    for spans in ([[3, 9]], []):
        pool.pin({0: spans})
        run(pool, 0, 64, seed=3)
        assert pool.pins_of(Slot(True, (0,))) == spans


def test_parts_are_cleared_as_a_sequence_comes_to_them():
    """Of a slot that was left with pins, say; others lie beside them."""
    pool = make_pool(parts=2)
    pool.memory(Slot(True, (0,)))[0].fill_(7)
    pool.memory(Slot(True, (1,)))[0].fill_(7)
    cleared = []
    for before, count in ((0, 1), (1, 30), (31, 2), (33, 1)):
        ends = torch.tensor([0, count]), torch.tensor([before + count])
        pool.reset([Rows(torch.tensor([-1]), *ends), Rows(torch.tensor([[3, 0]]), *ends)])
        cleared.append([not row.any() for row in pool.slabs[1].rows[:4]])
    assert cleared == 2 * [[False, False, False, True]] + 2 * [[True, False, False, True]]


def test_nothing_is_merged_in_a_step_without_whole_slots():
    """Of all sequences that complete a segment the step does not know which hold parts."""
    pool = make_pool(parts=2)
    merged = patch("vllm_deltamem.pool.kernels.merge")
    for kinds, calls in (((False, True), 0), ((True, True), 2)):
        pool.kinds, pool.due = kinds, [Due(Rows(torch.tensor([-1]), torch.tensor([0, 1]), torch.tensor([48])), 48)]
        with merged as merge:
            pool.merge_due()
        assert merge.call_count == calls and not pool.due


def test_pages_must_lie_side_by_side(pool):
    layout = plan_layout(SHAPE, DeltaMemConfig(memory=96, segment=16, window=24, pinned=8))
    plan = MemoryPlan(layout, layout, profile=None, merge=True, heads=slice(0, 2), workers=1)
    apart = [torch.zeros(2, 1, 1, layout.page_bytes, dtype=torch.uint8) for _ in range(2)]
    with pytest.raises(RuntimeError, match="needs the layout BLHNC"):
        SlotPool.from_caches(plan, apart, [None, None])
