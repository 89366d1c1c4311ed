"""Host side of the Triton kernels: which programs a layer's ragged heads need, and buffers that outlive a step.

Nothing here waits for the device once a layer is known: `heads_of` reads the head sizes of a layer the first
time it sees them, so call it (or run one step) before capturing a CUDA graph.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch.utils.weak import WeakTensorKeyDictionary

from .slot import LayerSlots

CUT_COST = 256  # keys' worth of time that starting a cut and writing its part take (an estimate)
LARGEST_SCRATCH = 128 << 20  # bytes of partial results
INTERPRETED_PROCESSORS = 3  # an odd handful, so that tests loop, split and leave programs without work
INTERPRETED_SHARED_MEMORY = 227 << 10  # bytes: an H100's
# Arguments whose values and alignments change from step to step must not make Triton compile again.
ROW_ARGUMENTS = ["slot_indices", "slot_step", "cu_seqlens", "seq_lens", "sequences"]
_heads: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_buffers: dict[tuple, torch.Tensor] = {}
_outgrown: list[torch.Tensor] = []  # captured graphs may still point into these


class Cuts(NamedTuple):
    """Heads in cuts of at most `size` keys, the largest first.

    A head of one cut has part -1. The others share numbered parts: head g owns first_part[g]:first_part[g+1].
    """

    table: torch.Tensor  # [I, 4] int32: head, first key, part, 0 (to keep rows aligned)
    first_part: torch.Tensor  # [G + 1] int32
    parts: int
    size: int
    lengths: list[int]


class Heads:
    """Sizes of one layer's heads, and the work tables made from them."""

    def __init__(self, slots: LayerSlots):
        self.exact = _sizes(slots.exact_start)
        self.coarse = _sizes(slots.coarse_start)
        self.capacities = [x + y for x, y in zip(self.exact, self.coarse, strict=True)]
        self.stride = _slot_stride(slots)
        self._device = slots.exact_start.device
        self._cuts: dict[tuple, list[Cuts]] = {}
        self._choices: dict[tuple, Cuts] = {}
        self._tiles: dict[tuple, torch.Tensor] = {}

    def cuts(
        self, counts: tuple[int, ...], tile: int, copies: int, resident: int, part_bytes: int, most: int | None = None
    ) -> Cuts:
        """Cut heads of `counts` keys so that the last program ends soonest.

        Every cut runs `copies` times, `resident` programs at once, and leaves a part of `part_bytes` each time; it has
        `most` keys at most, if there is room for the parts.
        The sizes to choose from, whole tiles of keys, are all made at the first call: a CUDA graph that is being
        captured cannot wait for a copy.
        """
        key = (counts, tile, copies, resident, most)
        if key not in self._choices:
            cuts = self._cuts.get((counts, tile))
            if cuts is None:
                cuts = [_cut(counts, size, self._device) for size in _cut_sizes(max(counts), tile)]
                self._cuts[counts, tile] = cuts
            fitting = [cut for cut in cuts if cut.parts * copies * part_bytes <= LARGEST_SCRATCH]
            some = [cut for cut in fitting if most is None or cut.size <= most] or fitting[:1]
            self._choices[key] = min(some, key=lambda cut: _makespan(cut.lengths, copies, resident))
        return self._choices[key]

    def tiles(self, counts: tuple[int, ...], tile: int) -> torch.Tensor:
        """Heads of `counts` keys as a table of tiles, see Cuts.table; every head has at least one."""
        key = (counts, tile)
        if key not in self._tiles:
            self._tiles[key] = _cut(counts, tile, self._device).table
        return self._tiles[key]


def heads_of(slots: LayerSlots) -> Heads:
    """The layer's head sizes. Waits for the device the first time a layer is seen."""
    if slots.exact_start not in _heads:
        _heads[slots.exact_start] = Heads(slots)
    return _heads[slots.exact_start]


def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised scratch that keeps its address from call to call, as a captured CUDA graph needs.

    Calls with the same name share memory: use it on one stream. One that must grow at least doubles, so that what
    was outgrown, which is kept, never takes more than what is used.
    """
    count = 1
    for extent in shape:
        count *= extent
    key = (name, dtype, device)
    held = _buffers.get(key)
    if held is None or held.numel() < count:
        if held is not None:
            _outgrown.append(held)
        _buffers[key] = held = torch.empty(triton.next_power_of_2(max(count, 1)), dtype=dtype, device=device)
    return held[:count].view(shape)


def rows_of(slot_indices, cu_seqlens, seq_lens) -> tuple:
    """The sequences of a call in the order of ROW_ARGUMENTS; slot_indices may be a column of a block table."""
    return slot_indices, slot_indices.stride(0), cu_seqlens, seq_lens, len(slot_indices)


def rows_width(sequences: int) -> int:
    """Width of a vector over the sequences of a call: one of few, as each is compiled for itself."""
    return 32 if sequences <= 32 else max(256, triton.next_power_of_2(sequences))


def least_rows(most: int) -> list[int]:
    """Of every width of calls with up to so many sequences the fewest that have it."""
    counts = [1]
    while rows_width(counts[-1]) < most:
        counts.append(rows_width(counts[-1]) + 1)
    return counts


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return INTERPRETED_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def half_width(head_size: int) -> int:
    """Columns of a tile that holds half a head: a power of two that a matrix unit takes."""
    return max(16, triton.next_power_of_2(head_size // 2))


def _sizes(start: torch.Tensor) -> tuple[int, ...]:
    edges = start.tolist()
    return tuple(b - a for a, b in zip(edges[:-1], edges[1:], strict=True))


def _slot_stride(slots: LayerSlots) -> int:
    """Distance of two slots in units of 16 bytes, the same for every field of the slab."""
    fields = [f for f in slots if isinstance(f, torch.Tensor) and f.dim() > 1 and f.numel()]
    strides = {f.stride(0) * f.element_size() for f in fields} if len(slots.ring_k) > 1 else {0}
    if len(strides) > 1 or min(strides) % 16 or not all(f[0].is_contiguous() for f in fields):
        raise ValueError(
            "The fields of LayerSlots must be contiguous inside a slot and views of one slab whose rows are "
            "a multiple of 16 bytes; make them with Layout.views."
        )
    return strides.pop() // 16


def _cut_sizes(longest: int, tile: int) -> list[int]:
    """From four tiles up to the longest head, each a fifth more than the one before."""
    sizes = [4 * tile]
    while sizes[-1] < longest:
        sizes.append(-(-sizes[-1] * 6 // (5 * tile)) * tile)
    return sizes


def _cut(counts, size, device) -> Cuts:
    rows, first_part = [], [0]
    for head, count in enumerate(counts):
        starts = range(0, max(count, 1), size)
        split = len(starts) > 1
        for i, first in enumerate(starts):
            rows.append((min(count - first, size), head, first, first_part[-1] + i if split else -1, 0))
        first_part.append(first_part[-1] + len(starts) * split)
    rows.sort(key=lambda row: -row[0])
    lengths = [row[0] for row in rows]
    table = torch.tensor([row[1:] for row in rows], dtype=torch.int32, device=device)
    return Cuts(table, torch.tensor(first_part, dtype=torch.int32, device=device), first_part[-1], size, lengths)


def _makespan(lengths: list[int], copies: int, resident: int) -> int:
    """Keys' worth of time that the cuts take, the longest first, in rounds of `resident` programs."""
    rounds = range(0, len(lengths) * copies, resident)
    return sum(lengths[i // copies] + CUT_COST for i in rounds)
