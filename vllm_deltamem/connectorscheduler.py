"""The connector in the scheduler: which memory a request starts from, and what becomes of the one that it leaves.

A finished request is copied from its slot: at once by a worker in the scheduler's process, else in the next step, and
the slot is held back until then. So is the memory from before the answer's first merge, to which a prompt may go back
that tells the answer otherwise. The next turn reads that copy; in another process, which shares the directory, it
waits until the copy is written. Of several requests on one session at once each starts from the last save when it is
admitted, and the last to finish is the one that stays. A turn begins when its request arrives: an erasure that comes
later is final for it (one in host memory alone, once a step has told the worker).

A request without a session goes on in a slot, or in a copy of one, that holds the beginning of its prompt (unnamed.py),
in the step that admits it: there is nothing to load. A short one holds parts of slots, until it has outgrown them.
"""

import uuid
from collections.abc import Iterable

from vllm.logger import init_logger
from vllm.v1.request import Request, RequestStatus

from vllm_deltamem import stopstring
from vllm_deltamem.carrier import end
from vllm_deltamem.metrics import DeltaMemStats
from vllm_deltamem.options import SESSION, SESSIONS, SOURCE, TENANT, options_of, pins_of, untold
from vllm_deltamem.plan import plan_memory
from vllm_deltamem.requeststate import RequestState
from vllm_deltamem.saves import Saves
from vllm_deltamem.sessions import SessionRefused, SessionStore
from vllm_deltamem.transfers import Report, StepMetadata, Transfer, Turn
from vllm_deltamem.unnamed import Unnamed
from vllm_deltamem.vacancies import SlotManager

logger = init_logger(__name__)

NEW = {"history": "new"}  # what becomes of a session that does not exist yet
OUTGROWN = {"history": "outgrown"}  # of one that lies in parts of slots which have no room for the prompt
ENDED = RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_REPETITION


