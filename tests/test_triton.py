"""The Triton kernels in Triton's interpreter, against kernels/reference.py. tests/gpu has the compiled ones."""

import gc
from functools import cache

import pytest
import torch

from tests.layers import advance, assert_same_memory, make_batch, make_layer, make_policy, make_rope, make_tokens
from vllm_deltamem.kernels import reference

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("compiled kernels are tested in tests/gpu", allow_module_level=True)
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")
    from vllm_deltamem.kernels import attend, cpu, cuda, launch, merge, slot

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of masked-out lanes


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


RAGGED = dict(exact=(4, 0, 6), coarse=(20, 0, 160))  # the last head holds eight times the mean of the others

SHAPES = [  # fidelity, head size, heads of a group, rope, learned, dtype, trained tokens (0: any)
    ("bf16", 64, 1, "neox", False, torch.float32, 0),
    ("k8v8", 80, 3, "none", False, torch.float16, 0),
    ("k8v4", 128, 7, "neox", True, torch.float16, 0),
    ("k3v4", 64, 2, "neox", False, torch.float32, 0),
    ("k3v4", 80, 2, "interleaved", False, torch.float32, 0),
    ("k8v4", 64, 3, "partial", True, torch.float32, 0),
    ("k8v4", 80, 3, "neox", False, torch.float16, 44),
    ("bf16", 64, 1, "neox", True, torch.float32, 50),
    ("k3v4", 48, 2, "interleaved", False, torch.float32, 71),
    ("k5v4", 128, 3, "neox", True, torch.float16, 44),
    ("k8v8", 64, 3, "partial", False, torch.float32, 100),
    ("k8v4", 512, 2, "partial", False, torch.float32, 0),  # Gemma 4's full layers
]


def make_memory(fidelity, size, group, kind, learned, dtype, trained, lengths=(150, 9, 64), far=0.0, **sizes):
    """Three sequences in slots 2, 0 and 1, by the reference; far: is added to a column of all keys."""
    torch.manual_seed(0)
    slab, view = make_layer(fidelity, size, dtype=dtype, **{**RAGGED, **sizes})
    slots = view(slab)
    kv_heads = slots.ring_k.shape[1]
    rope, policy = make_rope(kind, size, trained), make_policy(kv_heads, size, learned)
    for slot, length in zip((2, 0, 1), lengths, strict=True):
        k, v, _ = make_tokens(length, kv_heads, size, group, dtype)
        k[..., -1] += far
        advance(slots, slot, k, v, rope, policy)
    return slab, view, rope, policy


