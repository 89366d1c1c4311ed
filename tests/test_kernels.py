"""The CPU path against kernels/reference.py, and properties of the reference itself."""

import pytest
import torch

from tests.layers import make_batch, make_layer, make_pairs, make_policy, make_rope, make_tokens
from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.kernels import arrays, chains, cpu, cpuattention, cpumerge, readout, reference, slot
from vllm_deltamem.kernels.pairs import pair_bytes, pair_code
from vllm_deltamem.kernels.readouts import Readouts
from vllm_deltamem.kernels.slot import decode, encode, pack_rank, rank_position, rotate
from vllm_deltamem.memory import Shape, plan_layout

SETTINGS = [  # rope: kind, and tokens that the model was trained on (0: any)
    pytest.param(dict(fidelity=f, pinned=p), r, id=f"{f}-pinned{p}-{r[0]}-{r[1]}")
    for f, p, r in (
        ("bf16", 3, ("neox", 0)),
        ("bf16", 3, ("neox", 61)),
        ("k8v8", 0, ("neox", 0)),
        ("k8v4", 5, ("interleaved", 0)),
        ("k8v4", 5, ("interleaved", 96)),
        ("k3v4", 2, ("neox", 0)),
        ("k5v4", 2, ("partial", 40)),
        ("k8v8", 2, ("none", 0)),
    )
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_slots(settings, dtype=torch.float32, count=4, kv_heads=3, size=32, memory=60):
    shape = Shape(2, kv_heads, size, dtype, 512)
    config = DeltaMemConfig(memory=memory, window=12, segment=8, sinks=2, **settings)
    budgets = torch.tensor([[0.7, 1.0, 1.5], [0.6, 2.0, 0.9]])[:, :kv_heads]
    layout = plan_layout(shape, config, budgets)
    slab = torch.zeros(count, layout.slot_bytes, dtype=torch.uint8)
    return layout.views(slab, 1, make_pairs(kv_heads, size)), slab


def run(module, slots, k, v, q, slot, chunks, rope, policy, sink_logits=None):
    """Feed one sequence in chunks, cut further at segment boundaries, as the backend does."""
    out, done = torch.zeros_like(q), 0
    for chunk in chunks:
        while chunk:
            n = min(chunk, slots.segment - done % slots.segment)
            piece = slice(done, done + n)
            batch = torch.tensor([slot], dtype=torch.int32), torch.tensor([0, n]), torch.tensor([done + n])
            module.write(k[piece], v[piece], slots, *batch)
            module.attend(q[piece], slots, *batch, q.shape[-1] ** -0.5, out[piece], rope, sink_logits)
            module.merge(slots, *batch, rope, policy)
            done, chunk = done + n, chunk - n
    return out


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("settings,rope", SETTINGS)
def test_cpu_path_matches_reference(settings, rope, learned):
    k, v, q = make_tokens(173)
    rope, policy = make_rope(rope[0], 32, rope[1]), make_policy(learned=learned)
    expected_slots, _ = make_slots(settings)
    actual_slots, _ = make_slots(settings)
    expected = run(reference, expected_slots, k, v, q, 2, [173], rope, policy)
    actual = run(cpu, actual_slots, k, v, q, 2, [173], rope, policy)
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=2e-3)
    assert torch.equal(rank_position(actual_slots.exact_rank), rank_position(expected_slots.exact_rank))
    torch.testing.assert_close(actual_slots.coarse_mass, expected_slots.coarse_mass, atol=1e-3, rtol=1e-3)
    assert (expected_slots.coarse_mass[2] > 1).any(), "the test must merge"


@pytest.mark.parametrize("sliding", [None, 13, 40])
@pytest.mark.parametrize("chunks", [[120], [1, 30, 33, 1, 55], [16] * 7 + [8]], ids=str)
def test_sequences_in_parts(chunks, sliding):
    """Of one that is scattered over four, in any order; rows are to the bit what they are in other chunks."""
    k, v, q = make_tokens(120, 2, group=3)
    found, slabs, slot = [], [], (7, 0, 3, 5)
    for module, cut in ((reference, [120]), (cpu, [120]), (cpu, chunks)):
        slab, view = make_layer("bf16", 32, (0, 0), (0, 0), 112, 16, slots=9, sliding=sliding, cells=32)
        found.append(run(module, view(slab), k, v, q, slot, cut, None, make_policy(2)))
        slabs.append(slab)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[2], found[1])
    assert torch.equal(slabs[1], slabs[0]) and torch.equal(slabs[2], slabs[0])
    assert slabs[0][[*slot]].any(1).all() and not slabs[0][[1, 2, 4, 6, 8]].any()


