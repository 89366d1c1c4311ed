"""Requests that name no session: which slots they go on in, or start with copies of, and what they leave to others.

One goes on in a slot that another has left, if that holds the beginning of its prompt (vacancies.py), or in a copy of
the slot of one that is under way (readers.py). Where it parts from what an earlier prompt began with (beginnings.py),
its slot is copied to a vacant one while it is read, and prompts that begin so start from copies of that.
"""

from vllm.v1.request import Request, RequestStatus

from vllm_deltamem import beginnings
from vllm_deltamem.beginnings import Beginnings
from vllm_deltamem.blocks import Slot
from vllm_deltamem.options import pins_of
from vllm_deltamem.readers import Readers
from vllm_deltamem.transfers import Branch, Prompt, Span
from vllm_deltamem.vacancies import Kind, SlotManager, Vacancy


class Unnamed:
    """segment: MemoryPlan.grain; chunk: the most tokens of a prompt that a step computes."""

    def __init__(self, segment: int, chunk: int):
        self._segment = segment
        self._readers, self._beginnings = Readers(segment, chunk), Beginnings(segment)
        self._slots: SlotManager | None = None  # where `--no-enable-prefix-caching` says so: nobody arrives
        self._requests: dict[str, Request] = {}  # that are not finished
        self._parting: dict[str, set[int]] = {}  # tokens after which their prompts part from others
        self._leaders: dict[str, tuple[Request, int]] = {}  # who reads so far for a request, and how far
        self._awaiting: dict[str, bool] = {}  # of requests that the step at hand has asked about
        self._sources: dict[str, Slot | None] = {}  # which slot a request that is admitted starts with a copy of

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def bind(self, slots: SlotManager) -> None:
        """Have prompts go on in slots that others have left."""
        self._slots = slots

    def arrive(self, request: Request) -> bool:
        """Whether a request takes part in this, of which nothing has been computed; what it will hold is known.

        If its prompt parts from one that is not read yet, that one reads for both.
        """
        if self._slots is None:
            return False
        name, prompt, kind = request.request_id, Prompt(request.prompt_token_ids), self._claims(request)
        self._requests[name] = request
        if not kind.pins and self._segment > 1:  # states of recurrent layers can't be copied while a chunk is read
            shared, earlier = self._beginnings.part(prompt, (kind.salt, kind.short), name)
            if shared >= beginnings.LEAST:
                self._follow(name, earlier, shared)
        self._readers.add(request, prompt, kind)
        return True

    def readmit(self, request: Request) -> None:
        """A request of which nothing is computed any more is to claim another kind of slot than it did."""
        self._readers.remove(request.request_id)
        self._readers.add(request, Prompt(request.prompt_token_ids), self._claims(request))

    def match(self, request: Request) -> int | None:
        """How many tokens of a prompt the slot of another request holds, or held; None to wait until it does."""
        name = request.request_id
        if self._awaits(name):
            return None
        reader, length = self._readers.find(request)
        if reader is None:
            length, slot = self._slots.vacancies.choose(name, request.all_token_ids, self._claims(request))
            leader, read = self._led(request)
            reader, length = (leader, read) if read > length else (None, length)
        elif not length:
            return None
        if reader is not None:
            self._slots.vacancies.pass_over()
            slot = self._slots.slot(reader, length)
        self._sources[name] = slot
        return length

    def claim(self, request_id: str) -> Slot | None:
        """A request has claimed a slot. Returns the one that it starts with a copy of, if it does."""
        return self._sources.pop(request_id, None)

    def plan(self, reads: list[tuple[str, int, int]]) -> list[Branch]:
        """Which memories a step keeps as they are where prompts part. reads: of every request, before and after it.

        Nobody claims slots for this step any more: those that it copies from and to are free again.
        """
        if self._slots is None:
            return []
        self._awaiting.clear()
        branches = [branch for read in reads if read[0] in self._parting for branch in self._part(*read)]
        self._slots.vacancies.give_back()
        return branches

    def keep(self, request_id: str, done: int) -> Slot | None:
        """A vacant slot for a copy of what a request's holds, which may be told otherwise later; None: none is kept."""
        request, slot = self._requests[request_id], self._slots.slot(request_id)
        if not slot.whole:  # it can be taken back to any token
            return None
        if request.num_tokens // self._segment < done // self._segment:  # the last token before it is not known yet
            return None
        return self._slots.vacancies.copy(self._vacancy(request, slot, done))

    def leave(self, request: Request, slot: Slot, computed: int) -> None:
        """A request leaves its slot with what it has computed."""
        self._slots.vacancies.note(slot, self._vacancy(request, slot, computed))

    def finish(self, request_id: str) -> bool:
        """Forget a request; whether it took part."""
        self._readers.remove(request_id)
        for known in (self._parting, self._leaders, self._sources):
            known.pop(request_id, None)
        return self._requests.pop(request_id, None) is not None

    def _follow(self, name: str, earlier: str, shared: int) -> None:
        """Have a memory of so many tokens kept by whoever reads them: the earlier request, or whom it follows."""
        leader, end = self._leaders.get(earlier, (None, 0))
        if end != shared or leader.request_id not in self._requests:
            leader = self._requests.get(earlier)
        self._parting[name] = {shared}
        if leader is not None:
            self._parting.setdefault(leader.request_id, set()).add(shared)
            self._leaders[name] = leader, shared

    def _awaits(self, request_id: str) -> bool:
        """Whether its leader is about to read what they share, or waits for one that is about to."""
        asked, awaits = [], None
        while awaits is None:
            asked.append(request_id)
            leader, end = self._leaders.get(request_id, (None, 0))
            if leader is None:
                awaits = False
            elif leader.status == RequestStatus.RUNNING:
                awaits = leader.num_computed_tokens < end
            else:
                request_id = leader.request_id
                awaits = self._awaiting.get(request_id)
        self._awaiting |= dict.fromkeys(asked, awaits)
        return awaits

    def _led(self, request: Request) -> tuple[str | None, int]:
        """Whose parts hold how many tokens of a short request's: its leader's, which has read them."""
        leader, end = self._leaders.get(request.request_id, (None, 0))
        running = leader is not None and leader.status == RequestStatus.RUNNING and leader.num_computed_tokens >= end
        if not running or not {request.request_id, leader.request_id} <= self._slots.short:
            return None, 0
        return leader.request_id, min(end, request.num_tokens - 1)

    def _part(self, request_id: str, done: int, end: int) -> list[Branch]:
        found, slot, request = [], self._slots.slot(request_id), self._requests[request_id]
        if not slot.whole:  # others start with copies of any beginning of it
            return found
        for parting in sorted(self._parting[request_id]):
            if done < parting <= end and end > done + 1:  # a single token merges after the step, as in decoding
                target = self._slots.vacancies.copy(self._vacancy(request, slot, parting, shared=True))
                if target is not None:
                    piece = parting // self._segment - done // self._segment - 1
                    found.append(Branch(slot.rows[0], target.rows[0], piece))
        return found

    def _vacancy(self, request: Request, slot: Slot, computed: int, shared: bool = False) -> Vacancy:
        span = Span.of(request.all_token_ids[:computed], self._segment if slot.whole else None)
        return Vacancy(span, _kind(request, short=not slot.whole), shared)

    def _claims(self, request: Request) -> Kind:
        """What a request can go on with."""
        return _kind(request, request.request_id in self._slots.short)


def _kind(request: Request, short: bool) -> Kind:
    return Kind(pins_of(request.sampling_params), request.cache_salt, short)