@pytest.mark.parametrize("rows", ["decode", "pieces"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}-{s[1]}-{s[2]}-{s[6]}")
def test_attend(shape, rows):
    """Ragged heads, empty memory, padding of every kind, and sequences of different lengths in one call."""
    slab, view, rope, _ = make_memory(*shape)
    size, group, dtype = shape[1], shape[2], shape[5]
    batch = {
        "decode": [(2, 1, 150), (-1, 1, 0), (0, 1, 9), (1, 0, 64), (1, 1, 64), (-1, 0, 0)],
        "pieces": [(-1, 3, 0), (0, 7, 9), (1, 16, 64), (-1, 0, 0), (2, 5, 150)],
    }[rows]
    tokens = sum(count for _, count, _ in batch) + 2  # and vLLM's padding at the end
    q = torch.randn(tokens, 3 * group, 2 * size).to(dtype)[..., :size]  # strided
    expected = torch.full((tokens, 3 * group, size), 7.0, dtype=dtype)
    actual = expected.clone()
    reference.attend(q, view(slab), *make_batch(batch), size**-0.5, expected, rope)
    hints = dict(max_query_len=1) if rows == "decode" else dict(max_query_len=16, live_tokens=28)
    cuda.attend(q, view(slab), *make_batch(batch), size**-0.5, actual, rope, **hints)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-3
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rows", ["decode", "pieces"])
@pytest.mark.parametrize("fidelity", ["bf16", "k8v4"])
def test_attend_where_all_logits_are_low(fidelity, rows):
    """About -120 nats, whose exponential is none in fp32; as in heads of Qwen2.5-Coder-0.5B."""
    slab, view, rope, _ = make_memory(fidelity, 32, 3, "partial", False, torch.float32, 0, far=26.0)
    batch = [(2, 1, 150), (0, 1, 9), (1, 1, 64)] if rows == "decode" else [(0, 7, 9), (1, 16, 64), (2, 5, 150)]
    tokens = sum(count for _, count, _ in batch)
    q = torch.randn(tokens, 9, 32)
    q[..., -1] = -26.0
    expected, actual = torch.zeros_like(q), torch.zeros_like(q)
    reference.attend(q, view(slab), *make_batch(batch), 32**-0.5, expected, rope)
    cuda.attend(q, view(slab), *make_batch(batch), 32**-0.5, actual, rope, max_query_len=max(row[1] for row in batch))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parted", [True, False])
@pytest.mark.parametrize("rows", ["decode", "pieces"])
def test_attend_with_sink_logits(rows, parted, monkeypatch):
    """As gpt-oss has: they count once, however a head's keys are divided among programs."""
    monkeypatch.setattr(attend, "processors", lambda device: 100 if parted else 1)
    slab, view, rope, _ = make_memory("k8v4", 32, 3, "neox", False, torch.float32, 0)
    batch = (
        [(2, 1, 150), (-1, 1, 0), (0, 1, 1), (1, 1, 64)] if rows == "decode" else [(0, 7, 9), (1, 16, 64), (2, 5, 150)]
    )
    q, sink_logits = torch.randn(28, 9, 32), torch.tensor([-9.0, -1, 0, 1, 2, 3, 4, 9, 200]).bfloat16()
    expected, actual = torch.zeros_like(q), torch.zeros_like(q)
    reference.attend(q, view(slab), *make_batch(batch), 32**-0.5, expected, rope, sink_logits)
    slots, longest = view(slab), max(row[1] for row in batch)
    cuda.attend(q, slots, *make_batch(batch), 32**-0.5, actual, rope, sink_logits, max_query_len=longest)
    assert any(cuts.parts for cuts in launch.heads_of(slots)._choices.values()) == parted
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_prompts_of_a_group_with_a_block_for_every_token():
    """48 query heads of a kv head, as StarCoder has."""
    sizes = dict(exact=(600,), coarse=(100,), lengths=(700, 9, 64))
    slab, view, rope, _ = make_memory("bf16", 32, 48, "neox", False, torch.float32, 0, **sizes)
    q, batch = torch.randn(2, 48, 32), [(2, 2, 700)]
    expected, actual = torch.zeros_like(q), torch.zeros_like(q)
    reference.attend(q, view(slab), *make_batch(batch), 32**-0.5, expected, rope)
    cuda.attend(q, view(slab), *make_batch(batch), 32**-0.5, actual, rope, max_query_len=2)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sliding", [None, 13, 40])
@pytest.mark.parametrize("size,group,dtype", [(32, 3, torch.float32), (80, 2, torch.float16)])
def test_sequences_in_parts(size, group, dtype, sliding):
    """Scattered ones, in any order, of other lengths in one call; a sliding window reaches back into others."""
    torch.manual_seed(3)
    none = (0, 0)
    slab, view = make_layer("bf16", size, none, none, 112, 16, dtype, slots=9, sliding=sliding, cells=32)
    written, tolerance = slab.clone(), 1e-5 if dtype == torch.float32 else 3e-3
    for slot, length in (((7, 0, 3, 5), 120), ((2,), 9), ((8, 1), 64)):
        k, v, _ = make_tokens(length, 2, size, group, dtype)
        advance(view(slab), slot, k, v, None, make_policy(2, size))
        for begin in range(0, length, 16):
            piece = slice(begin, min(begin + 16, length))
            hints = dict(max_query_len=piece.stop - begin)
            cuda.write(
                k[piece], v[piece], view(written), *make_batch([(slot, piece.stop - begin, piece.stop)]), **hints
            )
    assert torch.equal(written, slab) and slab[[0, 1, 2, 3, 5, 7, 8]].any(1).all() and not slab[[4, 6]].any()
    q = torch.randn(30, 2 * group, size).to(dtype)
    decode = [((7, 0, 3, 5), 1, 120), ((-1,), 1, 0), ((2,), 1, 9), ((8, 1), 0, 64), ((8, 1), 1, 64)]
    pieces = [((-1,), 3, 0), ((2,), 7, 9), ((8, 1), 11, 64), ((-1,), 0, 0), ((7, 0, 3, 5), 6, 120)]
    for batch in (decode, pieces):
        expected, actual = torch.zeros_like(q), torch.zeros_like(q)
        reference.attend(q, view(slab), *make_batch(batch), 0.2, expected)
        cuda.attend(q, view(slab), *make_batch(batch), 0.2, actual, max_query_len=max(row[1] for row in batch))
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [13, 90])
def test_sliding_layer(window):
    """The last tokens exactly, whatever the tiles and pieces; nothing is merged."""
    torch.manual_seed(2)
    slab, view = make_layer(size=32, exact=(0, 0), coarse=(0, 0), segment=16, slots=3, sliding=window)
    rope, policy = make_rope("neox", 32), make_policy(2, 32)
    for slot, length in zip((2, 0, 1), (150, 9, 64), strict=True):
        k, v, _ = make_tokens(length, 2, 32, 3)
        advance(view(slab), slot, k, v, rope, policy)
    q = torch.randn(28, 6, 32)
    pieces = [(-1, 3, 0), (0, 7, 9), (1, 11, 64), (-1, 0, 0), (2, 6, 150)]
    for batch in ([(2, 1, 150), (-1, 1, 0), (0, 1, 9), (1, 1, 64)], pieces):
        expected, actual, before = torch.zeros_like(q), torch.zeros_like(q), slab.clone()
        reference.attend(q, view(slab), *make_batch(batch), 0.2, expected)
        cuda.attend(q, view(slab), *make_batch(batch), 0.2, actual, max_query_len=max(row[1] for row in batch))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        cuda.merge(view(slab), *make_batch(batch), rope, policy)
        assert torch.equal(slab, before)


