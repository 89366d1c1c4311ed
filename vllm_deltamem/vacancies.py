"""Slots that sequences have left and nobody has claimed since: a prompt that goes on from there claims one as it is.

What vLLM's prefix caching does for blocks, for whole memories: nothing is copied, and nothing has to be named. A
slot's memory goes as soon as another sequence claims it, those that were left first before the others.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager

from vllm_deltamem.blocks import Blocks, Moves, Slot
from vllm_deltamem.transfers import Prompt, Span, clip


class Kind(NamedTuple):
    """What a memory depends on besides tokens, and whose it is: only a request that has the same may go on with it."""

    pins: list[list[int]]
    salt: str | None  # vLLM's cache_salt
    short: bool  # whether it is all tokens as they are, in a part of a slot


class Vacancy(NamedTuple):
    """What a slot holds."""

    span: Span
    kind: Kind
    shared: bool = False  # a beginning of many prompts: they start from copies, and it stays

    def reach(self, prompt: Prompt, kind: Kind) -> int:
        """How many tokens of a prompt need not be computed."""
        alike = (self.kind.salt, self.kind.short) == (kind.salt, kind.short)
        length = self.span.shared(prompt) if alike else 0
        return length if clip(self.kind.pins, length) == clip(kind.pins, length) else 0


class Vacancies:
    """What is known of vacant slots. Empty where `--no-enable-prefix-caching` says so: nobody notes any."""

    def __init__(self, blocks: Blocks):
        self._blocks = blocks
        self._held: dict[Slot, Vacancy] = {}
        self._chosen: tuple[str, Slot] | None = None  # for the request that vLLM admits at the moment
        self._lent: list[Slot] = []  # that this step copies from or to: nobody may claim them meanwhile

    def __contains__(self, slot: Slot) -> bool:
        return slot in self._held

    def note(self, slot: Slot, vacancy: Vacancy) -> None:
        """What a slot will hold that its sequence is about to leave."""
        self._held[slot] = vacancy

    def forget(self, block: KVCacheBlock) -> None:
        """Slots with this block are claimed, or vLLM resets its prefix cache."""
        for slot in self._blocks.around(block):
            self._held.pop(slot, None)

    def choose(self, request_id: str, tokens: Sequence[int], kind: Kind) -> tuple[int, Slot | None]:
        """How many of a request's tokens a slot holds at most, and that slot if it is to be copied: else it is claimed.

        Slots that hold shorter beginnings of them are the next to be claimed by others: a longer one supersedes them.
        """
        self.pass_over()
        if not self._held:
            return 0, None
        prompt = Prompt(tokens)
        ascending = sorted(self._held, key=lambda slot: self._held[slot].span.closed)  # so that all is hashed once
        reached = {slot: self._held[slot].reach(prompt, kind) for slot in ascending}
        best = max(reached, key=lambda slot: (reached[slot], not self._held[slot].shared))
        if not reached[best]:
            return 0, None
        shorter = [slot for slot in reached if slot != best and reached[slot] == self._held[slot].span.length]
        self._blocks.claim_next([slot for slot in shorter if not self._held[slot].shared])
        if self._held[best].shared and (best in self._lent or self._blocks.vacant(best.whole, besides=best)):
            self._blocks.hold(best)
            self._lent.append(best)
            return reached[best], best
        self._chosen = request_id, best
        return reached[best], None

    def give_back(self) -> None:
        """Nobody claims slots for this step any more; whoever does so in a later one finds the copies made."""
        self._blocks.leave(self._lent, self.forget)
        self._lent = []

    def pass_over(self) -> None:
        """Have the request that vLLM admits claim any slot."""
        self._chosen = None

    def claim(self, request_id: str, whole: bool) -> list[KVCacheBlock]:
        """Claim the slot that was chosen for a request, or the next one."""
        chosen, self._chosen = self._chosen, None
        mine = chosen is not None and chosen[0] == request_id
        return self._blocks.take(chosen[1] if mine else self._blocks.vacant(whole))

    def copy(self, vacancy: Vacancy) -> Slot | None:
        """A vacant slot for a copy of what a sequence holds; None if there is none, or if one holds that already.

        It is lent until the step is planned: two copies of a step never go to one slot.
        """
        slot = None if vacancy in self._held.values() else self._blocks.vacant(not vacancy.kind.short)
        if slot is not None:
            self._blocks.take(slot)
            self.note(slot, vacancy)
            self._lent.append(slot)
        return slot


class SlotManager(CircularBufferManager):
    """Gives every request one slot, or, to a short one, a part of one.

    Those left with a memory that is noted are claimed again after all others.
    """

    def __init__(self, kv_cache_spec, block_pool: BlockPool, *args, **kwargs):
        super().__init__(kv_cache_spec, block_pool, *args, **kwargs)
        self.blocks, self._part_tokens = Blocks(block_pool, kv_cache_spec.parts), kv_cache_spec.part_tokens
        self.vacancies = Vacancies(self.blocks)
        self.short: set[str] = set()  # requests that hold a part or are to, until they have finished
        self._wholes = 0  # whole slots that requests hold
        self._asked = False  # whether a request of the step at hand waits for a whole slot

    def admit(self, request_id: str, short: bool) -> None:
        """What a request is to claim that vLLM is about to admit."""
        (self.short.add if short else self.short.discard)(request_id)

    def slot(self, request_id: str) -> Slot:
        """What a request holds."""
        return self.blocks.slot(self.req_to_blocks[request_id])

    def used(self) -> tuple[int, int]:
        """How many slots can't be claimed, others moved out of the way, and how many parts are held by themselves."""
        free, parts = self.block_pool.get_num_free_blocks(), self.blocks.parts
        held = len(self.block_pool.blocks) - 1 - free
        return self.blocks.slots - free // parts, held - self._wholes * parts

    def make_room(self) -> Moves:
        """Parts to be moved, for who waits for a whole slot to claim it in the next step."""
        asked, self._asked = self._asked, False
        if not asked or self.blocks.vacant(whole=True):
            return Moves({}, {})
        held = [self.blocks.slot(blocks) for blocks in self.req_to_blocks.values() if blocks]
        return self.blocks.make_vacant([slot for slot in held if not slot.whole], self.vacancies.forget)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args, **kwargs) -> int:
        """More than there are while no slot is vacant, though blocks may be, or if tokens have no room in a part."""
        whole, none = request_id not in self.short, self.block_pool.get_num_free_blocks() + 1
        if self.req_to_blocks.get(request_id):
            return 0 if self.slot(request_id).whole or num_tokens <= self._part_tokens else none
        slot = self.blocks.vacant(whole)
        self._asked |= whole and slot is None
        return none if slot is None else len(self.blocks.of(slot))

    def _claim_ring_block(self, request_id: str, record_for_zeroing: bool = True) -> list[KVCacheBlock]:
        held = self.req_to_blocks[request_id]
        if held:
            return []
        short = request_id in self.short
        held.extend(self.vacancies.claim(request_id, not short))
        self._wholes += not short
        if short:
            held.append(self.block_pool.null_block)  # which tells workers that it is a part
        return list(held)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        slot = self.slot(request_id) if self.req_to_blocks.get(request_id) else None
        self._wholes -= slot is not None and slot.whole
        blocks = [block for block in super().pop_blocks_for_free(request_id) if not block.is_null]
        if slot in self.vacancies:
            self.blocks.leave([slot], self.vacancies.forget)
            return []
        return blocks
