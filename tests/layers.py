"""One layer of slots in any shape, and what the tests of its kernels do with it."""

import torch

from vllm_deltamem.kernels import reference
from vllm_deltamem.kernels.slot import FIDELITIES, LayerSlots, Policy, Rope, decode, rank_position
from vllm_deltamem.memory import Layout, Shape

POSITIONS = 4096


def make_layer(fidelity="k8v4", size=32, exact=(4,), coarse=(20,), window=12, segment=16, dtype=torch.float32, slots=3,
               sliding=None):  # fmt: skip
    """A zeroed slab of two layers, and a function that views the second of them on any copy of it."""
    shape = Shape(2, len(exact), size, dtype, POSITIONS, (None, sliding))
    layout = Layout(
        shape, FIDELITIES[fidelity], window, segment, 2, 4, exact=((3,) * len(exact), exact), coarse=(coarse, coarse)
    )
    # rows with a gap between them, as vLLM's blocks may have
    slab = torch.zeros(slots, layout.slot_bytes + 64, dtype=torch.uint8)[:, : layout.slot_bytes]
    return slab, lambda copy: layout.views(copy, 1)


def make_rope(kind, size, trained=0, positions=POSITIONS) -> Rope | None:
    if kind == "none":
        return None
    rotary = size // 2 if kind == "partial" else size
    angle = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(rotary // 2) / (rotary // 2))
    return Rope(angle.cos(), angle.sin(), kind == "interleaved", trained)


def make_policy(kv_heads=3, size=32, learned=False, units=24) -> Policy:
    gate = torch.tensor([[-1.0, 4.0, -0.1]]).expand(kv_heads, 3)
    shapes = (kv_heads, 2 * size, units), (kv_heads, units), (kv_heads, units), (kv_heads,)
    return Policy(tuple(torch.randn(shape) for shape in shapes) if learned else None, gate)


def make_tokens(count, kv_heads=3, size=32, group=2, dtype=torch.float32):
    """k, v [T, G, D] and q [T, H, D]; keys share a direction, as those of real models do."""
    k, v = torch.randn(count, kv_heads, size) + 2 * torch.randn(kv_heads, size), torch.randn(count, kv_heads, size)
    return k.to(dtype), v.to(dtype), torch.randn(count, kv_heads * group, size).to(dtype)


def make_batch(rows):
    """Index tensors of rows (slot, query tokens, length); slot_indices is a column of a wider block table."""
    slots, counts, lengths = zip(*rows, strict=True)
    table = torch.full((len(rows), 3), 77, dtype=torch.int32)
    table[:, 0] = torch.tensor(slots)
    cu_seqlens = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return table[:, 0], cu_seqlens, torch.tensor(lengths, dtype=torch.int32)


def advance(slots: LayerSlots, slot, k, v, rope, policy) -> None:
    """Let a sequence reach the length of k in `slot`, by the reference. The last segment isn't merged yet."""
    for start in range(0, len(k), slots.segment):
        piece = slice(start, min(start + slots.segment, len(k)))
        batch = make_batch([(slot, piece.stop - start, piece.stop)])
        reference.write(k[piece], v[piece], slots, *batch)
        if piece.stop < len(k):
            reference.merge(slots, *batch, rope, policy)


def assert_same_memory(actual: LayerSlots, expected: LayerSlots, tolerance=1e-4, flipped=0.0, turned=False) -> None:
    """Entries, masses and key sums agree: the same tokens in the same entries, contents to rounding.

    flipped: share of coarse entries whose contents may differ, because a loser was as near to another entry.
    turned: whether exact keys that have become far may differ by rounding.
    """
    for tier in ("exact_rank", "coarse_rank"):
        a, e = getattr(actual, tier), getattr(expected, tier)
        assert torch.equal(rank_position(a), rank_position(e)), tier
        assert torch.equal(a == 0, e == 0), tier
    rounding = tolerance if turned else 0
    torch.testing.assert_close(actual.exact_k, expected.exact_k, atol=rounding, rtol=rounding)
    assert torch.equal(actual.exact_v, expected.exact_v)
    torch.testing.assert_close(actual.key_sum, expected.key_sum, atol=1e-3, rtol=1e-4)
    differs = (actual.coarse_mass - expected.coarse_mass).abs() > tolerance * expected.coarse_mass
    for part, bits in (("k", expected.codec.key_bits), ("v", expected.codec.value_bits)):
        a, e = (
            decode(getattr(s, f"coarse_{part}"), getattr(s, f"coarse_{part}_affine"), bits, torch.float32)
            for s in (actual, expected)
        )
        step = 0 if bits == 16 else getattr(expected, f"coarse_{part}_affine")[..., 0].float().amax(-1, keepdim=True)
        differs |= ((a.float() - e.float()).abs() > step + tolerance * (1 + e.float().abs())).any(-1)
    held = expected.coarse_rank != 0
    assert differs[held].float().mean() <= flipped if held.any() else not differs.any()