@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[3:], ids=lambda s: f"{s[0]}-{s[1]}-{s[3]}-{s[6]}")
def test_merge(shape):
    """Sequences with a full, a nearly full and no memory, one between boundaries' ends, and padding."""
    expected, view, rope, policy = make_memory(*shape, lengths=(160, 16, 48))
    view(expected).pins[2, 0] = torch.tensor([135, 139])
    actual = expected.clone()
    batch = make_batch([(-1, 4, 16), (2, 16, 160), (0, 16, 16), (1, 1, 48)])
    cuda.merge(view(actual), *batch, rope, policy)
    reference.merge(view(expected), *batch, rope, policy)
    half = shape[5] == torch.float16
    assert_same_memory(
        view(actual), view(expected), 4e-3 if half else 1e-4, flipped=0.05 if half else 0, turned=shape[6] > 0
    )
    assert (view(expected).coarse_mass > 1.5).any(), "the test must merge"


def test_merge_of_values_past_fp16():
    """What codes can not hold is held as the most that they can."""
    torch.manual_seed(0)
    slab, view = make_layer("k8v4", 32, dtype=torch.float32, **RAGGED)
    rope, policy = make_rope("neox", 32), make_policy(3, 32)
    k, v, _ = make_tokens(160, 3, 32, 1)
    advance(view(slab), 2, k, 5e4 * v, rope, policy)
    actual, batch = slab.clone(), make_batch([(2, 16, 160)])
    for module, x in ((cuda, actual), (reference, slab)):
        view(x).ring_v[2] *= 2
        module.merge(view(x), *batch, rope, policy)
    expected, found = view(slab).coarse_v_affine[2], view(actual).coarse_v_affine[2]
    assert expected.abs().amax() > 60_000
    torch.testing.assert_close(found, expected, atol=64, rtol=1e-2)


