"""Full memories of one layer with random contents, at the sizes that benchmarks/kernels.py runs."""

from typing import NamedTuple

import torch

from vllm_deltamem.calibration.pairs import fit
from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.kernels.pairs import is_paired
from vllm_deltamem.kernels.slot import LayerSlots, Policy, Rope, pack_rank, rotate
from vllm_deltamem.memory import Layout, Shape, plan_layout


class Scale(NamedTuple):
    """How large everything is."""

    model: str
    device: str
    dtype: torch.dtype
    kv_heads: int
    query_heads: int
    size: int
    context: int
    memories: tuple[int, ...]  # tokens per head
    batches: tuple[int, ...]
    cache: int  # bytes of memory that calls go over before they come back to a slot
    settings: dict

    @property
    def vector_bytes(self) -> int:
        return self.size * self.dtype.itemsize


class Memory(NamedTuple):
    """The memories of `copies` batches that take turns, and what a call on them needs."""

    name: str
    slab: torch.Tensor
    slots: LayerSlots
    rope: Rope
    policy: Policy
    batch: int
    copies: int

    @property
    def entries(self) -> int:
        """Of all heads of a slot."""
        return self.slots.exact_rank.shape[1] + self.slots.coarse_rank.shape[1]

    @property
    def coarse(self) -> int:
        return self.slots.coarse_rank.shape[1]

    def field_bytes(self, *names: str) -> int:
        """Of a slot."""
        fields = (getattr(self.slots, name)[0] for name in names)
        return sum(field.numel() * field.element_size() for field in fields)

    def rows(self, copy: int, tokens: int, length: int) -> tuple[torch.Tensor, ...]:
        """Index tensors of a batch of sequences of that length, each with `tokens` new tokens."""
        options = dict(dtype=torch.int32, device=self.slab.device)
        slots = copy * self.batch + torch.arange(self.batch, **options)
        return slots, torch.arange(self.batch + 1, **options) * tokens, torch.full((self.batch,), length, **options)


def make_memory(scale: Scale, memory: int, fidelity: str, ragged: bool, batch: int) -> Memory:
    """Slots as if scale.context tokens had streamed through: the ranks of the best, masses, codes.

    ragged: the first head holds eight times as much as each of the others, or every token if that is less.
    """
    shape = Shape(1, scale.kv_heads, scale.size, scale.dtype, 2 * scale.context)
    layout = plan_layout(shape, DeltaMemConfig(memory=memory, fidelity=fidelity, **scale.settings))
    if ragged:
        layout = _with_a_large_head(layout, scale.context - layout.ring)
    copies = max(1, -(-scale.cache // (batch * layout.slot_bytes)))
    slab = torch.zeros(batch * copies, layout.slot_bytes, dtype=torch.uint8, device=scale.device)
    slots = layout.views(slab, 0, fit(*torch.rand(2, scale.kv_heads, scale.size // 2)))
    frequency = 500_000.0 ** -torch.linspace(0, 1, scale.size // 2, device=scale.device)
    angle = torch.arange(2 * scale.context, device=scale.device)[:, None] * frequency
    rope = Rope(angle.cos(), angle.sin(), interleaved=False)
    gate = torch.tensor([[-1.0, 4.0, -0.1]], device=scale.device).repeat(scale.kv_heads, 1)
    for slot in range(len(slab)):
        _fill(slots, slot, scale.context, rope)
    name = f"{fidelity}, ragged" if ragged else fidelity
    return Memory(name, slab, slots, rope, Policy(None, gate), batch, copies)


def _with_a_large_head(layout: Layout, most: int) -> Layout:
    """The same entries, the first head with eight times as many as each of the others, or `most` if that is less."""
    others = layout.shape.kv_heads - 1

    def share(total: int, most: int) -> tuple[int, ...]:
        large = min(8 * total // (8 + others), most)
        return large, *[(total - large) // others] * others

    exact = share(sum(layout.exact[0]), most)
    coarse = share(sum(layout.coarse[0]), most - exact[0])
    return Layout(
        layout.shape, layout.codecs, layout.window, layout.segment, layout.sinks, layout.pinned, (exact,), (coarse,)
    )


def _fill(slots: LayerSlots, slot: int, length: int, rope: Rope) -> None:
    """A slot at `length` tokens, not yet merged, whose keys share a direction before RoPE: scores are near -0.89."""
    (kv_heads, ring, size), device = slots.ring_k.shape[1:], slots.ring_k.device
    gone = length - slots.window - slots.segment  # tokens that the memory has taken in
    position = torch.arange(length - ring, length, device=device)
    direction = 2 * torch.randn(kv_heads, 1, size, device=device)
    keys = torch.randn(kv_heads, ring, size, device=device) + direction
    slots.ring_k[slot, :, position % ring] = rotate(keys, position, rope).to(slots.ring_k.dtype)
    slots.key_sum[slot] = direction[:, 0] * gone
    for field in (slots.ring_v, slots.exact_k, slots.exact_v):
        field[slot].normal_()
    for codes, affine, bits in zip(slots[7:9], slots[9:11], slots.codec, strict=True):
        if bits == 16:
            codes[slot].normal_()
        elif is_paired(bits):
            codes[slot].random_(0, 256)
            affine[slot] = 1.0
        else:
            codes[slot].random_(0, 256)
            affine[slot, ..., 0], affine[slot, ..., 1] = 4 / (2**bits - 1), -2.0
    slots.coarse_mass[slot].uniform_(1, 5)
    for g in range(kv_heads):
        x, y = (slice(int(start[g]), int(start[g + 1])) for start in (slots.exact_start, slots.coarse_start))
        exact = x.stop - x.start
        held = exact + y.stop - y.start
        score = (0.03 * torch.randn(gone, device=device) - 0.89).sort(descending=True).values[:held]
        rank = pack_rank(score, torch.randperm(gone, device=device)[:held])
        slots.exact_rank[slot, x] = rank[:exact][torch.randperm(exact, device=device)]
        slots.coarse_rank[slot, y] = rank[exact:][torch.randperm(held - exact, device=device)]
