"""One layer of slots in any shape, and what the tests of its kernels do with it."""

import torch

from vllm_deltamem.calibration.pairs import fit
from vllm_deltamem.kernels import reference
from vllm_deltamem.kernels.pairs import Pairs
from vllm_deltamem.kernels.slot import FIDELITIES, LayerSlots, Policy, Rope, decode, rank_position
from vllm_deltamem.memory import Layout, Shape

POSITIONS = 4096


def make_layer(fidelity="k8v4", size=32, exact=(4,), coarse=(20,), window=12, segment=16, dtype=torch.float32, slots=3,
               sliding=None, cells=0):  # fmt: skip
    """A zeroed slab of two layers, and a function that views the second of them on any copy of it.

    cells: of a part, where slots are parts.
    """
    shape = Shape(2, len(exact), size, dtype, POSITIONS, (None, sliding))
    codecs, exact = (FIDELITIES[fidelity],) * 2, ((3,) * len(exact), exact)
    layout = Layout(shape, codecs, window, segment, 2, 4, exact=exact, coarse=(coarse, coarse), cells=cells)
    # rows with a gap between them, as vLLM's blocks may have
    slab = torch.zeros(slots, layout.slot_bytes + 64, dtype=torch.uint8)[:, : layout.slot_bytes]
    pairs = make_pairs(len(coarse), size)
    return slab, lambda copy: layout.views(copy, 1, pairs)


def make_pairs(kv_heads=3, size=32) -> Pairs:
    """Heads that look at other columns each."""
    return fit(*torch.rand(2, kv_heads, size // 2, generator=torch.Generator().manual_seed(0)))


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
    """Index tensors of rows (slot, query tokens, length); slot_indices are columns of a wider block table.

    A slot may be a tuple of parts, in all rows.
    """
    slots, counts, lengths = zip(*rows, strict=True)
    parted = isinstance(slots[0], tuple)
    table = torch.full((len(rows), 2 + max(map(len, slots)) if parted else 3), 77, dtype=torch.int32)
    for row, slot in zip(table, slots, strict=True):
        row[: len(slot) if parted else 1] = torch.tensor(slot)
    cu_seqlens = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return table[:, :-2] if parted else table[:, 0], cu_seqlens, torch.tensor(lengths, dtype=torch.int32)


def advance(slots: LayerSlots, slot, k, v, rope, policy) -> None:
    """Let a sequence reach the length of k in `slot`, by the reference. The last segment isn't merged yet."""
    for start in range(0, len(k), slots.segment):
        piece = slice(start, min(start + slots.segment, len(k)))
        batch = make_batch([(slot, piece.stop - start, piece.stop)])
        reference.write(k[piece], v[piece], slots, *batch)
        if piece.stop < len(k):
            reference.merge(slots, *batch, rope, policy)


def assert_same_memory(
    actual: LayerSlots, expected: LayerSlots, tolerance=1e-4, flipped=0.0, turned=False, misplaced=0.0
) -> None:
    """Entries, masses and key sums agree: the same tokens in the same entries, contents to rounding.

    flipped: share of coarse entries whose contents may differ, because a loser was as near to another entry.
    turned: whether exact keys that have become far may differ by rounding.
    misplaced: share of tokens that may be held by one memory only, because scores were as good as equal; the others
        may then lie in different entries.
    """
    exact, coarse = (
        _held_by_both(getattr(actual, f"{tier}_rank"), getattr(expected, f"{tier}_rank"), start, misplaced)
        for tier, start in (("exact", expected.exact_start), ("coarse", expected.coarse_start))
    )

    def both(field, places):
        return (
            getattr(slots, field)[slot, entry] for slots, (slot, entry) in zip((actual, expected), places, strict=True)
        )

    rounding = tolerance if turned else 0
    torch.testing.assert_close(*both("exact_k", exact), atol=rounding, rtol=rounding)
    assert torch.equal(*both("exact_v", exact))
    torch.testing.assert_close(actual.key_sum, expected.key_sum, atol=1e-3, rtol=1e-4)
    a, e = both("coarse_mass", coarse)
    differs = (a - e).abs() > tolerance * e
    for part, bits in (("k", expected.codec.key_bits), ("v", expected.codec.value_bits)):
        codes, affines = both(f"coarse_{part}", coarse), list(both(f"coarse_{part}_affine", coarse))
        heads = (torch.bucketize(entry, expected.coarse_start[1:-1], right=True) for _, entry in coarse)
        coded = zip(codes, affines, map(expected.pairs.of, heads), strict=True)
        a, e = (decode(code, affine, bits, torch.float32, pairs) for code, affine, pairs in coded)
        step = 0 if bits == 16 else affines[1][..., 0].float().amax(-1, keepdim=True)
        differs |= ((a.float() - e.float()).abs() > step + tolerance * (1 + e.float().abs())).any(-1)
    assert differs.sum() <= flipped * len(differs)


def _held_by_both(actual, expected, start, misplaced):
    """(slot, entry) in either memory of the tokens that both hold, from ranks [S, E] of heads that begin at `start`."""
    assert torch.equal(actual == 0, expected == 0)
    slot, entry = (expected != 0).nonzero(as_tuple=True)
    if not misplaced:
        assert torch.equal(rank_position(actual), rank_position(expected))
        return [(slot, entry)] * 2
    head = torch.bucketize(entry, start[1:-1], right=True)
    tokens = [(slot * len(start) + head) * POSITIONS + rank_position(rank[slot, entry]) for rank in (actual, expected)]
    places = []
    for mine, other in (tokens, tokens[::-1]):
        order = mine.argsort()
        shared = order[torch.isin(mine[order], other)]
        assert len(order) - len(shared) <= misplaced * len(order)
        places.append((slot[shared], entry[shared]))
    return places
