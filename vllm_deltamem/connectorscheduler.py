"""The connector in the scheduler: which memory a request starts from, and what becomes of the one that it leaves.

A finished request is copied from its slot: at once by a worker in the scheduler's process, else in the next step, and
the slot is held back until then. So is the memory from before the answer's first merge, to which a prompt may go back
that tells the answer otherwise. The next turn reads that copy; in another process, which shares the directory, it
waits until the copy is written. Of several requests on one session at once each starts from the last save when it is
admitted, and the last to finish is the one that stays. A turn begins when its request arrives: an erasure that comes
later is final for it (one in host memory alone, once a step has told the worker).

A request without a session goes on in a slot, or in a copy of one, that holds the beginning of its prompt (unnamed.py),
in the step that admits it: there is nothing to load.
"""

import uuid
from collections.abc import Iterable

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from vllm_deltamem import stopstring
from vllm_deltamem.carrier import end
from vllm_deltamem.metrics import DeltaMemStats
from vllm_deltamem.options import SESSION, SESSIONS, SOURCE, TENANT, options_of, pins_of, untold
from vllm_deltamem.plan import plan_memory
from vllm_deltamem.saves import Saves
from vllm_deltamem.sessions import SessionRefused, SessionStore
from vllm_deltamem.transfers import Reach, Report, StepMetadata, Transfer, Turn
from vllm_deltamem.unnamed import Unnamed
from vllm_deltamem.vacancies import Vacancies

logger = init_logger(__name__)

NEW = {"history": "new"}  # what becomes of a session that does not exist yet
ENDED = RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_REPETITION


