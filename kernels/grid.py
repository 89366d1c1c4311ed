"""What positions decide in a layer, compiled: see the functions of these names in reference.py and slot.py."""

from typing import NamedTuple

from . import reference, slot
from .rows import compiled
from .slot import LayerSlots, Rope

KEY_BLOCK = 64  # entries are read in multiples: with AMX a row rounds alike from 32 keys on however many rows there are
PART = 1 << 13  # entries that queries see at a time, about: threads may share out those of a single token


class Grid(NamedTuple):
    """Numbers of LayerSlots and of its Rope."""

    window: int
    segment: int
    sliding: bool
    parted: bool
    sinks: int
    trained: int  # 0 where no entry is ever far
    candidates: int  # see slot.CANDIDATES
    part: int  # see PART

    @classmethod
    def of(cls, slots: LayerSlots, rope: Rope | None) -> "Grid":
        trained = 0 if rope is None or slots.sliding else rope.trained
        return cls(
            slots.window, slots.segment, slots.sliding, slots.parted, slots.sinks, trained, slot.CANDIDATES, PART
        )  # fmt: skip


left_ring = compiled(reference.left_ring)  # of a Grid


@compiled
def far_limit(seq_len, grid):
    """See reference.far_limit."""
    return max(((seq_len - 1) // grid.segment + 1) * grid.segment - grid.trained, 0) if grid.trained else 0


@compiled
def rings(position, cells, grid):
    """Which rings of a sequence a piece looks at whose tokens begin at a position: the first, and how many."""
    if not grid.parted:
        return 0, 1
    begin = max(position // grid.segment * grid.segment - grid.window + 1, 0) if grid.sliding else 0
    return begin // cells, position // cells - begin // cells + 1


@compiled
def leaves(seq_len, grid):
    """Tokens that have left the ring once the segment has that the last token makes leave it; 0 where none does."""
    return 0 if grid.sliding or seq_len % grid.segment else max(seq_len - grid.window, 0)


@compiled
def whole(count, step):
    """Round up to a multiple."""
    return (count + step - 1) // step * step


@compiled
def blocks(count):
    """Round up to whole key blocks, at least one."""
    return whole(max(count, 1), KEY_BLOCK)


@compiled
def width(capacity, gone, grid):
    """Entries of a head that are read once its memory has seen `gone` tokens."""
    return blocks(min(capacity, gone)) if gone and not grid.sliding else 0


@compiled
def parts(entries, grid):
    """How many parts so many entries are seen in, each of which has grid.part of them but the last."""
    return max((entries + grid.part // 2) // grid.part, 1) if entries else 0


@compiled
def candidates(coarse, gone, grid):
    """Two runs (first, end), the first of which may be empty."""
    if coarse <= grid.candidates:
        return (0, 0), (0, coarse)
    first = gone // grid.segment * grid.candidates % coarse
    wrapped = max(first + grid.candidates - coarse, 0)
    return (0, wrapped), (first, first + grid.candidates - wrapped)