def test_sink_logits_take_part_of_the_weight():
    """As gpt-oss has. Without any memory, too, and far beyond what is seen."""
    k, v, q = make_tokens(173)
    sink_logits = torch.tensor([-200.0, -3, 0, 2, 4, 200])[: q.shape[1]]
    rope, policy = make_rope("neox", 32, 0), make_policy()
    found = [run(m, make_slots({})[0], k, v, q, 2, [173], rope, policy, sink_logits) for m in (reference, cpu)]
    torch.testing.assert_close(*found, atol=2e-3, rtol=2e-3)
    assert found[0][:, 0].abs().max() > 0.1 and found[0][:, 5].abs().max() == 0


@pytest.mark.parametrize("learned", [False, True])
def test_compiled_importance_matches_reference(learned):
    plain, values, mean, policy = *torch.randn(2, 3, 20, 32), torch.randn(3, 32), make_policy(learned=learned)
    plain[0, 0], values[1, 1] = 0, 1e4 * values[1, 1]
    expected, score = reference.importance(plain, values, mean, policy.importance), torch.empty(3, 20)
    weights = arrays.Weights.of(policy, None)
    for g in range(3):
        cpumerge._score(*(x[g].numpy() for x in (plain, values, mean)), weights, g, score[g].numpy())
    torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings,rope", SETTINGS)
def test_nothing_is_left_to_compile(settings, rope, dtype):
    k, v, q = make_tokens(173, dtype=dtype)
    rope, policy, (slots, slab) = make_rope(rope[0], 32, rope[1]), make_policy(), make_slots(settings, dtype)
    functions = chains.walk, arrays.weigh
    cpu.compile_walk(slots, rope)
    compiled = [len(f.signatures) for f in functions]
    assert all(compiled) and not slab.any()
    run(cpu, slots, k, v, q, 2, [170, 1, 2], rope, policy)
    assert [len(f.signatures) for f in functions] == compiled


@pytest.mark.parametrize("chunks", [[7] * 24 + [5], [64, 100, 9], [1] * 173], ids=["7", "ragged", "1"])
@pytest.mark.parametrize("settings,rope", SETTINGS)
def test_state_is_a_function_of_the_tokens(settings, rope, chunks):
    k, v, q = make_tokens(173, dtype=torch.bfloat16)
    rope, policy = make_rope(rope[0], 32, rope[1]), make_policy()
    (once, slab), (cut, cut_slab) = make_slots(settings, torch.bfloat16), make_slots(settings, torch.bfloat16)
    expected = run(cpu, once, k, v, q, 1, [173], rope, policy)
    actual = run(cpu, cut, k, v, q, 1, chunks, rope, policy)
    assert torch.equal(slab, cut_slab)
    assert torch.equal(expected, actual)


@pytest.mark.parametrize("bound", [1, 16, 50])
@pytest.mark.parametrize("settings,rope", SETTINGS[1:5])
def test_a_bounded_search_matches_reference(settings, rope, bound, monkeypatch):
    """Heads of fewer and of more coarse entries than a merge looks among, which wraps around at their ends."""
    k, v, q = make_tokens(253)
    rope, policy = make_rope(rope[0], 32, rope[1]), make_policy()
    (everywhere, _), (expected_slots, _), (actual_slots, _) = (make_slots(settings) for _ in range(3))
    reference_out = run(reference, everywhere, k, v, q, 2, [253], rope, policy)
    monkeypatch.setattr(slot, "CANDIDATES", bound)
    coarse = expected_slots.coarse_start.diff()
    assert coarse.max() > bound and (bound < 50 or coarse.min() < bound)
    expected = run(reference, expected_slots, k, v, q, 2, [253], rope, policy)
    actual = run(cpu, actual_slots, k, v, q, 2, [7] * 36 + [1], rope, policy)
    torch.testing.assert_close(actual, expected, atol=5e-3, rtol=5e-3)  # a code may be rounded the other way
    torch.testing.assert_close(actual_slots.coarse_mass, expected_slots.coarse_mass, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(expected, reference_out, atol=5e-3), "the bound must matter"


def test_more_exact_entries_than_a_short_sequence_has_room_for(monkeypatch):
    monkeypatch.setattr(readout, "LEAST_ROOM", 64)
    k, v, q = make_tokens(60)
    rope, policy = make_rope("neox", 32), make_policy()
    (expected_slots, _), (actual_slots, _) = (make_slots(dict(pinned=150), memory=300) for _ in range(2))
    assert expected_slots.exact_start.diff().min() > 64
    expected = run(reference, expected_slots, k, v, q, 0, [60], rope, policy)
    torch.testing.assert_close(run(cpu, actual_slots, k, v, q, 0, [60], rope, policy), expected, atol=2e-3, rtol=2e-3)
    assert torch.equal(rank_position(actual_slots.exact_rank), rank_position(expected_slots.exact_rank))


def test_candidates_take_turns(monkeypatch):
    monkeypatch.setattr(slot, "CANDIDATES", 6)
    assert slot.candidates(6, 40, 8) == [range(6)]
    blocks = [[e for r in slot.candidates(10, gone, 8) for e in r] for gone in range(3, 8 * 5, 8)]
    assert blocks == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 6, 7, 8, 9],
        [2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 8, 9],
        [4, 5, 6, 7, 8, 9],
    ]


