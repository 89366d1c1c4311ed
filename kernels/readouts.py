"""The readouts of the slots that a layer used last, in one storage."""

import numpy as np
import torch

from .arrays import LayerArrays, Weights
from .chains import Layer
from .cpupartial import way_of
from .grid import Grid
from .readout import Readout, Storage, capacities, rooms
from .slot import LayerSlots, Policy, Rope

READOUT_BYTES = 64 << 20  # of dequantised memory that stay from step to step, for each layer of a model


class Readouts:
    """As many as `most_bytes` hold if all are as long as the longest yet, one in any case.

    Whoever changes a slot other than by merge() has to forget() it.
    """

    def __init__(self, slots: LayerSlots, most_bytes: int = READOUT_BYTES):
        self.slots, self._most_bytes = slots, most_bytes
        self._capacities = capacities(slots)
        self._rope: Rope | None = None  # of the layer as it was last asked for
        self._policy: Policy | None = None
        self._keep(0, 0)

    @classmethod
    def of_layers(cls, layers: list[LayerSlots]) -> list["Readouts"]:
        """Of layers that share their bytes by entries, since a step needs a sequence in all of them."""
        entries = [sum(capacities(slots)) for slots in layers]
        each = READOUT_BYTES * len(layers) / max(sum(entries), 1)
        return [cls(slots, int(each * count)) for slots, count in zip(layers, entries, strict=True)]

    def __contains__(self, slot: int) -> bool:
        return slot in self._held

    def of(self, slot: int, gone: int, held: int | None = None) -> Readout:
        """The readout of one slot, as it was left, else read anew, with room for what a memory of `gone` tokens holds.

        held: tokens that it has seen until now, if it is not as many.
        """
        readout = self._held.pop(slot, None)
        if readout is None or not readout.has_room(gone):
            readout = self._make(slot, gone, gone if held is None else held, readout)
        self._held[slot] = readout
        return readout

    def _make(self, slot: int, gone: int, held: int, outgrown: Readout | None) -> Readout:
        """outgrown: what was held of it, which is not read again where a row is free."""
        before = self._storage
        self.make_room(gone)
        if self._free:
            row = self._free.pop()
        elif outgrown is not None:  # no other's row: that one may be read in the same call
            row, outgrown = outgrown.row, None
        else:
            row = self._held.pop(next(iter(self._held))).row
        readout = Readout(self.slots, slot, gone, held, row, self._storage.row(row), outgrown)
        self._start[row] = readout.start
        if outgrown is not None and before is self._storage:
            self._free.append(outgrown.row)
        return readout

    def layer(self, rope: Rope | None, policy: Policy | None) -> Layer:
        """This one for compiled functions, as long as it has these rows. policy: may be None where nothing merges."""
        if self._layer is None or self._rope is not rope or (policy is not None and policy is not self._policy):
            like = self.slots.ring_k
            self._rope, self._policy = rope, policy or Policy(None, torch.zeros(like.shape[1], 3))
            self._layer = Layer(
                way_of(like.dtype),
                Grid.of(self.slots, rope),
                LayerArrays.of(self.slots, self._storage, self._start, rope),
                Weights.of(self._policy, rope),
            )
        return self._layer

    def forget(self, slot: int) -> None:
        """Have the slot read anew when it is asked for again."""
        readout = self._held.pop(slot, None)
        if readout is not None:
            self._free.append(readout.row)

    def make_room(self, gone: int) -> int:
        """Have rows that take a sequence whose memory has seen `gone` tokens; returns how many are held at once."""
        places, have = sum(rooms(self._capacities, gone)), self._storage.k.shape[1]
        if places > have:
            count = max(1, self._most_bytes // (places * Storage.bytes_per_place(self.slots.ring_k)))
            self._keep(min(count, len(self.slots.ring_k)), places)
        return max(len(self._storage.k), 1)

    def _keep(self, rows: int, places: int) -> None:
        """Have so many rows, all of them free."""
        self._storage = Storage.of(rows, places, self.slots.ring_k)
        self._free = [*reversed(range(rows))]
        self._held: dict[int, Readout] = {}  # by slot, the one used last at the end
        self._start = np.zeros((max(rows, 1), len(self._capacities) + 1), np.int64)  # of the readout in each row
        self._layer: Layer | None = None
