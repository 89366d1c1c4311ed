"""All slots of a worker: vLLM's cache tensors seen as slabs."""

import weakref
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_deltamem.kernels.slot import LayerSlots, Policy, Rope
from vllm_deltamem.plan import MemoryPlan
from vllm_deltamem.transfers import Branch

logger = init_logger(__name__)
USUAL_ROWS = 256  # of a step
ON_CPU = current_platform.is_cpu()
if ON_CPU:
    from vllm_deltamem.kernels import cpu as kernels
    from vllm_deltamem.kernels.readouts import Readouts
else:
    from vllm_deltamem.kernels import cuda as kernels


class Rows(NamedTuple):
    """The sequences of a call, see kernels/reference.py."""

    slot_indices: torch.Tensor  # [N] int32, -1 for rows that sit the call out
    cu_seqlens: torch.Tensor  # [N + 1] int32
    seq_lens: torch.Tensor  # [N] int32, tokens of the sequence up to the end of the call


class Due(NamedTuple):
    """Sequences that complete a segment with a step, which makes another leave the window."""

    rows: Rows  # of one token each
    longest: int  # tokens of the longest


@dataclass
class SlotPool:
    """The slots of one worker, and what of a step concerns them."""

    slab: torch.Tensor  # [S, worker_bytes] uint8, one row per slot; row 0 is vLLM's null block
    layers: list[LayerSlots]
    extents: list[slice]  # of a slab's row, what is a layer's alone
    policies: list[Policy]
    ropes: list[Rope | None]
    readouts: "list[Readouts]"  # per layer, on a CPU
    pins: dict[int, list[list[int]]] = field(default_factory=dict)  # spans of the slots that have any
    branches: list[Branch] = field(default_factory=list)  # of the step under way
    due: list[Due] = field(default_factory=list)  # what merge_due() has to do after the forward pass
    # of the model that this process loaded last; vLLM makes and drops a small cache before the real one
    _holder: ClassVar[weakref.ref | None] = None

    @classmethod
    def held_by(cls, builder) -> None:
        """Let serving() answer the `pool` of this metadata builder, as long as it lives."""
        cls._holder = weakref.ref(builder)

    @classmethod
    def serving(cls) -> "SlotPool | None":
        """The pool of the model that this process loaded last, while its metadata builder lives."""
        builder = cls._holder and cls._holder()
        return builder.pool if builder is not None else None

    @property
    def slots(self) -> int:
        """Slots that sequences can hold."""
        return len(self.slab) - 1

    def merge(self, layer: int, due: list[Due]) -> None:
        """Merge in one layer."""
        for rows, longest in due:
            known = {"readouts": self.readouts[layer]} if ON_CPU else {"max_seq_len": longest}
            kernels.merge(self.layers[layer], *rows, self.ropes[layer], self.policies[layer], **known)

    @torch.inference_mode()
    def merge_due(self) -> None:
        """Merge in all layers what the last decoding step left, once."""
        due, self.due = self.due, []
        if due:
            for layer in range(len(self.layers)):
                self.merge(layer, due)

    @torch.inference_mode()
    def warm_up(self, queries: list[tuple[int, torch.Tensor | None]], most_rows: int, longest: int) -> None:
        """Compile, on a GPU, what steps of up to so many rows launch, and look it up: no request should wait for it.

        Rows without a slot do that. queries: of every layer, heads and sink logits; longest: tokens of the longest
        sequence. What more than USUAL_ROWS take, compiled anew for every few hundred, is left until such a step comes.
        """
        tokens = 2
        for count in kernels.least_rows(min(most_rows, USUAL_ROWS)):
            rows = Rows(*map(self.upload, ([-1] * count, [0] + [tokens] * count, [tokens] * count)))
            self.reset(rows)
            for slots, rope, (heads, sinks) in zip(self.layers, self.ropes, queries, strict=True):
                _, kv_heads, _, size = slots.ring_k.shape
                qkv = slots.ring_k.new_zeros(tokens, heads + 2 * kv_heads, size)
                q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
                out = torch.zeros_like(q, memory_format=torch.contiguous_format)
                for query_len in (1, tokens):
                    known = {"max_query_len": query_len, "live_tokens": tokens}
                    kernels.write(k, v, slots, *rows, **known)
                    kernels.attend(q, slots, *rows, 1.0, out, rope, sinks, **known)
        self.due = [Due(Rows(*map(self.upload, ([-1], [0, 1], [0]))), longest)]
        self.merge_due()

    def reset(self, rows: Rows) -> None:
        """Clear the slots of sequences whose first token is in this step, and write their pins."""
        fresh = kernels.reset(self.slab, *rows)
        if ON_CPU:
            self.forget(fresh)
        self.write_pins()

    def forget(self, slots: list[int]) -> None:
        """Drop what the CPU path has read of slots that were cleared or restored."""
        for readouts in self.readouts:
            for slot in slots:
                readouts.forget(slot)

    def pin(self, claimed: dict[int, list[list[int]]]) -> None:
        """Note the pinned spans of slots that sequences just claimed, and write them."""
        for slot, spans in claimed.items():
            self.layers[0].pins[slot] = 0  # a memory that went back may have had some past its new end
            self.pins.pop(slot, None)
            if spans:
                self.pins[slot] = spans
        if claimed:
            self.write_pins()

    def copy(self, source: int, target: int) -> None:
        """Have a vacant slot hold what another one holds now."""
        self.slab[target] = self.slab[source]
        self.pins.pop(target, None)
        if source in self.pins:
            self.pins[target] = self.pins[source]
        self.forget([target])

    def branch(self, branches: list[Branch]) -> None:
        """Have the forward pass copy slots, none of which has pins, while prompts are read."""
        self.branches = branches
        self.pin({branch.target: [] for branch in branches})
        self.forget([branch.target for branch in branches])

    def copy_branches(self, layer: int, piece: int) -> None:
        """Copy in one layer what is due after this piece of every prompt."""
        for branch in self.branches:
            if branch.piece == piece:
                self.slab[branch.target, self.extents[layer]] = self.slab[branch.slot, self.extents[layer]]

    def pins_of(self, slot: int) -> list[list[int]]:
        """The spans that are written in a slot."""
        return [span for span in self.layers[0].pins[slot].tolist() if any(span)]

    def write_pins(self) -> None:
        """Write all spans again: the reset of a slot and the restoring of a session wipe them."""
        for slot, spans in self.pins.items():
            self.layers[0].pins[slot, : len(spans)] = self.upload(spans)

    def upload(self, values: list) -> torch.Tensor:
        """Values as an int32 tensor on the slab's device, without waiting for it."""
        values = torch.tensor(values, dtype=torch.int32, device="cpu", pin_memory=not ON_CPU)
        return values.to(self.slab.device, non_blocking=True)

    @classmethod
    def from_caches(cls, plan: MemoryPlan, caches: list[torch.Tensor], ropes: list[Rope | None]) -> "SlotPool":
        """View the layers' pages [S, 1, 1, page] uint8 of one allocation as slabs.

        Raises RuntimeError when vLLM did not lay the pages of a block side by side.
        """
        layout, first = plan.layout, min(caches, key=lambda cache: cache.storage_offset())
        begin = first.storage_offset()
        offsets = sorted(cache.storage_offset() - begin for cache in caches)
        expected = [i * layout.page_bytes for i in range(layout.shape.layers)]
        if offsets != expected or len({cache.untyped_storage().data_ptr() for cache in caches}) > 1:
            raise RuntimeError(
                f"vLLM laid out the KV cache pages at {offsets[:4]}... of one block instead of {expected[:4]}...; "
                "deltamem needs the layout BLHNC (is VLLM_KV_CACHE_LAYOUT set?)."
            )
        if first.stride(0) != plan.worker_bytes:
            raise RuntimeError(
                f"vLLM made blocks of {first.stride(0):,} bytes for a model that takes {plan.worker_bytes:,} by its "
                "config: deltamem does not know all of its layers."
            )
        slab = first.as_strided((first.shape[0], plan.worker_bytes), (first.stride(0), 1), begin)
        device = slab.device
        layers = [layout.views(slab, i, plan.pairs(i)) for i in range(layout.shape.layers)]
        if ON_CPU:
            logger.info("deltamem compiles its CPU kernels, which takes a minute or two the first time.")
            for slots, rope in zip(layers, ropes, strict=True):
                kernels.compile_walk(slots, rope)
        return cls(
            slab=slab,
            layers=layers,
            extents=[layout.extent(i) for i in range(layout.shape.layers)],
            policies=[plan.policy(i, device) for i in range(layout.shape.layers)],
            readouts=Readouts.of_layers(layers) if ON_CPU else [],
            ropes=ropes,
        )


def reserve(plan: MemoryPlan, attending: int, merging: int, device: torch.device) -> None:
    """Have vLLM's memory profiling count the scratch of kernels whose calls have up to so many rows."""
    if not ON_CPU:
        shapes = torch.empty(1, plan.layout.slot_bytes, dtype=torch.uint8, device="meta")
        layers = [plan.layout.views(shapes, i) for i in range(plan.layout.shape.layers)]
        kernels.reserve(layers, attending, merging, device)