class ConnectorScheduler:
    """The scheduler's side; slots: how many there are."""

    def __init__(self, vllm_config, store: SessionStore, slots: int):
        self._plan = plan_memory(vllm_config)
        self._segment, self._model = self._plan.layout.segment, vllm_config.model_config
        self._store, self._n_slots = store, slots
        self._saves = Saves(store, self._segment, vllm_config.parallel_config.world_size)
        self._requests = {}  # sampling parameters of running requests
        self._slots: dict[str, int] = {}  # theirs
        self._turns: dict[str, Turn] = {}  # of requests that are not finished
        self._unnamed = Unnamed(self._segment, vllm_config.scheduler_config.max_num_batched_tokens)
        self._answers: dict[str, int] = {}  # of both kinds, where the answer's first merge will be
        self._kept: dict[str, int] = {}  # tokens of the memories that workers keep from before it
        self._matched: dict[str, tuple[Turn, Reach]] = {}  # what to restore once there is a slot
        self._restoring: dict[str, int] = {}  # tokens of what workers are restoring, by request
        self._refused: dict[str, str] = {}  # why workers could not restore, by request
        self._outcome: dict[str, dict] = {}  # what became of a request's session, for its response
        self._step = StepMetadata()  # being put together
        self._waits = False  # whether a request of this step waits for a save
        self._stats = DeltaMemStats()
        self._block_pool = None
        self._say_sizes()

    def _say_sizes(self) -> None:
        shape = self._plan.whole.shape
        logger.info(
            "deltamem: %s bytes per sequence at any length; full attention would hold %s at max_model_len %s; "
            "%s sequences fit.",
            f"{self._plan.bytes_per_sequence:,}",
            f"{shape.full_attention_bytes(shape.max_model_len):,}",
            f"{shape.max_model_len:,}",
            self._n_slots,
        )

    def bind_pool(self, block_pool) -> None:
        self._block_pool = block_pool

    def bind_vacancies(self, vacancies: Vacancies) -> None:
        """Have prompts go on in slots that others have left."""
        self._unnamed.bind(vacancies)

    def arrive(self, request) -> None:
        """A request is there; nothing has been computed of it."""
        options = options_of(request.sampling_params)
        name, tenant = options.get(SESSION), options.get(TENANT)
        answer = (request.num_prompt_tokens // self._segment + 1) * self._segment
        if not options.keys() & SESSIONS and not untold(request) and self._unnamed.arrive(request):
            self._answers[request.request_id] = answer
        if name is None:
            return
        try:
            save_id = self._store.begin(tenant, name) if self._store.directory else uuid.uuid4().hex
        except SessionRefused as refused:
            logger.warning("deltamem will not save a session: %s", refused)
            return
        turn = self._turns[request.request_id] = Turn(tenant, name, save_id)
        self._answers[request.request_id] = answer
        if self._store.directory is None:
            self._step.begun.append(turn)

    def match(self, request, computed: int) -> tuple[int | None, bool]:
        """How many tokens of a prompt some memory holds, None to be asked again, and whether it has to be restored."""
        if request.request_id in self._unnamed and not request.skip_reading_prefix_cache:
            return self._unnamed.match(request), False
        name, tenant = _source(request), options_of(request.sampling_params).get(TENANT)
        refused = self._outcome.get(request.request_id, NEW)["history"] not in ("new", "restored")
        if name is None or computed or refused:
            return 0, False
        if request.skip_reading_prefix_cache:  # vLLM computes all of it, for the prompt's log-probabilities
            self._outcome[request.request_id] = {"history": "prompt logprobs"}
            return 0, False
        if request.request_id in self._matched:
            return self._matched[request.request_id][1].length, True
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
        except SessionRefused as refused:
            outcome = {"history": refused.reason}
            logger.warning("deltamem computes a prompt anew: %s", refused)
        self._outcome[request.request_id] = outcome
        if not length:
            self._stats.count("sessions_refused", outcome != NEW)
            return 0, False
        self._matched[request.request_id] = Turn(tenant, name, last.save_id), reach
        return length, True

    def claim(self, request, blocks, matched_tokens: int) -> None:
        """A request has claimed a slot, and so many of its tokens need not be computed."""
        slot = self._slots[request.request_id] = blocks.get_block_ids()[0][0]
        if request.request_id in self._unnamed:
            source = self._unnamed.claim(request.request_id, slot)
            if source is not None and matched_tokens:
                self._step.copies[slot] = source
            self._stats.count("prompts_continued", matched_tokens > 0)
            self._stats.count("tokens_continued", matched_tokens)
        matched = self._matched.pop(request.request_id, None)
        if matched is not None and matched_tokens:
            pins = pins_of(request.sampling_params)
            turn, reach = matched
            self._step.restores.append(Transfer(request.request_id, slot, turn, reach=reach, pins=pins))
            self._restoring[request.request_id] = matched_tokens

    def plan_step(self, scheduler_output) -> StepMetadata:
        """What workers have to do with the next step."""
        step, self._step = self._step, StepMetadata()
        cached = scheduler_output.scheduled_cached_reqs
        for request in scheduler_output.scheduled_new_reqs:
            self._requests[request.req_id] = request.sampling_params
            pins = step.pins[self._slots[request.req_id]] = pins_of(request.sampling_params)
            self._stats.count("tokens_pinned", sum(end - first for first, end in pins))
        for request_id in cached.resumed_req_ids:
            step.pins[self._slots[request_id]] = pins_of(self._requests[request_id])
        for request_id, done in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            end = done + scheduler_output.num_scheduled_tokens[request_id]
            if end == self._answers.get(request_id) and max(end - self._segment, 1) <= done:
                keep = self._branch if request_id in self._unnamed else self._keep
                keep(request_id, done, step)
        parts = _parts(scheduler_output)
        step.branches = self._unnamed.plan(parts)
        self._count_tokens(parts)
        step.waiting = not scheduler_output.num_scheduled_tokens and bool(self._waits or self._restoring)
        self._waits = False
        return step

    def finish(self, request, slots: list[int]) -> tuple[Transfer | None, dict | None]:
        """A request ends: what to save of it now, and what its response says of its session."""
        self._requests.pop(request.request_id, None)
        self._slots.pop(request.request_id, None)
        self._answers.pop(request.request_id, None)
        kept = self._kept.pop(request.request_id, 0)
        self._matched.pop(request.request_id, None)
        restoring = self._restoring.pop(request.request_id, 0)
        outcome = self._outcome.pop(request.request_id, None)
        turn = self._turns.pop(request.request_id, None)
        unnamed = self._unnamed.finish(request.request_id)
        said = {"name": _source(request), **(outcome or {})}
        if turn is None and not unnamed:
            return None, {SESSION: said} if outcome else None
        computed = min(request.num_computed_tokens, request.num_tokens)
        if restoring or not self._complete(request, computed) or not slots or not computed:
            if turn is not None:
                self._over(turn)
            return None, None
        if turn is None:
            self._unnamed.leave(request, slots[0], computed)
            return None, None
        tokens, n_earlier = list(request.all_token_ids[:computed]), kept if kept < computed else 0
        save = Transfer(request.request_id, slots[0], turn, tokens, n_earlier)
        self._stats.count("sessions_saved", 1)
        try:
            self._saves.add(save)
        except SessionRefused as refused:
            logger.warning("deltamem: %s", refused)
        return save, {SESSION: said | {"name": turn.name, "saved_tokens": computed}}

    def reset(self) -> None:
        """vLLM resets its caches, as after new weights. What lies in vacant slots its block pool has us forget."""
        self._saves.reset()
        self._matched.clear()

    def save_with_next_step(self, save: Transfer) -> None:
        """Its slot is held back until then."""
        self._step.saves.append(save)

    def hear(self, report: Report | None, arrived: Iterable[str]) -> None:
        """What workers report of a step. arrived: requests whose session was restored, or refused."""
        if report is not None:
            self._refused |= report.refused
            self._saves.written(report.written)
        for request_id in arrived:
            tokens, refused = self._restoring.pop(request_id, 0), self._refused.pop(request_id, None)
            if not tokens:  # aborted meanwhile
                continue
            if refused:
                self._outcome[request_id] = {"history": refused}
                self._stats.count("sessions_refused", 1)
            else:
                self._stats.count("sessions_restored", 1)
                self._stats.count("session_tokens_reused", tokens)

    def stats(self) -> DeltaMemStats:
        """What was counted since the last call."""
        free = self._block_pool.get_num_free_blocks()
        stats, self._stats = self._stats, DeltaMemStats()
        stats.data |= {"slots_used": self._n_slots - free, "slots_free": free}
        return stats

    def _complete(self, request, computed: int) -> bool:
        """Whether a request leaves a memory to save: not one whose client has gone."""
        if request.status == RequestStatus.FINISHED_ABORTED:
            # steps under way must not have merged: a memory is taken back to known tokens inside a segment only
            merged = request.num_computed_tokens // self._segment != computed // self._segment
            return not merged and stopstring.ended(request, self._model)
        return request.status in ENDED

    def _over(self, turn: Turn) -> None:
        """A turn ends that is not saved."""
        if self._store.directory is None:
            self._step.ended.append(turn)
        else:
            end(self._store, turn)

    def _keep(self, request_id: str, done: int, step: StepMetadata) -> None:
        """Have workers keep a memory as it is before the answer's first merge, while host memory has room for it.

        The next prompt may contain the answer otherwise than it was generated: without its reasoning, its tool calls
        written anew. The prompt before the answer it will contain, and this memory can be taken back to.
        """
        if (len(self._kept) + 1) * self._plan.layout.slot_bytes <= self._store.settings.host_bytes:
            self._kept[request_id] = done
            step.kept[request_id] = self._slots[request_id]

    def _branch(self, request_id: str, done: int, step: StepMetadata) -> None:
        """The same for a request without a session, in a slot that is vacant."""
        slot = self._unnamed.keep(request_id, done)
        if slot is not None:
            step.copies[slot] = self._slots[request_id]

    def _count_tokens(self, parts: list[tuple[str, int, int]]) -> None:
        """What a step writes, and where it makes room, from positions alone."""
        layout, longest = self._plan.whole, 0
        for _, before, after in parts:
            longest = max(longest, after)
            self._stats.count("tokens_written", after - before)
            for name, amount in layout.placed(before, after).items():
                self._stats.count(f"tokens_{name}", amount)
        if longest:
            self._stats.data |= {
                "bytes_per_sequence": self._plan.bytes_per_sequence,
                "full_attention_bytes": layout.shape.full_attention_bytes(longest),
                "longest_sequence_tokens": longest,
            }


def _parts(scheduler_output) -> list[tuple[str, int, int]]:
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