class ConnectorScheduler:
    """The scheduler's side; blocks: how many vLLM has, one of which it keeps for itself."""

    def __init__(self, vllm_config, store: SessionStore, blocks: int):
        self.plan = plan_memory(vllm_config)
        self._grain, self._model = self.plan.grain, vllm_config.model_config
        self._store, self._n_slots = store, (blocks - 1) // self.plan.parts
        self._saves = Saves(store, self.plan, vllm_config.parallel_config.world_size)
        self._requests: dict[str, RequestState] = {}  # that have not finished
        self._unnamed = Unnamed(self._grain, vllm_config.scheduler_config.max_num_batched_tokens)
        self._refused: dict[str, str] = {}  # why workers could not restore, by request
        self._step = StepMetadata()  # being put together
        self._waits = False  # whether a request of this step waits for a save
        self._loading: set[str] = set()  # requests into whose slots workers are restoring, some of them aborted
        self._stats = DeltaMemStats()
        self._slots: SlotManager | None = None
        self._say_sizes(blocks - 1)

    def _say_sizes(self, parts: int) -> None:
        plan, shape = self.plan, self.plan.whole.shape
        short = f", or short ones of up to {plan.part_tokens:,} tokens in {parts:,} parts of slots"
        logger.info(
            "deltamem: %s bytes per sequence at any length; full attention would hold %s at max_model_len %s; "
            "%s sequences fit%s.",
            f"{plan.bytes_per_sequence:,}",
            f"{shape.full_attention_bytes(shape.max_model_len):,}",
            f"{shape.max_model_len:,}",
            self._n_slots,
            short if plan.part else "",
        )

    def bind(self, slots: SlotManager, continuing: bool) -> None:
        """Use these slots; continuing: have prompts go on in those that others have left."""
        self._slots = slots
        if continuing:
            self._unnamed.bind(slots)

    def arrive(self, request) -> None:
        """A request is there; nothing has been computed of it."""
        state = self._requests[request.request_id] = RequestState(request.sampling_params)
        options = options_of(request.sampling_params)
        name, tenant = options.get(SESSION), options.get(TENANT)
        answer = (request.num_prompt_tokens // self._grain + 1) * self._grain
        self._admit(request, self._is_short(request))
        if not options.keys() & SESSIONS and not untold(request) and self._unnamed.arrive(request):
            state.answer = answer
        if name is None:
            return
        try:
            save_id = self._store.begin(tenant, name) if self._store.directory else uuid.uuid4().hex
        except SessionRefused as refused:
            logger.warning("deltamem will not save a session: %s", refused)
            return
        state.turn, state.answer = Turn(tenant, name, save_id), answer
        if self._store.directory is None:
            self._step.begun.append(state.turn)

    def match(self, request, computed: int) -> tuple[int | None, bool]:
        """How many tokens of a prompt some memory holds, None to be asked again, and whether it has to be restored."""
        self._admit(request, self._is_short(request))
        if request.request_id in self._unnamed and not request.skip_reading_prefix_cache:
            return self._unnamed.match(request), False
        state = self._requests[request.request_id]
        name, tenant = _source(request), options_of(request.sampling_params).get(TENANT)
        refused = (state.outcome or NEW)["history"] not in ("new", "restored")
        if name is None or computed or refused:
            return 0, False
        if request.skip_reading_prefix_cache:  # vLLM computes all of it, for the prompt's log-probabilities
            state.outcome = {"history": "prompt logprobs"}
            return 0, False
        if state.matched is not None:
            return state.matched[1].length, True
        outcome, length = NEW, 0
        try:
            last = self._saves.unwritten(tenant, name)
            if last is None and self._store.expects(tenant, name):  # another process is writing it
                self._waits = True
                return None, False
            last = last or self._saves.last(tenant, name)
            if last is not None:
                reach = last.reach(request.all_token_ids)
                length = reach.length
                outcome = {"history": "restored", "restored_tokens": length} if length else {"history": "other history"}
                if length and (reach.parts > 0) != (request.request_id in self._slots.short):
                    length, outcome = 0, OUTGROWN
        except SessionRefused as refused:
            outcome = {"history": refused.reason}
            logger.warning("deltamem computes a prompt anew: %s", refused)
        state.outcome = outcome
        if not length:
            self._stats.count("sessions_refused", outcome != NEW)
            return 0, False
        state.matched = Turn(tenant, name, last.save_id), reach
        return length, True

    def claim(self, request, matched_tokens: int) -> None:
        """A request has claimed a slot, and so many of its tokens need not be computed."""
        state, slot = self._requests[request.request_id], self._slots.slot(request.request_id)
        state.counted = None
        if request.request_id in self._unnamed:
            source = self._unnamed.claim(request.request_id)
            if source is not None and matched_tokens:
                self._step.copies[slot] = source
            self._stats.count("prompts_continued", matched_tokens > 0)
            self._stats.count("tokens_continued", matched_tokens)
        if state.matched is not None and matched_tokens:
            pins = pins_of(request.sampling_params)
            turn, reach = state.matched
            self._step.restores.append(Transfer(request.request_id, slot, turn, reach=reach, pins=pins))
            state.restoring = matched_tokens
            self._loading.add(request.request_id)
        state.matched = None

    def outgrown(self, running: Iterable[Request]) -> list[Request]:
        """Which requests need a whole slot for their next token: they are to start anew."""
        return [request for request in running if request.request_id in self._slots.short and self._outgrows(request)]

    def most_drafts(self, request) -> int:
        """How many tokens may be drafted beyond those that are known: none that completes a segment, or outgrows parts.

        What is merged then could not be taken back where drafts are rejected.
        """
        if request.request_id in self._slots.short:
            return max(self.plan.part_tokens - request.num_tokens, 0)
        return max(-request.num_tokens % self._grain - 1, 0)

    def plan_step(self, scheduler_output) -> StepMetadata:
        """What workers have to do with the next step."""
        step, self._step = self._step, StepMetadata()
        cached = scheduler_output.scheduled_cached_reqs
        for request in scheduler_output.scheduled_new_reqs:
            self._stats.count("tokens_pinned", sum(end - first for first, end in pins_of(request.sampling_params)))
            self._pin(request.req_id, step)
        for request_id in cached.resumed_req_ids:
            self._pin(request_id, step)
        for request_id, done in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            end = done + scheduler_output.num_scheduled_tokens[request_id]
            if end == self._requests[request_id].answer and max(end - self._grain, 1) <= done:
                keep = self._branch if request_id in self._unnamed else self._keep
                keep(request_id, done, step)
        reads = _reads(scheduler_output)
        step.branches = self._unnamed.plan(reads)
        self._count_tokens(reads, scheduler_output.scheduled_spec_decode_tokens)
        step.kinds = self._slots.kinds(scheduler_output.num_scheduled_tokens)
        step.moves = self._slots.make_room(self._loading)
        idle = not scheduler_output.num_scheduled_tokens
        step.waiting = idle and (self._waits or any(state.restoring for state in self._requests.values()))
        self._waits = False
        return step

    def finish(self, request, blocks: list[int]) -> tuple[Transfer | None, dict | None]:
        """A request ends: what to save of it now, and what its response says of its session."""
        computed = min(request.num_computed_tokens, request.num_tokens)
        self._count_written(request.request_id, computed, computed)  # the last step's drafts that stay
        self._slots.admit(request.request_id, False)
        state, unnamed = self._requests.pop(request.request_id), self._unnamed.finish(request.request_id)
        turn, said = state.turn, {"name": _source(request), **(state.outcome or {})}
        if turn is None and not unnamed:
            return None, {SESSION: said} if state.outcome else None
        slot = self._slots.slot(request.request_id, computed) if blocks else None
        beyond = request.num_computed_tokens // self._grain != computed // self._grain
        beyond &= slot is not None and slot.whole
        if beyond:  # steps under way read more than can be taken back
            computed = state.kept
        if state.restoring or not self._complete(request) or not blocks or not computed:
            if turn is not None:
                self._over(turn)
            return None, None
        if turn is None:
            self._unnamed.leave(request, slot, computed)
            return None, None
        tokens, n_earlier = list(request.all_token_ids[:computed]), state.kept if state.kept < computed else 0
        save = Transfer(request.request_id, slot, turn, tokens, n_earlier, from_kept=beyond)
        self._stats.count("sessions_saved", 1)
        try:
            self._saves.add(save)
        except SessionRefused as refused:
            logger.warning("deltamem: %s", refused)
        return save, {SESSION: said | {"name": turn.name, "saved_tokens": computed}}

    def reset(self) -> None:
        """vLLM resets its caches, as after new weights. What lies in vacant slots its block pool has us forget."""
        self._saves.reset()
        for state in self._requests.values():
            state.matched = None

    def save_with_next_step(self, save: Transfer) -> None:
        """Its slot is held back until then."""
        self._step.saves.append(save)

    def hear(self, report: Report | None, arrived: Iterable[str]) -> None:
        """What workers report of a step. arrived: requests whose session was restored, or refused."""
        if report is not None:
            self._refused |= report.refused
            self._saves.written(report.written)
        self._loading.difference_update(arrived)
        for request_id in arrived:
            state, refused = self._requests.get(request_id), self._refused.pop(request_id, None)
            if state is None or not state.restoring:  # aborted meanwhile
                continue
            tokens, state.restoring = state.restoring, 0
            if refused:
                state.outcome = {"history": refused}
                self._stats.count("sessions_refused", 1)
            else:
                self._stats.count("sessions_restored", 1)
                self._stats.count("session_tokens_reused", tokens)

    def stats(self) -> DeltaMemStats:
        """What was counted since the last call."""
        used, parts_used = self._slots.used()
        stats, self._stats = self._stats, DeltaMemStats()
        stats.data |= {"slots_used": used, "slots_free": self._n_slots - used, "parts_used": parts_used}
        return stats

    def _pin(self, request_id: str, step: StepMetadata) -> None:
        """Have workers write what a request pins; in parts of slots all tokens stay as they are."""
        slot = self._slots.slot(request_id)
        if slot.whole:
            step.pins[slot.rows[0]] = pins_of(self._requests[request_id].params)

    def _admit(self, request, short: bool) -> None:
        """Have a request claim parts of slots, or a whole one."""
        name = request.request_id
        if short != (name in self._slots.short):
            self._slots.admit(name, short)
            if name in self._unnamed:
                self._unnamed.readmit(request)

    def _is_short(self, request) -> bool:
        """Not if its prompt is yet to come: then it has a whole slot at once."""
        return not request.resumable and request.num_tokens <= self.plan.part_tokens

    def _outgrows(self, request) -> bool:
        """Whether parts have no room for the next token, unless there is none: vLLM, too, sees that ahead."""
        under_way, ends = request.num_output_placeholders, request.num_prompt_tokens + request.max_tokens
        over = under_way and request.num_computed_tokens + 2 - under_way >= ends
        return request.num_computed_tokens >= self.plan.part_tokens and not over

    def _complete(self, request) -> bool:
        """Whether a request leaves a memory to save: not one whose client has gone."""
        aborted = request.status == RequestStatus.FINISHED_ABORTED
        return request.status in ENDED or (aborted and stopstring.ended(request, self._model))

    def _over(self, turn: Turn) -> None:
        """A turn ends that is not saved."""
        if self._store.directory is None:
            self._step.ended.append(turn)
        else:
            end(self._store, turn)

    def _keep(self, request_id: str, done: int, step: StepMetadata) -> None:
        """Have workers keep a memory as it is before the answer's first merge, while host memory has room for it.

        The next prompt may contain the answer otherwise than it was generated: without its reasoning, its tool calls
        written anew. The prompt before the answer it will contain, and this memory can be taken back to. What lies in
        parts can be taken back to any token.
        """
        slot, kept = self._slots.slot(request_id), sum(state.kept > 0 for state in self._requests.values())
        if slot.whole and (kept + 1) * self.plan.worker_bytes <= self._store.settings.host_bytes:
            self._requests[request_id].kept = done
            step.kept[request_id] = slot

    def _branch(self, request_id: str, done: int, step: StepMetadata) -> None:
        """The same for a request without a session, in a slot that is vacant."""
        slot = self._unnamed.keep(request_id, done)
        if slot is not None:
            step.copies[slot] = self._slots.slot(request_id)

    def _count_tokens(self, reads: list[tuple[str, int, int]], drafts: dict[str, list[int]]) -> None:
        """What a step writes, and where it makes room, from positions alone; drafts once they are known to stay."""
        longest = 0
        for request_id, before, after in reads:
            after -= len(drafts.get(request_id, ()))
            self._count_written(request_id, before, after)
            longest = max(longest, after)
        if longest:
            self._stats.data |= {
                "bytes_per_sequence": self.plan.bytes_per_sequence,
                "full_attention_bytes": self.plan.whole.shape.full_attention_bytes(longest),
                "longest_sequence_tokens": longest,
            }

    def _count_written(self, request_id: str, before: int, after: int) -> None:
        """Count a request's tokens up to `after`; those before `before` have been, if any."""
        state = self._requests[request_id]
        before, state.counted = before if state.counted is None else min(before, state.counted), after
        self._stats.count("tokens_written", after - before)
        if request_id in self._slots.short:  # they are where they were
            return
        for name, amount in self.plan.whole.placed(before, after).items():
            self._stats.count(f"tokens_{name}", amount)


def _reads(scheduler_output) -> list[tuple[str, int, int]]:
    """Of every request of a step, how much of it has been computed before and will be after it."""
    cached, new = scheduler_output.scheduled_cached_reqs, scheduler_output.scheduled_new_reqs
    done = {request.req_id: request.num_computed_tokens for request in new}
    done |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    counts = scheduler_output.num_scheduled_tokens
    return [(request_id, done[request_id], done[request_id] + count) for request_id, count in counts.items()]


def _source(request) -> str | None:
    """The session that a request starts from."""
    options = options_of(request.sampling_params)
    return options.get(SOURCE, options.get(SESSION))