@pytest.mark.parametrize("trained", [0, 90])
def test_batch_rows_do_not_touch_each_other(trained):
    """Decoding many sequences of different lengths in one call leaves each as it would be alone."""
    settings, rope, policy = dict(fidelity="k8v4", pinned=2), make_rope("neox", 32, trained), make_policy()
    together, slab = make_slots(settings, torch.bfloat16)
    alone, alone_slab = make_slots(settings, torch.bfloat16)
    starts, outs, expected = [9, 130, 70], [], []
    tokens = [make_tokens(180, dtype=torch.bfloat16) for _ in range(3)]
    for i, (start, (k, v, q)) in enumerate(zip(starts, tokens, strict=True)):
        run(cpu, together, k[:start], v[:start], q[:start], i, [start], rope, policy)
        expected.append(run(cpu, alone, k, v, q, i, [start] + [1] * 40, rope, policy)[start : start + 40])
    indices, cu = torch.tensor([2, -1, 0, 1], dtype=torch.int32), torch.tensor([0, 1, 1, 2, 3])
    for step in range(40):
        at = [starts[2] + step, starts[0] + step, starts[1] + step]
        k, v, q = (torch.stack([tokens[s][i][p] for s, p in zip((2, 0, 1), at, strict=True)]) for i in range(3))
        lens = torch.tensor([at[0] + 1, 0, at[1] + 1, at[2] + 1])
        out = torch.zeros_like(q)
        cpu.write(k, v, together, indices, cu, lens)
        cpu.attend(q, together, indices, cu, lens, 32**-0.5, out, rope)
        cpu.merge(together, indices, cu, lens, rope, policy)
        outs.append(out)
    outs = torch.stack(outs)
    for column, row in enumerate((2, 0, 1)):
        assert torch.equal(outs[:, column], expected[row])
    assert torch.equal(slab, alone_slab)


@pytest.mark.parametrize("trained", [0, 90], ids=["near", "far"])
def test_any_number_of_threads_leaves_the_same_bits(trained):
    rope, policy, (k, v, q) = make_rope("neox", 32, trained), make_policy(), make_tokens(300, dtype=torch.bfloat16)
    slab, views = make_layer(exact=(4, 9, 30), coarse=(40, 100, 25), dtype=torch.bfloat16, slots=2)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5, 8):
        torch._C.set_num_threads(count)  # vLLM replaces torch.set_num_threads
        own = slab.clone()
        found.append((run(cpu, views(own), k, v, q, 1, [300], rope, policy), own))
    torch._C.set_num_threads(threads)
    assert found[0][0].any(1).all()
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("coarse", [(2400,), (1100,), (2400, 2400, 700), (90, 2400)], ids=str)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_large_heads_are_read_alike_by_any_number_of_threads(coarse, group):
    """A token sees the same bits alone, on however many threads, as in a piece of a prompt."""
    kv_heads = len(coarse)
    slab, views = make_layer(exact=(4,) * kv_heads, coarse=coarse, size=64, dtype=torch.bfloat16)
    slots, (k, v, q) = views(slab), make_tokens(2200, kv_heads, 64, group, torch.bfloat16)
    readouts = Readouts(slots)
    for first in range(0, 2200, slots.segment):
        piece = slice(first, min(first + slots.segment, 2200))
        batch = make_batch([(1, piece.stop - first, piece.stop)])
        cpu.write(k[piece], v[piece], slots, *batch)
        cpu.merge(slots, *batch, None, make_policy(kv_heads, 64), readouts=readouts)
    expected, outs = torch.zeros_like(q[piece]), []
    cpu.attend(q[piece], slots, *batch, 32**-0.5, expected, readouts=readouts)
    threads = torch.get_num_threads()
    for count in (1, 2, 3, 4, 8):
        torch._C.set_num_threads(count)  # vLLM replaces torch.set_num_threads
        outs.append(torch.zeros_like(q[-1:]))
        cpu.attend(q[-1:], slots, *make_batch([(1, 1, 2200)]), 32**-0.5, outs[-1], readouts=readouts)
    torch._C.set_num_threads(threads)
    assert all(torch.equal(out, expected[-1:]) for out in outs)


