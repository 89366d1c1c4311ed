"""The Triton kernels compiled for a CUDA device, against kernels/reference.py on the CPU; and in CUDA graphs."""

import pytest
import torch

from tests.layers import advance, assert_same_memory, make_batch, make_layer, make_policy, make_rope, make_tokens
from vllm_deltamem.kernels import reference

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
from vllm_deltamem.kernels import cuda  # noqa: E402

RAGGED = dict(exact=(4, 0, 6), coarse=(20, 0, 160))
WIDE = dict(exact=(100, 64, 300, 0), coarse=(900, 3000, 24_000, 700), window=256, segment=512)

SHAPES = [  # fidelity, head size, heads of a group, rope, learned, sizes, trained tokens (0: any)
    ("bf16", 64, 1, "neox", False, RAGGED, 0),
    ("k8v8", 80, 3, "none", False, RAGGED, 0),
    ("k8v4", 128, 7, "neox", True, RAGGED, 0),
    ("k3v4", 128, 4, "neox", False, RAGGED, 0),
    ("k3v4", 96, 2, "interleaved", False, RAGGED, 0),
    ("k8v4", 64, 3, "partial", True, RAGGED, 0),
    ("k8v4", 128, 4, "neox", False, WIDE, 0),
    ("bf16", 128, 8, "neox", True, WIDE, 0),
    ("k3v4", 256, 16, "neox", False, RAGGED, 0),
    ("k8v4", 64, 3, "neox", True, RAGGED, 50),
    ("k3v4", 96, 2, "interleaved", False, RAGGED, 71),
    ("k8v4", 128, 4, "partial", False, WIDE, 1500),
]
SLIDING = ("bf16", 256, 2, "neox", False, dict(exact=(0, 0), coarse=(0, 0), segment=64, sliding=300), 0)
DTYPES = torch.bfloat16, torch.float16, torch.float32


def make_memory(shape, dtype, lengths, far=0.0):
    """Sequences in slots 2, 0, 1; lengths: in segments, and in tokens over; far: is added to a column of all keys."""
    fidelity, size, group, kind, learned, sizes, trained = shape
    torch.manual_seed(0)
    slab, view = make_layer(fidelity, size, dtype=dtype, **sizes)
    slots = view(slab)
    kv_heads = slots.ring_k.shape[1]
    rope, policy = make_rope(kind, size, trained), make_policy(kv_heads, size, learned)
    lengths = [segments * slots.segment + over for segments, over in lengths]
    for slot, length in zip((2, 0, 1), lengths, strict=True):
        k, v, _ = make_tokens(length, kv_heads, size, group, dtype)
        k[..., -1] += far
        advance(slots, slot, k, v, rope, policy)
    return slab, view, rope, policy, lengths


def to_cuda(rope, policy):
    rope = rope and rope._replace(cos=rope.cos.cuda(), sin=rope.sin.cuda())
    importance = policy.importance and tuple(weight.cuda() for weight in policy.importance)
    return rope, policy._replace(importance=importance, gate=policy.gate.cuda())


def on_cuda(batch):
    return [tensor.cuda() for tensor in batch]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ["decode", "pieces"])
@pytest.mark.parametrize(
    "shape", [*SHAPES, SLIDING], ids=lambda s: f"{s[0]}-{s[1]}-{s[2]}-{s[3]}-{sum(s[5]['coarse'])}-{s[6]}"
)
def test_attend(shape, rows, dtype):
    slab, view, rope, policy, (long, short, middle) = make_memory(shape, dtype, [(6, 5), (0, 9), (3, 0)])
    slots = view(slab)
    heads, size = slots.ring_k.shape[1] * shape[2], shape[1]
    longest = min(slots.segment, middle)
    batch = {
        "decode": [(2, 1, long), (-1, 1, 0), (0, 1, short), (1, 0, middle), (1, 1, middle), (-1, 0, 0)],
        "pieces": [(-1, 3, 0), (0, 7, short), (1, longest, middle), (-1, 0, 0), (2, 5, long)],
    }[rows]
    tokens = sum(count for _, count, _ in batch) + 2
    q = torch.randn(tokens, heads, 2 * size).to(dtype)[..., :size]
    expected = torch.full((tokens, heads, size), 7.0, dtype=dtype)
    actual = expected.cuda()
    reference.attend(q, slots, *make_batch(batch), size**-0.5, expected, rope)
    hints = dict(max_query_len=1) if rows == "decode" else dict(max_query_len=longest, live_tokens=longest + 12)
    rope, _ = to_cuda(rope, policy)
    cuda.attend(q.cuda(), view(slab.cuda()), *on_cuda(make_batch(batch)), size**-0.5, actual, rope, **hints)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rows", ["decode", "pieces"])
@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[11]], ids=lambda s: str(sum(s[5]["coarse"])))
def test_attend_with_sink_logits(shape, rows):
    """As gpt-oss has; heads of one piece, and of many."""
    slab, view, rope, policy, (long, short, middle) = make_memory(shape, torch.bfloat16, [(6, 5), (0, 9), (3, 0)])
    heads, size, longest = view(slab).ring_k.shape[1] * shape[2], shape[1], min(view(slab).segment, middle)
    batch = [(2, 1, long), (0, 1, short)] if rows == "decode" else [(0, 7, short), (1, longest, middle), (2, 5, long)]
    q = torch.randn(sum(count for _, count, _ in batch), heads, size).bfloat16()
    sink_logits = torch.linspace(-9, 9, heads).bfloat16()
    expected = torch.zeros_like(q)
    actual = expected.cuda()
    reference.attend(q, view(slab), *make_batch(batch), size**-0.5, expected, rope, sink_logits)
    rope, _ = to_cuda(rope, policy)
    given = size**-0.5, actual, rope, sink_logits.cuda()
    cuda.attend(
        q.cuda(), view(slab.cuda()), *on_cuda(make_batch(batch)), *given, max_query_len=max(b[1] for b in batch)
    )
    torch.testing.assert_close(actual.cpu(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[11]], ids=lambda s: str(sum(s[5]["coarse"])))
