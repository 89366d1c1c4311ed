"""The readouts of the slots that a layer used last, side by side: several sequences are read in one call."""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch

from .readout import Readout, Storage, capacities, rooms
from .slot import LayerSlots

READOUT_BYTES = 64 << 20  # of dequantised memory that stay from step to step, for each layer of a model


class Part(NamedTuple):
    """Entries of neighbouring heads of neighbouring sequences, each as long as the others: views."""

    sequences: slice
    heads: slice
    k: torch.Tensor  # [B, P, E, D]
    v: torch.Tensor  # [B, P, E, D]
    bias: torch.Tensor  # [B, P, 1, E] fp32


class Readouts:
    """As many as `most_bytes` hold if all are as long as the longest yet, one in any case.

    Whoever changes a slot other than by merge() has to forget() it.
    """

    def __init__(self, slots: LayerSlots, most_bytes: int = READOUT_BYTES):
        self.slots, self._most_bytes = slots, most_bytes
        self._capacities = capacities(slots)
        self._storage = Storage.of(0, 0, slots.ring_k)
        self._free: list[int] = []  # rows of it
        self._held: dict[int, Readout] = {}  # by slot, the one used last at the end
        self._parts: tuple[tuple, list[Part]] = (), []  # what parts() last answered, and to what

    @classmethod
    def of_layers(cls, layers: list[LayerSlots]) -> list["Readouts"]:
        """Of layers that share their bytes by entries, since a step needs a sequence in all of them."""
        entries = [sum(capacities(slots)) for slots in layers]
        each = READOUT_BYTES * len(layers) / max(sum(entries), 1)
        return [cls(slots, int(each * count)) for slots, count in zip(layers, entries, strict=True)]

    def of(self, slot: int, gone: int) -> Readout:
        """The readout of one slot whose memory has seen `gone` tokens: as it was left, else read anew."""
        readout = self._held.get(slot)
        if readout is None or not readout.has_room(gone):
            self.forget(slot)
            self._make_room(gone)
            row = self._free.pop() if self._free else self._held.pop(next(iter(self._held))).row
            readout = Readout(self.slots, slot, gone, row, self._storage.row(row))
        self._held.pop(slot, None)
        self._held[slot] = readout
        return readout

    def forget(self, slot: int) -> None:
        readout = self._held.pop(slot, None)
        if readout is not None:
            self._free.append(readout.row)

    def waves(self, gone: dict[int, int]) -> Iterator[list[Readout]]:
        """The readouts of slots, in order of their rows, as many at a time as there are rows.

        Those at hand come first, so that a step that needs more than there are makes only these others.
        gone: of every slot, tokens that its memory has seen.
        """
        if not gone:
            return
        self._make_room(max(gone.values()))
        wanted = sorted(gone, key=lambda slot: slot not in self._held)
        for first in range(0, len(wanted), len(self._storage.k)):
            wave = [self.of(slot, gone[slot]) for slot in wanted[first : first + len(self._storage.k)]]
            yield sorted(wave, key=lambda readout: readout.row)

    def parts(self, wave: list[Readout], gone: list[int]) -> list[Part]:
        """All entries of sequences in order of their rows, which have seen `gone` tokens each."""
        asked = tuple((readout.row, *readout.rooms, n) for readout, n in zip(wave, gone, strict=True))
        if self._parts[0] != asked:
            self._parts = asked, list(self._cut(wave, gone))
        return self._parts[1]

    def _cut(self, wave, gone):
        storage, widths = self._storage, [readout.widths(n) for readout, n in zip(wave, gone, strict=True)]
        for (_, room_of), run in groupby(range(len(wave)), lambda i: (wave[i].row - i, wave[i].rooms)):
            run, head = list(run), 0
            for room, alike in groupby(room_of):
                heads = slice(head, head + len(list(alike)))
                places = slice(sum(room_of[:head]), sum(room_of[: heads.stop]))
                for width, members in groupby(run, lambda i, head=head: widths[i][head]):
                    members = list(members)
                    rows = slice(wave[members[0]].row, wave[members[-1]].row + 1)
                    shape = len(members), heads.stop - head, room
                    k, v = (x[rows, places].view(*shape, -1)[:, :, :width] for x in (storage.k, storage.v))
                    bias = storage.bias[rows, places].view(shape)[:, :, None, :width]
                    yield Part(slice(members[0], members[-1] + 1), heads, k, v, bias)
                head = heads.stop

    def _make_room(self, gone: int) -> None:
        """Have rows that take a sequence whose memory has seen `gone` tokens."""
        places, have = sum(rooms(self._capacities, gone)), self._storage.k.shape[1]
        if places > have:
            count = max(1, self._most_bytes // (places * Storage.bytes_per_place(self.slots.ring_k)))
            self._storage = Storage.of(min(count, len(self.slots.ring_k)), places, self.slots.ring_k)
            self._free, self._held, self._parts = [*reversed(range(len(self._storage.k)))], {}, ((), [])
