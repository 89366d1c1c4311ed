"""The metadata builder: what of a step it clears, cuts and leaves to be merged, for rows of every kind."""

from types import SimpleNamespace

import pytest
import torch

from tests.test_pool import make_pool, pool  # noqa: F401
from vllm_deltamem.backend import TOGETHER, DeltaMemMetadataBuilder
from vllm_deltamem.kernels import cpu

SEGMENT = 16  # of the pool, whose window is 24


def make_builder(pool):  # noqa: F811
    made = DeltaMemMetadataBuilder.__new__(DeltaMemMetadataBuilder)
    made.plan, made.pool = SimpleNamespace(layout=pool.whole.layers[0], parts=pool.parts), pool
    made._held = [torch.empty(64, *slab.held, dtype=torch.int32) for slab in pool.slabs]
    made._cleared = 513 if pool.parts == 1 else 32
    return made


@pytest.fixture
def builder(pool):  # noqa: F811
    pool.whole.rows.fill_(7)
    return make_builder(pool)


def make_batch(rows, longest=None):
    """What vLLM says of rows (block, new tokens, length), longest: the length that it promises for a graph.

    A block may be a list; what else is in the table was some other sequence's.
    """
    blocks, counts, lengths = zip(*rows, strict=True)
    blocks = [[block] if isinstance(block, int) else block for block in blocks]
    table = torch.tensor([[*row, 6, 6, 6][:3] if any(row) else [0] * 3 for row in blocks], dtype=torch.int32)
    counts, lengths = (torch.tensor(column, dtype=torch.int32) for column in (counts, lengths))
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()])
    return SimpleNamespace(
        block_table_tensor=table, query_start_loc=starts, query_start_loc_cpu=starts,
        seq_lens=lengths, seq_lens_cpu_upper_bound=lengths, num_reqs=len(rows), num_actual_tokens=int(starts[-1]),
        max_query_len=longest or int(counts.max()),
    )  # fmt: skip


def listed(rows):
    return [tensor.tolist() for tensor in rows]


def test_decoding_leaves_what_is_due_for_after_the_forward_pass(builder):
    padding = (0, 0, 0)
    metadata = builder.build(0, make_batch([(3, 1, 47), (2, 1, 48), (1, 1, 16), padding, padding]))
    (step,) = metadata.steps
    assert step.rows[0].slot_indices.tolist() == [2, 1, 0, -1, -1] and not step.due
    assert listed(builder.pool.due[0].rows) == [[1], [0, 1], [48]], "16 tokens are still in the window"
    assert (builder.pool.whole.rows == 7).all(), "no sequence is new"
    builder.build(0, make_batch([(3, 1, 49), (2, 1, 50)]))
    assert builder.pool.due == []


def test_padding_reaches_no_slot(builder):
    step = builder.build(0, make_batch([(2, 1, 30), (0, 0, 0)])).steps[0]
    before, (k, v) = builder.pool.whole.rows.clone(), torch.randn(2, 2, 2, 32)
    cpu.write(k, v, builder.pool.whole.layers[0], *step.rows[0])
    changed = (builder.pool.whole.rows != before).any(1)
    assert changed.tolist() == [False, True, False]


def test_merging_after_the_forward_pass_is_done_once(builder):
    builder.pool.whole.rows.zero_()
    builder.build(0, make_batch([(1, 1, 48)]))
    builder.pool.merge_due()
    assert builder.pool.whole.layers[1].exact_rank[0].any() and not builder.pool.whole.layers[1].exact_rank[1].any()
    after = builder.pool.whole.rows.clone()
    builder.pool.merge_due()
    assert torch.equal(builder.pool.whole.rows, after)


def test_a_graph_capture_clears_and_merges_nothing(builder):
    builder.pool.due = []
    metadata = builder.build_for_cudagraph_capture(make_batch([(0, 1, 1), (0, 1, 48)]))
    assert len(metadata.steps) == 1 and builder.pool.due == [] and (builder.pool.whole.rows == 7).all()