@pytest.mark.parametrize("bound", [20, 32])
@pytest.mark.parametrize("shape", [SHAPES[4], SHAPES[7]], ids=lambda s: f"{s[0]}-{s[1]}-{s[3]}-{s[6]}")
def test_merge_looks_among_few_entries(shape, bound, monkeypatch):
    """Heads with as many coarse entries as a merge looks among, with fewer, and with more, so that it wraps around."""
    monkeypatch.setattr(slot, "CANDIDATES", bound)
    expected, view, rope, policy = make_memory(*shape, lengths=(208, 64, 176), coarse=(20, 0, 70), exact=(4, 0, 6))
    wraps = [len(slot.candidates(70, length - 12, 16)[0]) > 0 for length in (208, 176)]
    assert wraps == [False, True]
    actual = expected.clone()
    batch = make_batch([(2, 1, 208), (0, 1, 64), (1, 1, 176)])
    cuda.merge(view(actual), *batch, rope, policy)
    reference.merge(view(expected), *batch, rope, policy)
    assert_same_memory(view(actual), view(expected), turned=shape[6] > 0)


def test_merge_leaves_other_rows_alone():
    slab, view, rope, policy = make_memory(*SHAPES[4])
    before = slab.clone()
    cuda.merge(view(slab), *make_batch([(2, 1, 150), (-1, 1, 160), (1, 0, 64), (0, 9, 9)]), rope, policy)
    assert torch.equal(slab, before)


def test_merge_when_all_newcomers_are_pinned():
    """Every entry is then a candidate to lose, and must be ordered among all others."""
    expected, view, rope, policy = make_memory(*SHAPES[0], lengths=(160, 1, 1), exact=(20, 9), coarse=(40, 0))
    view(expected).pins[2, 0] = torch.tensor([100, 160])
    actual = expected.clone()
    batch = make_batch([(2, 16, 160)])
    cuda.merge(view(actual), *batch, rope, policy)
    reference.merge(view(expected), *batch, rope, policy)
    assert_same_memory(view(actual), view(expected))


@pytest.mark.parametrize("trained", [0, 21, 40])
def test_a_sequence_from_its_first_token(trained):
    """Write, attend and merge in turn, over an unclean slot and an uneven window."""
    torch.manual_seed(1)
    slab, view = make_layer("k8v4", 32, exact=(3, 5), coarse=(9, 24), window=5, segment=8, slots=2)
    expected = view(slab)
    slab_of_actual = torch.full_like(slab, 255)
    actual = view(slab_of_actual)
    k, v, q = make_tokens(75, 2, 32, 2)
    rope, policy = make_rope("neox", 32, trained), make_policy(2, 32)
    out, expected_out = torch.zeros_like(q), torch.zeros_like(q)
    done = 0
    for count in (3, 5, 1, 7, *[8] * 7, 1, 1, 1):
        piece = slice(done, done + count)
        done += count
        batch = make_batch([(1, count, done)])
        cuda.reset(slab_of_actual, *batch)
        for module, slots, target in ((reference, expected, expected_out), (cuda, actual, out)):
            module.write(k[piece], v[piece], slots, *batch)
            module.attend(q[piece], slots, *batch, 0.2, target[piece], rope)
            hints = {} if module is reference else dict(max_seq_len=done)
            module.merge(slots, *batch, rope, policy, **hints)
    torch.testing.assert_close(out, expected_out, atol=1e-3, rtol=1e-3)
    assert (slab_of_actual[0] == 255).all()
    slab_of_actual[0] = 0
    assert_same_memory(actual, expected, turned=trained > 0)


