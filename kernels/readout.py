"""The memory of one slot in one layer as attention and merging read it, dequantised, for the CPU path."""

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from .arrays import MASKED, Arrays, Weights, read_plain, weigh
from .pairs import pair_counts
from .rows import KINDS, as_bits
from .slot import EMPTY, LayerSlots, Policy, Rope, candidates, decode, encode_and_read, rank_position, rotate

LEAST_ROOM = 512  # entries per head that the shortest sequence gets, so that it is not read anew at every other merge
KEY_BLOCK = 64  # columns are a multiple: from 32 keys on a row rounds alike however many rows there are
ALWAYS = -1  # in place of tokens gone: an answer that does not depend on them


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
    A sequence keeps its readout from step to step; whoever changes an entry of the slot does so through
    merge_slot, which changes both. What only merging reads is made by its first merge.

    gone: tokens that the memory has seen, or is about to; row: where it lies in the storage of its layer; storage: that
    row; outgrown: the readout that this one takes the place of.
    """

    def __init__(
        self, slots: LayerSlots, slot: int, gone: int, row: int, storage: Storage, outgrown: "Readout | None" = None
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
            self._read(gone)
            weigh(self.mass.numpy(), self.rank.numpy(), np.arange(places), self.bias.numpy())
        self._has_plain = outgrown is not None and outgrown.arrays is not None
        self.arrays: Arrays | None = None
        self._looked_at: tuple[int, np.ndarray | None] = 0, None  # what looked_at() last answered for, and the answer
        self._places: tuple[int, tuple] = 0, ()  # likewise of places()

    def widths(self, gone: int) -> list[int]:
        return widths(self.capacities, gone)

    def has_room(self, gone: int) -> bool:
        return all(width <= room for width, room in zip(self.widths(gone), self.rooms, strict=True))

    def places(self, gone: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the entries of every head begin, and how many there may be [G]."""
        if self._places[0] != gone:
            self._places = gone, (np.array(self.start[:-1]), np.array(self.widths(gone)))
        return self._places[1]

    def far(self, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As Readouts.entries, of this one alone, with far entries (see reference.far_limit) in a second pass."""
        far = (self.rank != EMPTY) & (rank_position(self.rank) < limit)
        bias = torch.stack([self.bias.masked_fill(unseen, MASKED) for unseen in (far, ~far)])
        return as_bits(self.k)[None], as_bits(self.v)[None], bias[:, None].numpy()

    def looked_at(self, gone: int) -> np.ndarray:
        """The places [G, 2, 2] where the coarse entries begin and end that a merge looks among, see slot.candidates, in
        one run or two.
        """
        if self._looked_at[0] not in (gone, ALWAYS):
            places = np.zeros((len(self.coarse_count), 2, 2), np.int64)
            for g, (room, exact, coarse) in enumerate(
                zip(self.rooms, self.exact_count, self.coarse_count, strict=True)
            ):
                for i, run in enumerate(candidates(min(coarse, max(room - exact, 0)), gone, self.slots.segment)):
                    places[g, i] = run.start, run.stop
                places[g] += self.start[g] + exact
            wanders = (places[:, 1, 0] < places[:, 1, 1]).any()
            self._looked_at = gone if wanders else ALWAYS, places
        return self._looked_at[1]

    def prepare_merge(self, rope: Rope | None, policy: Policy) -> None:
        """Turn keys that become far, and make what only merging needs: plain keys, `arrays` and `weights`."""
        self.rope, limit = rope, rope.limit if rope is not None else 0
        if limit:
            self._turn_far()
        if self.arrays is None:
            self.arrays, self.weights = self._as_arrays(limit), Weights.of(policy)
            if not self._has_plain:
                read_plain(self.arrays, np.arange(len(self.rank)))
        elif self.arrays.limit != limit:
            self.arrays = self.arrays._replace(limit=limit)

    def _as_arrays(self, limit: int) -> Arrays:
        slots, rope = self.slots, self.rope
        coded = "ring_k", "ring_v", "exact_k", "exact_v", "coarse_k", "coarse_v", "coarse_k_affine", "coarse_v_affine"
        plain = "key_sum", "pins", "exact_rank", "coarse_mass", "coarse_rank"
        cos, sin = (rope.cos, rope.sin) if rope is not None else 2 * (torch.empty(1, 0),)
        return Arrays(
            **{name: as_bits(getattr(slots, name)[self.slot]) for name in coded},
            **{name: getattr(slots, name)[self.slot].numpy() for name in plain},
            exact_start=slots.exact_start.numpy(),
            coarse_start=slots.coarse_start.numpy(),
            start=np.array(self.start),
            kind=KINDS[self.k.dtype],
            pair_place=slots.pairs.place.numpy(),
            pair_step=slots.pairs.step.numpy(),
            wide=pair_counts(self.k.shape[1], slots.codec.key_bits)[0],
            key_bits=slots.codec.key_bits,
            value_bits=slots.codec.value_bits,
            k=as_bits(self.k),
            v=as_bits(self.v),
            plain=self.plain.numpy(),
            bias=self.bias.numpy(),
            mass=self.mass.numpy(),
            rank=self.rank.numpy(),
            cos=cos.contiguous().numpy(),
            sin=sin.contiguous().numpy(),
            interleaved=rope is not None and rope.interleaved,
            limit=limit,
        )

    def _turn_far(self):
        """See reference._turn_far, over all heads."""
        slots, slot, rope = self.slots, self.slot, self.rope
        position = rank_position(self.rank)
        due = (self.rank != EMPTY) & (position < rope.limit) & (position >= rope.limit - slots.segment)
        place = due.nonzero().squeeze(1)
        start = torch.tensor(self.start)
        head = torch.searchsorted(start, place, right=True) - 1
        turned, column = rotate(self.k[place].float(), position[place], rope, inverse=True), place - start[head]
        counts = slots.exact_start.diff()
        keys, exact = turned.to(self.k.dtype), column < counts[head]
        slots.exact_k[slot, (slots.exact_start[head] + column)[exact]] = keys[exact]
        entry = (slots.coarse_start[head] + column - counts[head])[~exact]
        _, bits, codes, affine = self._coded()[0]
        pairs = slots.pairs.of(head[~exact])
        codes[entry], affine[entry], keys[~exact] = encode_and_read(turned[~exact], bits, keys.dtype, pairs)
        self.k[place] = keys
        if self.arrays is not None:
            self.plain[place] = rotate(keys.float(), torch.zeros_like(place), rope, inverse=True)

    def _take(self, outgrown):
        """What that one holds, head by head. Other places have nothing: `plain` is 0 there, too."""
        self.plain.zero_()
        self.bias.fill_(MASKED)
        for here, there, room in zip(self.start, outgrown.start, outgrown.rooms, strict=False):
            for field in ("k", "v", "plain", "bias", "mass", "rank"):
                getattr(self, field)[here : here + room] = getattr(outgrown, field)[there : there + room]

    def _read(self, gone):
        slots, slot = self.slots, self.slot
        exact_start, coarse_start = slots.exact_start.tolist(), slots.coarse_start.tolist()
        for g, first in enumerate(self.start[:-1]):
            exact = min(self.exact_count[g], gone)
            rows, places = slice(exact_start[g], exact_start[g] + exact), slice(first, first + exact)
            for field, source in ((self.k, slots.exact_k), (self.v, slots.exact_v), (self.rank, slots.exact_rank)):
                field[places] = source[slot, rows]
            coarse = min(self.coarse_count[g], gone - exact)
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


def blocks(count: int) -> int:
    """Round up to whole key blocks, at least one."""
    return -(-max(count, 1) // KEY_BLOCK) * KEY_BLOCK