def test_decode_where_all_logits_are_low(shape, dtype):
    """About -120 nats, in a column that is not rotated; heads of one piece, and of many."""
    far = (120 * shape[1] ** 0.5) ** 0.5
    slab, view, rope, policy, lengths = make_memory(shape, dtype, [(6, 5), (0, 9), (3, 0)], far)
    batch = [(slot, 1, length) for slot, length in zip((2, 0, 1), lengths, strict=True)]
    q = torch.randn(3, view(slab).ring_k.shape[1] * shape[2], shape[1]).to(dtype)
    q[..., -1] = -far
    expected = torch.zeros_like(q)
    actual = expected.cuda()
    reference.attend(q, view(slab), *make_batch(batch), shape[1] ** -0.5, expected, rope)
    rope, _ = to_cuda(rope, policy)
    rows = on_cuda(make_batch(batch))
    cuda.attend(q.cuda(), view(slab.cuda()), *rows, shape[1] ** -0.5, actual, rope, max_query_len=1)
    tolerance = {torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float32: 1e-3}[dtype]
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}-{s[1]}-{s[3]}-{sum(s[5]['coarse'])}-{s[6]}")
def test_merge(shape, dtype):
    """fp32 agrees to rounding; in 16 bits a loser may find another entry as near as the reference's.

    Past the trained context scores are large numbers that lie close to each other.
    """
    expected, view, rope, policy, (full, first, middle) = make_memory(shape, dtype, [(6, 0), (1, 0), (3, 0)])
    view(expected).pins[2, 0] = torch.tensor([full - 40, full - 36])
    actual = expected.cuda()
    batch = make_batch([(-1, 4, first), (2, 8, full), (0, 8, first), (1, 1, middle)])
    cuda.merge(view(actual), *on_cuda(batch), *to_cuda(rope, policy))
    reference.merge(view(expected), *batch, rope, policy)
    exact = dtype == torch.float32
    tolerance = 1e-3 if exact else 3e-2
    flipped = 0.002 if exact else 0.05
    far = dict(turned=True, misplaced=0.002) if shape[6] else {}
    assert_same_memory(view(actual.cpu()), view(expected), tolerance, flipped, **far)


@pytest.mark.parametrize("shape", SHAPES[2:6:3], ids=str)
def test_a_row_is_merged_alike_alone_and_among_others(shape):
    slab, view, rope, policy, lengths = make_memory(shape, torch.bfloat16, [(6, 0), (3, 0), (4, 0)])
    together, alone = slab.cuda(), slab.cuda()
    rows = [(slot, 1, length) for slot, length in zip((2, 0, 1), lengths, strict=True)]
    cuda.merge(view(together), *on_cuda(make_batch(rows)), *to_cuda(rope, policy))
    for row in reversed(rows):
        cuda.merge(view(alone), *on_cuda(make_batch([row])), *to_cuda(rope, policy))
    assert torch.equal(together, alone)


def test_decoding_replayed_from_a_graph():
    """A captured step decodes over several boundaries, with padding, like eager steps, and allocates nothing.

    Merging is no part of it: as in serving, it comes between steps.
    """
    dtype, size = torch.bfloat16, 128
    torch.manual_seed(0)
    slab, view = make_layer("k8v4", size, exact=(4, 9), coarse=(60, 200), dtype=dtype)
    rope, policy = to_cuda(make_rope("neox", size), make_policy(2, size))
    captured, eager = slab.cuda(), slab.cuda()
    k, v, q = (tensor.cuda() for tensor in make_tokens(3 * 120, 2, size, 4, dtype))

    def step(slab, views, k, v, q, out, rows):
        cuda.reset(slab, *rows)
        cuda.write(k, v, views, *rows, max_query_len=1)
        cuda.attend(q, views, *rows, size**-0.5, out, max_query_len=1)

    rows = on_cuda(make_batch([(0, 1, 1), (1, 1, 1), (-1, 0, 0)]))
    views = view(captured)
    now = [tensor[:3].clone() for tensor in (k, v, q)]
    out = torch.zeros_like(now[2])
    eager_views, eager_out = view(eager), torch.zeros_like(out)
    for memory, its_views, its_out in ((captured, views, out), (eager, eager_views, eager_out)):
        step(memory, its_views, *now, its_out, rows)  # compiles, and reads the layer's sizes
        cuda.merge(its_views, *rows, rope, policy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, views, *now, out, rows)
    held = torch.cuda.memory_allocated()
    for length in range(1, 120):
        slots, second = rows[0], max(length - 30, 0)  # the second sequence starts later: padding until then
        slots.copy_(torch.tensor([0, 1 if second else -1, -1]))
        rows[2].copy_(torch.tensor([length, second, 0]))
        for target, source in zip(now, (k, v, q), strict=True):
            target.copy_(source[3 * length - 3 : 3 * length])
        graph.replay()
        assert torch.cuda.memory_allocated() == held
        step(eager, eager_views, *now, eager_out, rows)
        for its_views in (views, eager_views):
            cuda.merge(its_views, *rows, rope, policy)
        assert torch.equal(out[: 1 + (second > 0)], eager_out[: 1 + (second > 0)])
    assert torch.equal(captured[:2], eager[:2])
