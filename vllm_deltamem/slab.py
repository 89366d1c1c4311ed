"""A worker's slots of one kind, whole ones or parts: the same bytes for both, seen as rows of equal size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.platforms import current_platform

from vllm_deltamem.kernels.slot import LayerSlots
from vllm_deltamem.memory import Layout

ON_CPU = current_platform.is_cpu()
if ON_CPU:
    from vllm_deltamem.kernels.readouts import Readouts


@dataclass
class Slab:
    """Rows of opaque bytes, and every layer's view of them."""

    rows: torch.Tensor  # [S, bytes] uint8, may be strided
    layers: list[LayerSlots]
    extents: list[slice]  # of a row, what is a layer's alone
    readouts: list[Readouts]  # per layer, on a CPU
    held: tuple[int, ...]  # the shape of a sequence's slot_indices: (parts,), or () of whole slots

    @classmethod
    def of(cls, rows: torch.Tensor, layout: Layout, pairs: list) -> Slab:
        """View rows as a layout says; pairs: of every layer, see Layout.views."""
        layers = [layout.views(rows, i, pairs[i]) for i in range(layout.shape.layers)]
        extents = [layout.extent(i) for i in range(layout.shape.layers)]
        held = (layout.parts,) if layout.parts else ()
        return cls(rows, layers, extents, Readouts.of_layers(layers) if ON_CPU else [], held)

    def forget(self, rows: list[int]) -> None:
        """Drop what the CPU path has read of slots that were cleared or restored."""
        for readouts in self.readouts:
            for row in rows:
                readouts.forget(row)

    def copy(self, source: int, target: int) -> None:
        """Have a vacant row hold what another one holds now."""
        self.rows[target] = self.rows[source]
        self.forget([target])

    def copy_layer(self, layer: int, source: int, target: int) -> None:
        """The same in one layer."""
        self.rows[target, self.extents[layer]] = self.rows[source, self.extents[layer]]