@pytest.mark.parametrize("module", [reference, cpu])
def test_memory_that_never_fills_is_full_attention(module):
    k, v, q = make_tokens(150)
    slots, _ = make_slots(dict(fidelity="bf16", pinned=4), memory=400)
    actual = run(module, slots, k, v, q, 0, [150], make_rope("neox", 32), make_policy())
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, enable_gqa=True
    ).transpose(0, 1)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[150], [7] * 21 + [3], [100] + [1] * 50], ids=["once", "7", "decoding"])
@pytest.mark.parametrize("module", [reference, cpu])
def test_sliding_layer_sees_exactly_the_last_tokens(module, chunks):
    """A layer of the same slot whose window of 21 tokens is no multiple of the segment."""
    k, v, q = make_tokens(150)
    settings = DeltaMemConfig(memory=60, window=12, segment=8, sinks=2, pinned=0)
    layout = plan_layout(Shape(2, 3, 32, torch.float32, 512, windows=(None, 21)), settings)
    slots = layout.views(torch.zeros(4, layout.slot_bytes, dtype=torch.uint8), 1)
    actual = run(module, slots, k, v, q, 0, chunks, make_rope("neox", 32), make_policy())
    age = torch.arange(150)[:, None] - torch.arange(150)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=(age >= 0) & (age < 21), enable_gqa=True
    ).transpose(0, 1)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert not slots.key_sum.any()


def test_a_wide_ring_is_seen_in_parts():
    k, v, q = make_tokens(1100)
    settings = DeltaMemConfig(memory=1400, window=256, segment=512, pinned=0)
    layout = plan_layout(Shape(2, 3, 32, torch.float32, 2048, windows=(None, 1000)), settings)
    slots = layout.views(torch.zeros(2, layout.slot_bytes, dtype=torch.uint8), 1)
    assert slots.ring_k.shape[2] * 2 * 512 > cpuattention.MASKED_AT_ONCE
    actual = run(cpu, slots, k, v, q, 0, [1100], None, make_policy())
    age = torch.arange(1100)[:, None] - torch.arange(1100)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=(age >= 0) & (age < 1000), enable_gqa=True
    ).transpose(0, 1)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("module", [reference, cpu])
