"""All slots of a worker: vLLM's cache tensors seen as slabs."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vllm_deltamem.kernels.slot import LayerSlots, Policy, Rope
from vllm_deltamem.plan import MemoryPlan


@dataclass
class SlotPool:
    slab: torch.Tensor  # [S, slot_bytes] uint8, one row per slot; row 0 is vLLM's null block
    layers: list[LayerSlots]
    policies: list[Policy]
    rope: Rope | None
    readouts: list[dict]  # per layer, the CPU path's scratch: bounded, see kernels/cpu.py
    pins: dict[int, list[list[int]]] = field(default_factory=dict)  # spans of the slots that have any
    serving: ClassVar["SlotPool | None"] = None  # of the model that this process loaded last

    @property
    def slots(self) -> int:
        """Slots that sequences can hold."""
        return len(self.slab) - 1

    def forget(self, slots: list[int]) -> None:
        """Drop what the CPU path has read of slots that were cleared or restored."""
        for scratch in self.readouts:
            for slot in slots:
                scratch.pop(slot, None)

    def pin(self, claimed: dict[int, list[list[int]]]) -> None:
        """Note the pinned spans of slots that sequences just claimed, and write them."""
        for slot, spans in claimed.items():
            self.pins.pop(slot, None)
            if spans:
                self.pins[slot] = spans
        self.write_pins()

    def write_pins(self) -> None:
        """Write all spans again: the reset of a slot, whichever comes first, wipes them."""
        for slot, spans in self.pins.items():
            self.layers[0].pins[slot, : len(spans)] = torch.tensor(spans, dtype=torch.int32, device=self.slab.device)

    @classmethod
    def from_caches(cls, plan: MemoryPlan, caches: list[torch.Tensor], rope: Rope | None) -> "SlotPool":
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
        slab = first.as_strided((first.shape[0], layout.slot_bytes), (first.stride(0), 1), begin)
        device = slab.device
        cls.serving = cls(
            slab=slab,
            layers=[layout.views(slab, i) for i in range(layout.shape.layers)],
            policies=[plan.policy(i, device) for i in range(layout.shape.layers)],
            readouts=[{} for _ in range(layout.shape.layers)],
            rope=rope and rope._replace(cos=rope.cos.to(device), sin=rope.sin.to(device)),
        )
        return cls.serving
