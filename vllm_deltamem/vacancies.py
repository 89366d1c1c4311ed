"""Slots that sequences have left and nobody has claimed since: a prompt that goes on from there claims one as it is.

What vLLM's prefix caching does for blocks, for whole memories: nothing is copied, and nothing has to be named. A
slot's memory goes as soon as another sequence claims it, those that were left first before the others. What a short
sequence left, in parts, goes from its end on, and serves whatever begins alike: from a copy where that goes on
otherwise.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager

from vllm_deltamem.blocks import Blocks, Moves, Slot
from vllm_deltamem.transfers import TOKEN_BYTES, Prompt, Span, clip

LEAST = 64  # tokens: to read fewer costs less than to copy the part that they lie in
ANY = b""  # beginning


class Kind(NamedTuple):
    """What a memory depends on besides tokens, and whose it is: only a request that has the same may go on with it."""

    pins: list[list[int]]
    salt: str | None  # vLLM's cache_salt
    short: bool  # whether it is all tokens as they are, in parts of slots


class Vacancy(NamedTuple):
    """What a slot holds."""

    span: Span
    kind: Kind
    shared: bool = False  # a beginning of many prompts: they start from copies, and it stays

    @property
    def beginning(self) -> bytes:
        """What a prompt has to begin with for this to be of use; ANY where it has to be looked at closer."""
        return self.span.rest[: LEAST * TOKEN_BYTES] if self.kind.short and self.span.length >= LEAST else ANY

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
        self._alike: dict[bytes, dict[Slot, Vacancy]] = defaultdict(dict)  # the same by beginning
        self._around: dict[int, Slot] = {}  # those of them that are parts, by each one
        self._chosen: tuple[str, Slot] | None = None  # for the request that vLLM admits at the moment
        self._lent: list[Slot] = []  # that this step copies from or to: nobody may claim them meanwhile

    def note(self, slot: Slot, vacancy: Vacancy) -> None:
        """What a slot will hold that its sequence is about to leave."""
        slot = self._blocks.first(slot, vacancy.span.length)
        if not slot.whole:
            self._around |= dict.fromkeys(slot.rows, slot)
        self._drop(slot)
        self._held[slot] = self._alike[vacancy.beginning][slot] = vacancy

    def noted(self, slot: Slot) -> Slot | None:
        """What of a slot will hold what is noted: all of it, or its first parts."""
        found = slot if slot.whole else self._around.get(slot.rows[0])
        return found if found in self._held else None

    def forget(self, block: KVCacheBlock) -> None:
        """A block is claimed, or vLLM resets its prefix cache. Of what lies in parts, those before it stay."""
        place = self._blocks.place(block)
        self._drop(Slot(True, (place // self._blocks.parts,)))
        slot = self._around.get(place)
        if slot is not None:
            vacancy, kept = self._drop(slot), slot.rows.index(place)
            for row in slot.rows:
                del self._around[row]
            if kept:
                self.note(slot, vacancy._replace(span=vacancy.span.first(self._blocks.tokens_before(kept))))

    def choose(self, request_id: str, tokens: Sequence[int], kind: Kind) -> tuple[int, Slot | None]:
        """How many of a request's tokens a slot holds at most, and that slot if it is to be copied: else it is claimed.

        Slots that hold shorter beginnings of them are the next to be claimed by others: a longer one supersedes them.
        One that goes on otherwise is copied as far as it serves, and stays.
        """
        self.pass_over()
        if not self._held:
            return 0, None
        prompt = Prompt(tokens)
        found = {**self._alike.get(ANY, {}), **self._alike.get(prompt.ids[:LEAST].tobytes(), {})}
        if not found:
            return 0, None
        ascending = sorted(found, key=lambda slot: found[slot].span.closed)  # so that all is hashed once
        reached = {slot: found[slot].reach(prompt, kind) for slot in ascending}
        best = max(reached, key=lambda slot: (reached[slot], not self._held[slot].shared))
        length, other = reached[best], kind.short and reached[best] < self._held[best].span.length
        if not length or (other and length < LEAST):
            return 0, None
        for slot, vacancy in found.items():
            if slot != best and slot not in self._lent and reached[slot] == vacancy.span.length and not vacancy.shared:
                self._blocks.claim_next(slot)
        source, lent = self._blocks.first(best, length), best in self._lent
        if lent or ((other or self._held[best].shared) and self._room(len(tokens), best)):
            self._blocks.hold(best)
            self._lent.append(best)
            return length, source
        self._chosen = request_id, source
        return length, None

    def _drop(self, slot: Slot) -> Vacancy | None:
        """Forget what a slot holds, and say what that was."""
        vacancy = self._held.pop(slot, None)
        if vacancy is not None:
            alike = self._alike[vacancy.beginning]
            del alike[slot]
            if not alike:
                del self._alike[vacancy.beginning]
        return vacancy

    def _room(self, tokens: int, besides: Slot) -> Slot | None:
        """What so many tokens may claim, without claiming that slot."""
        if besides.whole:
            return self._blocks.whole(besides)
        return self._blocks.some(self._blocks.count(tokens), besides.rows)

    def give_back(self) -> None:
        """Nobody claims slots for this step any more; whoever does so in a later one finds the copies made."""
        self._blocks.leave(self._lent, self.forget)
        self._lent = []

    def pass_over(self) -> None:
        """Have the request that vLLM admits claim any slot."""
        self._chosen = None

    def claim(self, request_id: str, whole: bool, parts: int) -> list[KVCacheBlock]:
        """Claim the slot that was chosen for a request, or the next one; so many parts if it is none that is whole."""
        chosen, self._chosen = self._chosen, None
        if chosen is None or chosen[0] != request_id:
            return self._blocks.take(self._blocks.whole() if whole else self._blocks.some(parts))
        return self._blocks.take(chosen[1])

    def copy(self, vacancy: Vacancy) -> Slot | None:
        """A vacant slot for a copy of what a whole one holds; None if there is none, or if one holds that already.

        It is lent until the step is planned: two copies of a step never go to one slot.
        """
        slot = None if vacancy in self._held.values() else self._blocks.whole()
        if slot is not None:
            self._blocks.take(slot)
            self.note(slot, vacancy)
            self._lent.append(slot)
        return slot


class SlotManager(CircularBufferManager):
    """Gives every request one slot, or, to a short one, as many parts as its tokens take.

    Those left with a memory that is noted are claimed again after all others.
    """

    def __init__(self, kv_cache_spec, block_pool: BlockPool, *args, **kwargs):
        super().__init__(kv_cache_spec, block_pool, *args, **kwargs)
        self._part_tokens = kv_cache_spec.part_tokens
        self.blocks = Blocks(block_pool, kv_cache_spec.parts, kv_cache_spec.cells)
        self.vacancies = Vacancies(self.blocks)
        self.short: set[str] = set()  # requests that hold parts or are to, until they have finished
        self._asked = False  # whether a request of the step at hand waits for a whole slot

    def admit(self, request_id: str, short: bool) -> None:
        """What a request is to claim that vLLM is about to admit."""
        (self.short.add if short else self.short.discard)(request_id)

    def slot(self, request_id: str, tokens: int | None = None) -> Slot:
        """What a request holds; of parts, those that so many tokens lie in."""
        slot = self.blocks.slot(self.req_to_blocks[request_id])
        return slot if tokens is None else self.blocks.first(slot, tokens)

    def used(self) -> tuple[int, int]:
        """How many slots can't be claimed, others moved out of the way, and how many parts are held by themselves."""
        parts = sum(len(held) for held in self.req_to_blocks.values() if not self.blocks.are_whole(held))
        return self.blocks.slots - self.block_pool.get_num_free_blocks() // self.blocks.parts, parts

    def kinds(self, request_ids: Iterable[str]) -> tuple[bool, bool]:
        """Whether any of them hold whole slots, and parts."""
        whole = {self.blocks.are_whole(self.req_to_blocks[request_id]) for request_id in request_ids}
        return True in whole, False in whole

    def make_room(self, fixed: Collection[str]) -> Moves:
        """Parts to be moved, so that who waits for a whole slot claims it next. fixed: requests whose stay."""
        asked, self._asked = self._asked, False
        if not asked or self.blocks.whole():
            return Moves({}, {})
        held = [self.blocks.slot(blocks) for name, blocks in self.req_to_blocks.items() if blocks and name not in fixed]
        movable = [row for slot in held if not slot.whole for row in slot.rows]
        return self.blocks.make_vacant(movable, self.vacancies.forget)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args, **kwargs) -> int:
        """More than there are while no slot is vacant, though blocks may be, or if parts have no room for so many."""
        held, none = self.req_to_blocks.get(request_id), self.block_pool.get_num_free_blocks() + 1
        if request_id in self.short and not self.blocks.are_whole(held):
            return none if num_tokens > self._part_tokens else self._lacking(held, num_tokens)
        if held:
            return 0 if self.blocks.are_whole(held) else none
        slot = self.blocks.whole()
        self._asked |= slot is None
        return none if slot is None else self.blocks.parts

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args) -> list[KVCacheBlock]:
        return self._claim(request_id, num_tokens)

    def allocate_external_computed_blocks(self, request_id: str, local: int, external: int, *args, **kwargs) -> None:
        """Claim what holds the tokens that need not be computed."""
        self._claim(request_id, external)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        held = self.req_to_blocks.get(request_id)
        noted = self.vacancies.noted(self.blocks.slot(held)) if held else None
        blocks = [block for block in super().pop_blocks_for_free(request_id) if not block.is_null]
        if noted is None:
            return blocks
        left = {block.block_id for block in self.blocks.of(noted)}
        self.blocks.leave([noted], self.vacancies.forget)
        return [block for block in blocks if block.block_id not in left]

    def _claim(self, request_id: str, tokens: int) -> list[KVCacheBlock]:
        """Claim a slot, or the parts that are lacking; returns what was claimed."""
        held, whole = self.req_to_blocks[request_id], request_id not in self.short
        lacking = not held if whole else self._lacking(held, tokens)
        if not lacking:
            return []
        claimed = self.vacancies.claim(request_id, whole, lacking)
        if whole and self.blocks.parts > 1:
            claimed.insert(0, self.block_pool.null_block)  # which tells workers that it is no part
        held.extend(claimed)
        return claimed

    def _lacking(self, held: Sequence[KVCacheBlock] | None, tokens: int) -> int:
        """How many parts a short request has to claim yet."""
        return max(self.blocks.count(tokens) - len(held or ()), 0)