@pytest.mark.parametrize("kind,trained", [("neox", 44), ("interleaved", 63), ("partial", 100)])
def test_no_token_is_attended_from_farther_than_the_trained_distance(module, kind, trained):
    """A memory that never fills, against full attention whose distances end at trained - 1."""
    k, v, q = make_tokens(150)
    slots, _ = make_slots(dict(fidelity="bf16", pinned=4), memory=400)
    rope, position = make_rope(kind, 32, trained), torch.arange(150)
    at = position[:, None]
    keys, queries = (rotate(x, at.expand(x.shape[:2]), rope) for x in (k, q))
    actual = run(module, slots, keys, v, queries, 0, [150], rope, make_policy())
    end = (position // slots.segment + 1) * slots.segment
    far = position[None] < end[:, None] - trained  # [query, key]
    assert (far.sum(1) > 0).sum() > 40 and (at - position)[~far].max() == trained - 1
    afar = rotate(q, torch.full(q.shape[:2], trained - 1), rope)
    expected = torch.empty_like(q)
    for h in range(q.shape[1]):
        logits = torch.where(far, afar[:, h] @ k[:, h // 2].T, queries[:, h] @ keys[:, h // 2].T) * 32**-0.5
        logits = logits.masked_fill(position[None] > at, -torch.inf)
        expected[:, h] = logits.softmax(-1) @ v[:, h // 2]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_pinned_tokens_stay_exact_to_the_bit():
    k, v, q = make_tokens(400, dtype=torch.bfloat16)
    slots, _ = make_slots(dict(fidelity="k8v4", pinned=5), torch.bfloat16)
    rope, policy, positions = make_rope("neox", 32), make_policy(), [3, 40, 41, 42, 77]
    slots.pins[0, :3] = torch.tensor([[3, 4], [40, 43], [77, 78]], dtype=torch.int32)
    run(cpu, slots, k, v, q, 0, [400], rope, policy)
    for g in range(3):
        x = slice(slots.exact_start[g], slots.exact_start[g + 1])
        held = rank_position(slots.exact_rank[0, x]).tolist()
        for p in positions + [0, 1]:
            entry = x.start + held.index(p)
            assert torch.equal(slots.exact_k[0, entry], k[p, g]) and torch.equal(slots.exact_v[0, entry], v[p, g])


def test_importance_fades_past_the_trained_context():
    """Old entries make room for new ones, sinks and pinned tokens stay."""
    k, v, q = make_tokens(500)
    old = {}
    for trained in (0, 64):
        slots, _ = make_slots(dict(fidelity="k8v4", pinned=5))
        slots.pins[0, 0] = torch.tensor([3, 6])
        run(cpu, slots, k, v, q, 0, [500], make_rope("neox", 32, trained), make_policy())
        old[trained] = (rank_position(slots.coarse_rank[0]) < 150).float().mean()
        for g in range(3):
            held = rank_position(slots.exact_rank[0, slots.exact_start[g] : slots.exact_start[g + 1]])
            assert {0, 1, 3, 4, 5} <= set(held.tolist())
    assert old[0] > 0.05 and old[64] < 0.01


def test_rank_orders_by_score_then_position():
    score = torch.tensor([-torch.inf, -3.0, -0.0, 0.0, 1e-30, 2.0, torch.inf])
    rank = pack_rank(score, torch.full((7,), 9))
    assert (rank > 0).all() and rank[2] == rank[3]
    assert (rank[[0, 1, 2, 4, 5]] < rank[[1, 2, 4, 5, 6]]).all()
    assert pack_rank(torch.tensor(1.0), torch.tensor(4)) > pack_rank(torch.tensor(1.0), torch.tensor(5))
    assert pack_rank(torch.tensor(torch.nan), torch.tensor(4)) == pack_rank(torch.tensor(-torch.inf), torch.tensor(4))
    assert rank_position(rank).tolist() == [9] * 7


@pytest.mark.parametrize("bits,error", [(16, 0.0), (8, 0.02), (4, 0.25)])
@pytest.mark.parametrize("size", [32, 48, 80, 128])
def test_codes_round_trip(bits, error, size):
    x = torch.randn(50, size)
    x[0] = 3.0  # a constant vector has no range to scale
    back = decode(*encode(x, bits, torch.float32), bits, torch.float32)
    assert (back - x).abs().max() <= error


@pytest.mark.parametrize("size", [16, 32, 80, 128])
@pytest.mark.parametrize("bits", [3, 5])
def test_codes_of_pairs(size, bits):
    """Within half a step of every value that has a code, at the gain that the farthest needs."""
    pairs, x = pair_code(make_pairs(3, size), bits, 3, "cpu"), 4 * torch.randn(3, 50, size)
    x[:, 0] = 0
    pairs = pairs.of((slice(None), None))  # for all rows of a head
    codes, gain = encode(x, bits, torch.float32, pairs)
    read = decode(codes, gain, bits, torch.float32, pairs)
    assert codes.shape[-1] == pair_bytes(size, bits)
    steps = gain[..., 0].float() * pairs.step
    step = torch.cat([steps, steps], -1)
    assert ((read - x).abs() <= step * 1.01)[step > 0].all() and (read[(step == 0).expand_as(read)] == 0).all()
    assert (step > 0).float().mean() >= 0.6 and not read[:, 0].any()


@pytest.mark.parametrize("kind", ["neox", "interleaved", "partial"])
def test_rotation_is_undone(kind):
    x, rope, position = torch.randn(7, 32), make_rope(kind, 32), torch.arange(7) * 50
    torch.testing.assert_close(rotate(rotate(x, position, rope), position, rope, inverse=True), x)