def test_only_slots_of_new_sequences_are_cleared(builder):
    builder.pool.pin({0: [[3, 9]]})
    builder.build(0, make_batch([(1, 1, 1), (2, 1, 2)]))
    assert [bool(row.any()) for row in builder.pool.whole.rows] == [True, True, True]
    assert builder.pool.whole.layers[0].pins[0, :2].tolist() == [[3, 9], [0, 0]], (
        "pins are written after the slot is cleared"
    )
    assert not builder.pool.whole.layers[0].ring_k[0].any() and builder.pool.whole.layers[0].ring_k[1].any()


def test_a_prompt_is_cut_at_segments_and_merged_where_one_ends(builder):
    metadata = builder.build(0, make_batch([(3, 20, 52), (2, 1, 48), (1, 5, 5)]))
    single, first, second = metadata.steps
    assert listed(single.rows[0]) == [[1], [20, 21], [48]], "what decodes has a step of its own"
    assert [(listed(rows), longest) for rows, longest in single.due] == [([[1], [0, 1], [48]], 48)]
    assert listed(first.rows[0]) == [[2, -1, 0], [0, 16, 21, 26], [48, 0, 5]]
    assert [(listed(rows), longest) for rows, longest in first.due] == [([[2], [0, 1], [48]], 48)]
    assert listed(second.rows[0]) == [[2], [16, 20], [52]] and second.due == []
    sizes = [(step.longest, step.tokens, step.reach) for step in metadata.steps]
    assert sizes == [(1, 1, 48), (16, 21, 48), (4, 4, 52)]
    assert builder.pool.due == [], "prompts merge inside the forward pass"


def test_dummy_rows_of_a_prompt_sit_it_out(builder):
    (step,) = builder.build(0, make_batch([(0, 16, 48), (0, 16, 48)])).steps
    assert step.rows[0].slot_indices.tolist() == [-1, -1] and step.due[0].rows.slot_indices.tolist() == [-1, -1]


def test_the_null_block_of_dummy_rows_is_not_cleared(builder):
    """Once for every row, in a slot that nobody reads."""
    builder.build(0, make_batch([(0, 1, 1), (2, 1, 1), (0, 1, 1)]))
    assert [bool(row.any()) for row in builder.pool.whole.rows] == [True, False, True]


def test_many_due_rows_take_several_calls(builder):
    builder.build(0, make_batch([(1, 1, 64)] * (TOGETHER + 3)))
    assert [len(rows.slot_indices) for rows, _ in builder.pool.due] == [TOGETHER, 3]
    assert builder.pool.due[1].rows.cu_seqlens.tolist() == [0, 1, 2, 3]


def test_sequences_have_rows_where_their_slots_are():
    """A slot of two blocks, whole, behind the null block, or in parts; in the other slab -1 comes first."""
    builder, none = make_builder(make_pool(parts=2)), [-1, -1]
    batch = [([0, 3, 4], 20, 60), ([2], 5, 20), ([6, 1], 1, 48), ([0, 5, 6], 1, 48), ([0], 0, 0)]
    single, first, second = builder.build(0, make_batch(batch)).steps
    assert [rows.slot_indices.tolist() for rows in single.rows] == [[-1, 2], [[5, 0], [-1, 4]]]
    assert [rows.slot_indices.tolist() for rows in first.rows] == [[1, -1, -1], [[-1, 2], none, [1, 5]]], "padding"
    assert [rows.slot_indices.tolist() for rows in second.rows] == [[1, -1, -1], [[-1, 2], none, [1, 5]]]
    assert [due.rows.slot_indices.tolist() for due in single.due] == [[-1, 2]], "nothing is merged in a part"
    (step,) = builder.build(0, make_batch([([0, 3, 4], 1, 61), ([2], 1, 21), ([0], 0, 0)])).steps
    assert [rows.slot_indices.tolist() for rows in step.rows] == [[1, -1, -1], [[-1, 2], [1, 5], none]]


def test_new_parts_are_cleared_alone():
    pool = make_pool(parts=2)  # noqa: F811
    pool.whole.rows.fill_(7)
    make_builder(pool).build(0, make_batch([([2], 4, 4), ([0, 5, 6], 4, 4), ([3, 4], 1, 33)]))
    assert [bool(row.any()) for row in pool.slabs[1].rows] == [True, False, True, False, False, False]
