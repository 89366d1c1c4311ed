"""Slots as vLLM's blocks: a part of a slot is one block, a whole slot as many side by side as there are parts.

Where a block lies may change while a sequence holds it: parts move together once a whole slot was asked for and none
was vacant. Workers move the bytes, and look up the place of a block in a table of their own.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock


class Slot(NamedTuple):
    """What a sequence holds: a whole slot, or some parts of slots."""

    whole: bool
    rows: tuple[int, ...]  # the one among all that are whole, or those among all parts, in the order of their tokens

    @property
    def parts(self) -> int:
        """How many; 0: it is whole."""
        return 0 if self.whole else len(self.rows)


class Moves(NamedTuple):
    """Parts that lie elsewhere after a step."""

    parts: dict[int, int]  # where to
    places: dict[int, int]  # of the blocks concerned, from then on


class Blocks:
    """vLLM's blocks, of which parts make a slot; cells: tokens of a part."""

    def __init__(self, pool: BlockPool, parts: int, cells: int):
        self._pool, self.parts, self._cells = pool, parts, cells
        self._lying = pool.blocks[1:]  # by place; the null block has none
        self._places = {block.block_id: place for place, block in enumerate(self._lying)}
        self.slots = len(self._lying) // parts

    def slot(self, blocks: Sequence[KVCacheBlock]) -> Slot:
        """blocks: what a sequence holds."""
        if self.are_whole(blocks):
            return Slot(True, (self._places[blocks[self.parts > 1].block_id] // self.parts,))
        return Slot(False, tuple(self._places[block.block_id] for block in blocks))

    def are_whole(self, blocks: Sequence[KVCacheBlock] | None) -> bool:
        """Whether they are a whole slot: where slots have parts, vLLM's null block then comes first."""
        return bool(blocks) and (self.parts == 1 or blocks[0].is_null)

    def count(self, tokens: int) -> int:
        """How many parts so many tokens take."""
        return -(-tokens // self._cells)

    def first(self, slot: Slot, tokens: int) -> Slot:
        """What of a slot so many tokens lie in: the first parts of it, or all if it is whole."""
        return slot if slot.whole else Slot(False, slot.rows[: self.count(tokens)])

    def of(self, slot: Slot) -> list[KVCacheBlock]:
        if not slot.whole:
            return [self._lying[place] for place in slot.rows]
        return self._lying[slot.rows[0] * self.parts :][: self.parts]

    def place(self, block: KVCacheBlock) -> int:
        """Which part a block is."""
        return self._places[block.block_id]

    def tokens_before(self, part: int) -> int:
        """Tokens of a sequence that lie in earlier parts than that of its."""
        return part * self._cells

    def whole(self, besides: Slot | None = None) -> Slot | None:
        """The whole slot to be claimed next: the one that was left first, or was left with nothing of use."""
        found = Counter()
        for place in self._vacant_places():
            slot = Slot(True, (place // self.parts,))
            found[slot] += 1
            if found[slot] == self.parts and slot != besides:
                return slot
        return None

    def some(self, count: int, besides: Collection[int] = ()) -> Slot | None:
        """So many parts to be claimed next, likewise."""
        places = tuple(islice((place for place in self._vacant_places() if place not in besides), count))
        return Slot(False, places) if len(places) == count else None

    def make_vacant(self, movable: Iterable[int], forget: Callable[[KVCacheBlock], None]) -> Moves:
        """Move parts, of these, out of a slot to vacant places elsewhere, as few as can be.

        forget: called with each block that lies in such a place. None are moved where too few are vacant.
        """
        moves, vacant = Moves({}, {}), dict.fromkeys(self._vacant_places())  # in the order in which they are claimed
        fixed = {*range(len(self._lying))} - vacant.keys() - {*movable}
        rows = [range(row * self.parts, (row + 1) * self.parts) for row in range(self.slots)]
        rows = [row for row in rows if fixed.isdisjoint(row)]
        if not rows or len(vacant) < self.parts:
            return moves
        emptiest = max(rows, key=lambda row: len(vacant.keys() & row))
        elsewhere = (place for place in vacant if place not in emptiest)
        for source in emptiest:
            if source not in vacant:
                target = next(elsewhere)
                forget(self._lying[target])
                moves.parts[source] = target
                moves.places.update(self._swap(source, target))
        # after all others, or a short one breaks it again
        self._queue(self.of(Slot(True, (emptiest.start // self.parts,))), last=True)
        return moves

    def take(self, slot: Slot) -> list[KVCacheBlock]:
        """Claim a vacant slot."""
        blocks = self.of(slot)
        self._queue(blocks, last=False)
        return self._pool.get_new_blocks(len(blocks))

    def hold(self, slot: Slot) -> None:
        """Have nobody claim a vacant slot, until it is left."""
        self._pool.touch(self.of(slot))

    def leave(self, slots: Sequence[Slot], forget: Callable[[KVCacheBlock], None]) -> None:
        """Have slots be claimed after all others, the last parts first; forget: called with each block that is."""
        self._pool.unpin_blocks([block for slot in slots for block in reversed(self.of(slot))], forget)

    def claim_next(self, slot: Slot) -> None:
        """Have a vacant slot be claimed before all others, the last parts first."""
        self._queue(self.of(slot)[::-1], last=False)

    def _queue(self, blocks: list[KVCacheBlock], last: bool) -> None:
        """Have vacant blocks be claimed after all others, or before them."""
        queue = self._pool.free_block_queue
        for block in blocks:
            queue.remove(block)
        (queue.append_n if last else queue.prepend_n)(blocks)

    def _vacant_places(self) -> Iterator[int]:
        """In the order in which they are to be claimed."""
        block = self._pool.free_block_queue.fake_free_list_head.next_free_block
        while block.next_free_block is not None:  # the last one is no block
            yield self._places[block.block_id]
            block = block.next_free_block

    def _swap(self, *places: int) -> dict[int, int]:
        """Have two blocks change places; returns where they lie then."""
        first, second = places
        self._lying[first], self._lying[second] = self._lying[second], self._lying[first]
        found = {self._lying[place].block_id: place for place in places}
        self._places |= found
        return found
