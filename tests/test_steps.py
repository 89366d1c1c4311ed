"""The metadata builder: what of a step it clears, cuts and leaves to be merged, for rows of every kind."""

from types import SimpleNamespace

import pytest
import torch

from tests.test_pool import pool  # noqa: F401
from vllm_deltamem.backend import TOGETHER, DeltaMemMetadataBuilder
from vllm_deltamem.kernels import cpu

SEGMENT = 16  # of the pool, whose window is 24


def make_builder(pool):  # noqa: F811
    made = DeltaMemMetadataBuilder.__new__(DeltaMemMetadataBuilder)
    made.plan, made.pool = SimpleNamespace(layout=pool.layers[0]), pool
    return made


@pytest.fixture
def builder(pool):  # noqa: F811
    pool.slab.fill_(7)
    return make_builder(pool)


def make_batch(rows, longest=None):
    """What vLLM says of rows (slot, new tokens, length), longest: the length that it promises for a graph."""
    slots, counts, lengths = (torch.tensor(column, dtype=torch.int32) for column in zip(*rows, strict=True))
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()])
    return SimpleNamespace(
        block_table_tensor=torch.stack([slots, slots + 50], 1), query_start_loc=starts, query_start_loc_cpu=starts,
        seq_lens=lengths, seq_lens_cpu_upper_bound=lengths, num_reqs=len(rows), num_actual_tokens=int(starts[-1]),
        max_query_len=longest or int(counts.max()),
    )  # fmt: skip


def listed(rows):
    return [tensor.tolist() for tensor in rows]


def test_decoding_leaves_what_is_due_for_after_the_forward_pass(builder):
    padding = (0, 0, 0)
    metadata = builder.build(0, make_batch([(3, 1, 47), (2, 1, 48), (1, 1, 16), padding, padding]))
    (step,) = metadata.steps
    assert step.rows.slot_indices.tolist() == [3, 2, 1, 0, 0] and not step.due
    assert listed(builder.pool.due[0].rows) == [[2], [0, 1], [48]], "16 tokens are still in the window"
    assert (builder.pool.slab == 7).all(), "no sequence is new"
    builder.build(0, make_batch([(3, 1, 49), (2, 1, 50)]))
    assert builder.pool.due == []


def test_padding_reaches_no_slot(builder):
    step = builder.build(0, make_batch([(2, 1, 30), (0, 0, 0)])).steps[0]
    before, (k, v) = builder.pool.slab.clone(), torch.randn(2, 2, 2, 32)
    cpu.write(k, v, builder.pool.layers[0], *step.rows)
    changed = (builder.pool.slab != before).any(1)
    assert changed.tolist() == [False, False, True, False]


def test_merging_after_the_forward_pass_is_done_once(builder):
    builder.pool.slab.zero_()
    builder.build(0, make_batch([(1, 1, 48)]))
    builder.pool.merge_due()
    assert builder.pool.layers[1].exact_rank[1].any() and not builder.pool.layers[1].exact_rank[2].any()
    after = builder.pool.slab.clone()
    builder.pool.merge_due()
    assert torch.equal(builder.pool.slab, after)


def test_a_graph_capture_clears_and_merges_nothing(builder):
    builder.pool.due = []
    metadata = builder.build_for_cudagraph_capture(make_batch([(0, 1, 1), (0, 1, 48)]))
    assert len(metadata.steps) == 1 and builder.pool.due == [] and (builder.pool.slab == 7).all()


def test_only_slots_of_new_sequences_are_cleared(builder):
    builder.pool.pin({1: [[3, 9]]})
    builder.build(0, make_batch([(1, 1, 1), (2, 1, 2)]))
    assert [bool(row.any()) for row in builder.pool.slab] == [True, True, True, True]
    assert builder.pool.layers[0].pins[1, :2].tolist() == [[3, 9], [0, 0]], "pins are written after the slot is cleared"
    assert not builder.pool.layers[0].ring_k[1].any() and builder.pool.layers[0].ring_k[2].any()


def test_a_prompt_is_cut_at_segments_and_merged_where_one_ends(builder):
    metadata = builder.build(0, make_batch([(3, 20, 52), (2, 1, 48), (1, 5, 5)]))
    single, first, second = metadata.steps
    assert listed(single.rows) == [[2], [20, 21], [48]], "what decodes has a step of its own"
    assert [(listed(rows), longest) for rows, longest in single.due] == [([[2], [0, 1], [48]], 48)]
    assert listed(first.rows) == [[3, -1, 1], [0, 16, 21, 26], [48, 0, 5]]
    assert [(listed(rows), longest) for rows, longest in first.due] == [([[3], [0, 1], [48]], 48)]
    assert listed(second.rows) == [[3], [16, 20], [52]] and second.due == []
    sizes = [(step.longest, step.tokens, step.reach) for step in metadata.steps]
    assert sizes == [(1, 1, 48), (16, 21, 48), (4, 4, 52)]
    assert builder.pool.due == [], "prompts merge inside the forward pass"


def test_dummy_rows_of_a_prompt_sit_it_out(builder):
    (step,) = builder.build(0, make_batch([(0, 16, 48), (0, 16, 48)])).steps
    assert step.rows.slot_indices.tolist() == [-1, -1] and step.due[0].rows.slot_indices.tolist() == [-1, -1]


def test_the_null_block_of_dummy_rows_is_not_cleared(builder):
    """Once for every row, in a slot that nobody reads."""
    builder.build(0, make_batch([(0, 1, 1), (2, 1, 1), (0, 1, 1)]))
    assert [bool(row.any()) for row in builder.pool.slab] == [True, True, False, True]


def test_many_due_rows_take_several_calls(builder):
    builder.build(0, make_batch([(1, 1, 64)] * (TOGETHER + 3)))
    assert [len(rows.slot_indices) for rows, _ in builder.pool.due] == [TOGETHER, 3]
    assert builder.pool.due[1].rows.cu_seqlens.tolist() == [0, 1, 2, 3]
