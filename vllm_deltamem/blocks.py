"""Slots as vLLM's blocks: a part of a slot is one block, a whole slot as many side by side as there are parts.

Where a block lies may change while a sequence holds it: parts move together once a whole slot was asked for and none
was vacant. Workers move the bytes, and look up the place of a block in a table of their own.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock


class Slot(NamedTuple):
    """What a sequence holds: a whole slot, or a part of one."""

    whole: bool
    row: int  # among all that are whole, or among all parts


class Moves(NamedTuple):
    """Parts that lie elsewhere after a step."""

    parts: dict[Slot, Slot]  # where to
    places: dict[int, int]  # of the blocks concerned, from then on


class Blocks:
    """vLLM's blocks, of which parts make a slot."""

    def __init__(self, pool: BlockPool, parts: int):
        self._pool, self.parts = pool, parts
        self._lying = pool.blocks[1:]  # by place; the null block has none
        self._places = {block.block_id: place for place, block in enumerate(self._lying)}
        self.slots = len(self._lying) // parts

    def slot(self, blocks: Sequence[KVCacheBlock]) -> Slot:
        """blocks: what a sequence holds; where it is a part, vLLM's null block comes second."""
        place = self._places[blocks[0].block_id]
        whole = self.parts == 1 or not blocks[1].is_null
        return Slot(True, place // self.parts) if whole else Slot(False, place)

    def of(self, slot: Slot) -> list[KVCacheBlock]:
        count = self.parts if slot.whole else 1
        return self._lying[slot.row * count :][:count]

    def around(self, block: KVCacheBlock) -> list[Slot]:
        """All slots that a block is of."""
        place = self._places[block.block_id]
        return [Slot(True, place // self.parts)] + ([Slot(False, place)] if self.parts > 1 else [])

    def vacant(self, whole: bool, besides: Slot | None = None) -> Slot | None:
        """The slot to be claimed next: the one that was left first, or was left with nothing of use."""
        found, enough = Counter(), self.parts if whole else 1
        for place in self._vacant_places():
            slot = Slot(whole, place // enough)
            found[slot] += 1
            if found[slot] == enough and slot != besides:
                return slot
        return None

    def make_vacant(self, movable: Iterable[Slot], forget: Callable[[KVCacheBlock], None]) -> Moves:
        """Move parts, of these, out of a slot to vacant places elsewhere, as few as can be.

        forget: called with each block that lies in such a place. None are moved where too few are vacant.
        """
        moves, vacant = Moves({}, {}), dict.fromkeys(self._vacant_places())  # in the order in which they are claimed
        fixed = {*range(len(self._lying))} - vacant.keys() - {slot.row for slot in movable}
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
                moves.parts[Slot(False, source)] = Slot(False, target)
                moves.places.update(self._swap(source, target))
        self._queue(self.of(Slot(True, emptiest.start // self.parts)), last=True)  # or a short one breaks it again
        return moves

    def take(self, slot: Slot) -> list[KVCacheBlock]:
        """Claim a vacant slot."""
        blocks = self.of(slot)
        self.claim_next([slot])
        return self._pool.get_new_blocks(len(blocks))

    def hold(self, slot: Slot) -> None:
        """Have nobody claim a vacant slot, until it is left."""
        self._pool.touch(self.of(slot))

    def leave(self, slots: Sequence[Slot], forget: Callable[[KVCacheBlock], None]) -> None:
        """Have slots be claimed after all others; forget: called with each of their blocks that is."""
        self._pool.unpin_blocks([block for slot in slots for block in self.of(slot)], forget)

    def claim_next(self, slots: Sequence[Slot]) -> None:
        """Have vacant slots be claimed before all others."""
        self._queue([block for slot in slots for block in self.of(slot)], last=False)

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
