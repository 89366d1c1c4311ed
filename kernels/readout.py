"""The memory of one slot in one layer as attention and merging read it, dequantised, for the CPU path."""

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from .arrays import MASKED, weigh
from .grid import blocks
from .slot import LayerSlots, decode

LEAST_ROOM = 512  # entries per head that the shortest sequence gets, so that it is not read anew at every other merge


class Storage(NamedTuple):
    """Room for the readouts of R slots [R, N, ...], or for that of one [N, ...], at N places."""

    k: torch.Tensor  # [R, N, D] model dtype
    v: torch.Tensor  # [R, N, D] model dtype
    plain: torch.Tensor  # [R, N, D] fp32, keys before RoPE, which only merging reads
    bias: torch.Tensor  # [R, N] fp32, the log of the mass, MASKED where there is no entry
    mass: torch.Tensor  # [R, N] fp32, of coarse entries
    rank: torch.Tensor  # [R, N] int64

    @classmethod
    def of(cls, rows: int, places: int, like: torch.Tensor) -> "Storage":
        """Keys and values as wide as `like` [..., D], of its dtype. Memory is taken page by page, as it is written."""
        dtypes, size = (like.dtype, like.dtype, torch.float, torch.float, torch.float, torch.int64), like.shape[-1:]
        shapes = [(rows, places, *size)] * 3 + [(rows, places)] * 3
        return cls(*(torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))

    @staticmethod
    def bytes_per_place(like: torch.Tensor) -> int:
        return like.shape[-1] * (2 * like.itemsize + 4) + 16

    def row(self, row: int) -> "Storage":
        return Storage(*(x[row] for x in self))


class Readout:
    """Entries of all heads end to end: entry e of head g is at place start[g] + e, exact ones first.

    What is read of a head is a number of whole key blocks that position alone decides, whatever room there is.
    A sequence keeps its readout from step to step; who merges changes both it and the slot, and first of all makes
    `plain`, which nothing else reads, if it has_plain not.

    gone: tokens whose entries it has room for; held: tokens that the memory has seen until now; row: where it lies in
    the storage of its layer; storage: that row; outgrown: the readout that this one takes the place of.
    """

    def __init__(
        self,
        slots: LayerSlots,
        slot: int,
        gone: int,
        held: int,
        row: int,
        storage: Storage,
        outgrown: "Readout | None" = None,
    ):
        self.slots, self.slot, self.row = slots, slot, row
        self.exact_count, self.coarse_count = slots.exact_start.diff().tolist(), slots.coarse_start.diff().tolist()
        self.capacities = capacities(slots)
        self.rooms = rooms(self.capacities, gone)
        self.start = [0, *accumulate(self.rooms)]
        places = self.start[-1]
        self.k, self.v, self.plain, self.bias, self.mass, self.rank = (x[:places] for x in storage)
        for field in (self.k, self.v, self.mass, self.rank):
            field.zero_()
        if outgrown is not None:
            self._take(outgrown)
        else:
            self._read(held)
            weigh(self.mass.numpy(), self.rank.numpy(), np.arange(places), self.bias.numpy())
        if not held:
            self.plain.zero_()
        self.has_plain = not held or (outgrown is not None and outgrown.has_plain)

    def widths(self, gone: int) -> list[int]:
        """See widths()."""
        return widths(self.capacities, gone)

    def has_room(self, gone: int) -> bool:
        """Whether there is a place for every entry that may hold something after `gone` tokens."""
        return all(width <= room for width, room in zip(self.widths(gone), self.rooms, strict=True))

    def _take(self, outgrown):
        """What that one holds, head by head. Other places have nothing: `plain` is 0 there, too."""
        self.plain.zero_()
        self.bias.fill_(MASKED)
        for here, there, room in zip(self.start, outgrown.start, outgrown.rooms, strict=False):
            for field in ("k", "v", "plain", "bias", "mass", "rank"):
                getattr(self, field)[here : here + room] = getattr(outgrown, field)[there : there + room]

    def _read(self, held):
        slots, slot = self.slots, self.slot
        exact_start, coarse_start = slots.exact_start.tolist(), slots.coarse_start.tolist()
        for g, first in enumerate(self.start[:-1]):
            exact = min(self.exact_count[g], held)
            rows, places = slice(exact_start[g], exact_start[g] + exact), slice(first, first + exact)
            for field, source in ((self.k, slots.exact_k), (self.v, slots.exact_v), (self.rank, slots.exact_rank)):
                field[places] = source[slot, rows]
            coarse = min(self.coarse_count[g], held - exact)
            rows = slice(coarse_start[g], coarse_start[g] + coarse)
            places = slice(first + exact, first + exact + coarse)
            for field, bits, codes, affine in self._coded():
                field[places] = decode(codes[rows], affine[rows], bits, field.dtype, slots.pairs.of(g))
            self.mass[places] = slots.coarse_mass[slot, rows]
            self.rank[places] = slots.coarse_rank[slot, rows]

    def _coded(self):
        """(readout, bits, codes, affine) of the coarse keys and values."""
        slots, slot = self.slots, self.slot
        return (
            (self.k, slots.codec.key_bits, slots.coarse_k[slot], slots.coarse_k_affine[slot]),
            (self.v, slots.codec.value_bits, slots.coarse_v[slot], slots.coarse_v_affine[slot]),
        )


def capacities(slots: LayerSlots) -> list[int]:
    """Entries of each head, exact and coarse ones."""
    return (slots.exact_start.diff() + slots.coarse_start.diff()).tolist()


def widths(capacities: list[int], gone: int) -> list[int]:
    """Entries of each head that may hold something once the memory has seen `gone` tokens, in whole key blocks."""
    return [blocks(min(capacity, gone)) for capacity in capacities]


def rooms(capacities: list[int], gone: int) -> list[int]:
    """The same up to a power of two: a sequence goes on growing, and readouts of others about as long lie alike."""
    return widths(capacities, max(LEAST_ROOM, 1 << max(gone - 1, 0).bit_length()))