@pytest.mark.parametrize("parts", [1, 2])
def test_steps_of_serving_are_those_of_the_cpu(monkeypatch, parts):
    """Chunks, padding and decoding through builder, layers and pool, a new tenant of a used slot; nothing is held."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from tests.test_pool import make_pool
    from tests.test_steps import make_batch as serve
    from tests.test_steps import make_builder
    from vllm_deltamem import backend, pool

    def run(steps):
        torch.manual_seed(4)
        held, impl = make_pool(parts), backend.DeltaMemImpl.__new__(backend.DeltaMemImpl)
        builder, outputs, impl.scale = make_builder(held), [], 32**-0.5
        impl.sink_logits = torch.randn(4)
        for rows in steps:
            metadata = builder.build(0, serve(rows))
            q = torch.randn(sum(count for _, count, *_ in rows), 4, 32)
            for impl.position in range(2):
                k, v = torch.randn(2, len(q), 2, 32)
                outputs.append(impl.forward(None, q, k, v, None, metadata, torch.zeros_like(q)))
            held.merge_due()
        return held, torch.cat(outputs)

    steps = [[(1, 27, 27), (2, 37, 37)], [(2, 10, 47), (1, 1, 28)], [(1, 1, 29), (2, 1, 48), (0, 0, 0)]]
    steps += [[(2, 1, 49), (0, 0, 0)], [(1, 7, 7)], [(1, 1, 8)]]
    if parts > 1:  # the second sequence has a slot, the first two parts of others
        blocks = [0], [6, 2], [0, 3, 4]
        steps = [[(blocks[block], *row) for block, *row in rows] for rows in steps]
        steps += [[(blocks[1], 24, 32)], [(blocks[1], 9, 41)], [(blocks[1], 1, 42), (blocks[2], 1, 50)]]
    expected = run(steps)
    for module in (backend, pool):
        monkeypatch.setattr(module, "ON_CPU", False)
        monkeypatch.setattr(module, "kernels", cuda)
    monkeypatch.setattr(pool.SlotPool, "upload", lambda self, values: torch.tensor(values, dtype=torch.int32))
    actual = run(steps)
    torch.testing.assert_close(actual[1], expected[1], atol=1e-3, rtol=1e-3)
    for layer in range(2):
        assert_same_memory(*(held.whole.layers[layer] for held, _ in (actual, expected)))
    slab = StorageWeakRef(actual[0].whole.rows.untyped_storage())
    assert not slab.expired()
    del actual
    gc.collect()  # the interpreter leaves cycles
    assert slab.expired()


def test_reset_clears_new_sequences_only():
    slab, _ = make_layer(slots=4)
    slab.fill_(9)
    cuda.reset(slab, *make_batch([(3, 1, 1), (-1, 2, 2), (0, 4, 5), (1, 6, 6), (2, 0, 0)]))
    assert [int(row.max()) for row in slab] == [9, 0, 9, 0]


def test_reset_clears_the_parts_that_sequences_come_to():
    """The first cell of one, many at once, one that is there already, rows without a slot, padding."""
    rows = [((3, 0, 9), 1, 1), ((5, 1, 2), 1, 9), ((-1, -1, -1), 9, 9), ((4, 6, 7), 19, 20), ((8, 10, 11), 7, 8)]
    rows = make_batch(rows + [((12, 13, 14), 1, 17), ((-1, -1, -1), 0, 0)])
    slab, expected = torch.full((2, 15, 48), 9, dtype=torch.uint8)
    cuda.reset(slab, *rows, cells=8)
    fresh = cpu.reset(expected, *rows, cells=8)
    assert torch.equal(slab, expected) and sorted(fresh) == [1, 3, 6, 7, 14]


def test_cuts_follow_the_heads():
    """A head that holds eight times as much gets eight times the programs, and no part is ever left out."""
    slab, view = make_layer(exact=(10, 10, 10), coarse=(1000, 0, 8000))
    heads = launch.heads_of(view(slab))
    cuts = heads.cuts(tuple(heads.capacities), 16, copies=1, resident=40, part_bytes=512)
    programs = torch.bincount(cuts.table[:, 0].long())
    assert programs[2] >= 6 * programs[0] and programs[1] == 1
    for head, capacity in enumerate(heads.capacities):
        mine = cuts.table[cuts.table[:, 0] == head]
        assert sorted(mine[:, 1].tolist()) == list(range(0, capacity, cuts.size))
        parts = list(range(cuts.first_part[head], cuts.first_part[head + 1]))
        assert sorted(mine[:, 2].tolist()) == (parts or [-1])


@pytest.mark.parametrize("part_bytes, fit", [(1 << 10, True), (1 << 20, False)])
def test_heads_are_cut_as_finely_as_scratch_has_room_for(part_bytes, fit):
    slab, view = make_layer("bf16", 32, (0, 0), (0, 0), 3 * 512 - 16, 16, cells=512)
    cuts = launch.heads_of(view(slab)).cuts((1536, 1536), 16, 32, resident=8, part_bytes=part_bytes, most=96)
    assert (cuts.size <= 96) == fit and cuts.parts * 32 * part_bytes <= launch.LARGEST_SCRATCH


def test_what_a_buffer_outgrew_takes_no_more_than_the_buffer():
    """Nothing that a captured graph may point into is ever freed."""
    device, held = torch.device("cpu"), {}
    for count in range(1, 3000, 7):
        grown = launch.buffer("growing", (count, 3), torch.float32, device)
        assert grown.shape == (count, 3)
        held[grown.data_ptr()] = grown.untyped_storage().nbytes()
    assert sum(held.values()) <= 2 * max(held.values()) < 4 * grown.nbytes
    assert launch.buffer("growing", (5,), torch.float32, device).data_ptr() == grown.data_ptr()


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4], SHAPES[7]], ids=lambda s: f"{s[0]}-{s[1]}-{s[2]}")
@pytest.mark.parametrize("read", [attend.READ, 10_000], ids=["all at a time", "few at a time"])
def test_no_call_takes_more_scratch_than_was_reserved(shape, read, monkeypatch):
    """vLLM gives what is left of the device to slots: what grows afterwards may find nothing."""
    monkeypatch.setattr(attend, "READ", read)
    monkeypatch.setattr(launch, "_buffers", {})
    monkeypatch.setattr(launch, "_outgrown", [])
    monkeypatch.setattr(merge, "_work", cache(merge._work.__wrapped__))
    slab, view, rope, policy = make_memory(*shape)
    size, group, dtype = shape[1], shape[2], shape[5]
    cuda.reserve([view(slab.to("meta"))], attending=8, merging=3, device=slab.device)
    reserved = {key: held.data_ptr() for key, held in launch._buffers.items()}
    assert ("read" in {name for name, *_ in reserved}) == (shape[0] != "bf16")
    for rows in (
        [(2, 1, 150)],
        [(2, 1, 150), (0, 1, 9), (1, 1, 64), (-1, 1, 0)],
        [(2, 6, 150), (0, 7, 9), (1, 16, 64), (-1, 3, 0)],
        [(-1, 1, 0), (2, 2, 150), (-1, 1, 0), (0, 2, 9), (-1, 1, 0), (1, 2, 64), (-1, 1, 0), (2, 2, 150)],
    ):
        tokens = sum(count for _, count, _ in rows)
        q = torch.randn(tokens, 3 * group, size).to(dtype)
        longest = max(count for _, count, _ in rows)
        cuda.attend(q, view(slab), *make_batch(rows), size**-0.5, q.clone(), rope, max_query_len=longest)
    cuda.merge(view(slab), *make_batch([(2, 1, 160), (0, 1, 16), (1, 1, 64)]), rope, policy)
    assert {key: held.data_ptr() for key, held in launch._buffers.items()} == reserved and not launch._outgrown


def test_slots_that_are_no_views_of_a_slab_are_refused():
    slab, view = make_layer()
    slots = view(slab)
    with pytest.raises(ValueError, match="Layout.views"):
        launch.heads_of(slots._replace(exact_start=slots.exact_start.clone(), ring_k=slots.ring_k.clone()))
