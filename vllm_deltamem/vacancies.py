"""Slots that sequences have left and nobody has claimed since: a prompt that goes on from there claims one as it is.

What vLLM's prefix caching does for blocks, for whole memories: nothing is copied, and nothing has to be named. A
slot's memory goes as soon as another sequence claims it, those that were left first before the others.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager

from vllm_deltamem.transfers import Prompt, Span, clip


class Kind(NamedTuple):
    """What a memory depends on besides tokens, and whose it is: only a request that has the same may go on with it."""

    pins: list[list[int]]
    salt: str | None  # vLLM's cache_salt


class Vacancy(NamedTuple):
    """What a slot holds."""

    span: Span
    kind: Kind
    shared: bool = False  # a beginning of many prompts: they start from copies, and it stays

    def reach(self, prompt: Prompt, kind: Kind) -> int:
        """How many tokens of a prompt need not be computed."""
        length = self.span.shared(prompt) if self.kind.salt == kind.salt else 0
        return length if clip(self.kind.pins, length) == clip(kind.pins, length) else 0


class Vacancies:
    """What is known of vacant slots. Empty where `--no-enable-prefix-caching` says so: nobody notes any."""

    def __init__(self, block_pool: BlockPool):
        self._pool = block_pool
        self._held: dict[int, Vacancy] = {}
        self._chosen: tuple[str, int] | None = None  # for the request that vLLM admits at the moment
        self._lent: list[KVCacheBlock] = []  # that this step copies from or to: nobody may claim them meanwhile

    def __contains__(self, slot: int) -> bool:
        return slot in self._held

    def note(self, slot: int, vacancy: Vacancy) -> None:
        """What a slot will hold that its sequence is about to leave."""
        self._held[slot] = vacancy

    def forget(self, block: KVCacheBlock) -> None:
        """The slot is claimed, or vLLM resets its prefix cache."""
        self._held.pop(block.block_id, None)

    def choose(self, request_id: str, tokens: Sequence[int], kind: Kind) -> tuple[int, int | None]:
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
        self._first([slot for slot in shorter if not self._held[slot].shared])
        block = self._pool.blocks[best]
        if self._held[best].shared and (block in self._lent or self._pool.get_num_free_blocks() > 1):
            self._pool.touch([block])
            self._lent.append(block)
            return reached[best], best
        self._chosen = request_id, best
        return reached[best], None

    def give_back(self) -> None:
        """Nobody claims slots for this step any more; whoever does so in a later one finds the copies made."""
        self._pool.unpin_blocks(self._lent, self.forget)
        self._lent = []

    def pass_over(self) -> None:
        """Have the request that vLLM admits claim any slot."""
        self._chosen = None

    def claim(self, request_id: str) -> None:
        """Let the slot chosen for a request be the next that is claimed."""
        if self._chosen is not None and self._chosen[0] == request_id:
            self._first([self._chosen[1]])
        self.pass_over()

    def copy(self, vacancy: Vacancy) -> int | None:
        """A vacant slot for a copy of what a sequence holds; None if there is none, or if one holds that already.

        It is lent until the step is planned: two copies of a step never go to one slot.
        """
        if vacancy in self._held.values() or not self._pool.get_num_free_blocks():
            return None
        (block,) = self._pool.get_new_blocks(1)
        self.note(block.block_id, vacancy)
        self._lent.append(block)
        return block.block_id

    def _first(self, slots: Sequence[int]) -> None:
        queue, blocks = self._pool.free_block_queue, [self._pool.blocks[slot] for slot in slots]
        for block in blocks:
            queue.remove(block)
        queue.prepend_n(blocks)


class SlotManager(CircularBufferManager):
    """Gives every request one slot. Those left with a memory that is noted are claimed again after all others."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.vacancies = Vacancies(self.block_pool)

    def _claim_ring_block(self, request_id: str, record_for_zeroing: bool = True) -> list[KVCacheBlock]:
        self.vacancies.claim(request_id)
        return super()._claim_ring_block(request_id, record_for_zeroing)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        if any(block.block_id in self.vacancies for block in blocks):
            self.block_pool.unpin_blocks(blocks, self.vacancies.forget)
            return []
        return blocks
