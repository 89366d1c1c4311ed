"""The plugin's KV connector: carries pins to the slots, merges after decoding, saves and restores sessions, counts.

vLLM makes one in the scheduler and one in every worker; the metadata of a step goes from the first to the
others. Sessions are written and read beside the steps (carrier.py). One is restored before its first new token is
computed: no token is ever computed on what turns out to be unreadable. When its request has finished it is copied
from the slot: at once by a worker in the scheduler's process, which nobody may step again, else in the next step, and
the slot is held back until then. So is the memory from before the answer's first merge, to which a prompt may go back
that tells the answer otherwise. The next turn reads that copy; in another process, which shares the directory, it
waits until the copy is written. Of several requests on one session at once each starts from the last save when it is
admitted, and the last to finish is the one that stays. A turn begins when its request arrives: an erasure that comes
later is final for it (one in host memory alone, once a step has told the worker).

A request without a session goes on in a slot that another one has left, if one holds the beginning of its prompt
(vacancies.py), in the step that admits it: there is nothing to load.
"""

import uuid
from collections import Counter
from collections.abc import Sequence

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from vllm_deltamem import stopstring
from vllm_deltamem.carrier import Carrier, Copied, Read, Write, end
from vllm_deltamem.enginestore import open_store
from vllm_deltamem.metrics import DeltaMemPromMetrics, DeltaMemStats
from vllm_deltamem.options import PINS, SESSION, SESSIONS, SOURCE, TENANT, untold
from vllm_deltamem.plan import plan_memory
from vllm_deltamem.pool import SlotPool
from vllm_deltamem.sessions import SessionRefused
from vllm_deltamem.startup import CONTINUING
from vllm_deltamem.transfers import Note, Reach, Report, Span, StepMetadata, Transfer, Turn, clip
from vllm_deltamem.vacancies import Kind, Vacancies, Vacancy

logger = init_logger(__name__)

NEW = {"history": "new"}  # what becomes of a session that does not exist yet
PAUSE_S = 0.005  # of a step in which there is nothing to do but to wait


class DeltaMemConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        self._plan = plan_memory(vllm_config)
        parallel = vllm_config.parallel_config
        rank = parallel.rank % parallel.tensor_parallel_size if role == KVConnectorRole.WORKER else 0
        self.store = open_store(vllm_config, rank)
        if role == KVConnectorRole.WORKER:
            self.store.sweeper.start()
            self.carrier = Carrier(self.store, self.store.settings.host_bytes)
        else:
            self._say_sizes()
        self._requests = {}  # scheduler: running requests by id
        self._slots: dict[str, int] = {}  # scheduler: theirs
        self._turns: dict[str, Turn] = {}  # scheduler: of requests that are not finished
        self._unnamed = {}  # scheduler: requests by id that may go on in a slot that others have left, and leave theirs
        self._answers: dict[str, int] = {}  # scheduler: of both kinds, where the answer's first merge will be
        self._kept: dict[str, int] = {}  # scheduler: tokens of the memories that workers keep from before it
        self._matched: dict[str, tuple[Turn, Reach]] = {}  # scheduler: what to restore once there is a slot
        self._restoring: dict[str, int] = {}  # scheduler: tokens of what workers are restoring, by request
        self._step = StepMetadata()  # scheduler: being put together
        self._saving: dict[str, Transfer] = {}  # scheduler: by save, until every worker is done with it
        self._writers: Counter[str] = Counter()  # scheduler: how many are not, by save
        self._refused: dict[str, str] = {}  # scheduler: why workers could not restore, by request
        self._waits = False  # scheduler: whether a request of this step waits for a save
        self._notes: dict[tuple[str, str], Note] = {}  # scheduler: of what the worker keeps in host memory
        self._outcome: dict[str, dict] = {}  # scheduler: what became of a request's session, for its response
        self._stats = DeltaMemStats()
        self._earlier: dict[str, Copied] = {}  # worker: memories from before the answer's first merge, by request
        self._copied: set[str] = set()  # worker: requests whose slot was copied
        self._restored: set[str] = set()  # worker: requests whose session was restored, or refused
        self._report = Report({}, Counter())  # worker: being put together
        self._block_pool = None
        self._vacancies: Vacancies | None = None  # scheduler: where prompts may go on in them

    def _say_sizes(self):
        shape = self._plan.whole.shape
        logger.info(
            "deltamem: %s bytes per sequence at any length; full attention would hold %s at max_model_len %s; "
            "%s sequences fit.",
            f"{self._plan.bytes_per_sequence:,}",
            f"{shape.full_attention_bytes(shape.max_model_len):,}",
            f"{shape.max_model_len:,}",
            self._kv_cache_config.num_blocks - 1,  # vLLM keeps one block for itself
        )

    def shutdown(self):
        if self.role == KVConnectorRole.WORKER:
            self.carrier.shutdown()
        self.store.sweeper.stop()

    # In the scheduler

    def on_new_request(self, request):
        options, segment = _options(request.sampling_params), self._plan.layout.segment
        name, tenant = options.get(SESSION), options.get(TENANT)
        answer = (request.num_prompt_tokens // segment + 1) * segment
        if self._vacancies is not None and not options.keys() & SESSIONS and not untold(request):
            self._unnamed[request.request_id] = request
            self._answers[request.request_id] = answer
        if name is None:
            return
        try:
            save_id = self.store.begin(tenant, name) if self.store.directory else uuid.uuid4().hex
        except SessionRefused as refused:
            logger.warning("deltamem will not save a session: %s", refused)
            return
        turn = self._turns[request.request_id] = Turn(tenant, name, save_id)
        self._answers[request.request_id] = answer
        if self.store.directory is None:
            self._step.begun.append(turn)

    def bind_kv_cache_manager(self, kv_cache_manager):
        super().bind_kv_cache_manager(kv_cache_manager)
        if self._kv_transfer_config.get_from_extra_config(CONTINUING, False):
            (slots,) = kv_cache_manager.coordinator.single_type_managers
            self._vacancies = slots.vacancies

    def bind_gpu_block_pool(self, gpu_block_pool):
        self._block_pool = gpu_block_pool

    def get_loaded_kv_cache_group_ids(self, request):
        return tuple(range(len(self._kv_cache_config.kv_cache_groups)))

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        if request.request_id in self._unnamed and not request.skip_reading_prefix_cache:
            return self._vacancies.choose(request.request_id, request.all_token_ids, _kind(request)), False
        name, tenant = _source(request), _options(request.sampling_params).get(TENANT)
        refused = self._outcome.get(request.request_id, NEW)["history"] not in ("new", "restored")
        if name is None or num_computed_tokens or refused:
            return 0, False
        if request.skip_reading_prefix_cache:  # vLLM computes all of it, for the prompt's log-probabilities
            self._outcome[request.request_id] = {"history": "prompt logprobs"}
            return 0, False
        if request.request_id in self._matched:
            return self._matched[request.request_id][1].length, True
        outcome, length = NEW, 0
        try:
            last = self._unwritten(tenant, name)
            if last is None and self.store.expects(tenant, name):  # another process is writing it
                self._waits = True
                return None, False  # ask again
            last = last or self._last_save(tenant, name)
            if last is not None:
                reach = last.reach(request.all_token_ids)
                length = reach.length
                outcome = {"history": "restored", "restored_tokens": length} if length else {"history": "other history"}
        except SessionRefused as refused:
            outcome = {"history": refused.reason}
            logger.warning("deltamem computes a prompt anew: %s", refused)
        self._outcome[request.request_id] = outcome
        if not length:
            self._count("sessions_refused", outcome != NEW)
            return 0, False
        self._matched[request.request_id] = Turn(tenant, name, last.save_id), reach
        return length, True

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        if request.request_id in self._unnamed and num_external_tokens:
            self._count("prompts_continued", 1)
            self._count("tokens_continued", num_external_tokens)
        matched = self._matched.pop(request.request_id, None)
        if matched is not None and num_external_tokens:
            slot = blocks.get_block_ids()[0][0]
            pins = _pins(request.sampling_params)
            turn, reach = matched
            self._step.restores.append(Transfer(request.request_id, slot, turn, reach=reach, pins=pins))
            self._restoring[request.request_id] = num_external_tokens

    def build_connector_meta(self, scheduler_output):
        step, self._step = self._step, StepMetadata()
        cached = scheduler_output.scheduled_cached_reqs
        for request in scheduler_output.scheduled_new_reqs:
            self._requests[request.req_id] = request.sampling_params
            slot = self._slots[request.req_id] = request.block_ids[0][0]
            pins = step.pins[slot] = _pins(request.sampling_params)
            self._count("tokens_pinned", sum(end - first for first, end in pins))
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                slot = self._slots[request_id] = blocks[0][0]
                step.pins[slot] = _pins(self._requests[request_id])
        segment = self._plan.layout.segment
        for request_id, done in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            end = done + scheduler_output.num_scheduled_tokens[request_id]
            if end == self._answers.get(request_id) and max(end - segment, 1) <= done:
                keep = self._branch if request_id in self._unnamed else self._keep
                keep(request_id, done, step)
        self._count_tokens(scheduler_output)
        step.waiting = not scheduler_output.num_scheduled_tokens and bool(self._waits or self._restoring)
        self._waits = False
        return step

    def request_finished_all_groups(self, request, block_ids):
        self._requests.pop(request.request_id, None)
        self._slots.pop(request.request_id, None)
        self._answers.pop(request.request_id, None)
        kept = self._kept.pop(request.request_id, 0)
        self._matched.pop(request.request_id, None)
        self._restoring.pop(request.request_id, None)
        outcome = self._outcome.pop(request.request_id, None)
        turn = self._turns.pop(request.request_id, None)
        unnamed = self._unnamed.pop(request.request_id, None)
        said = {"name": _source(request), **(outcome or {})}
        if turn is None and unnamed is None:
            return False, {SESSION: said} if outcome else None
        computed = min(request.num_computed_tokens, request.num_tokens)
        if not self._complete(request, computed) or not block_ids[0] or not computed:
            if turn is not None:
                self._over(turn)
            return False, None
        if turn is None:
            self._vacancies.note(block_ids[0][0], self._vacancy(request, computed))
            return False, None
        tokens, n_earlier = list(request.all_token_ids[:computed]), kept if kept < computed else 0
        save = Transfer(request.request_id, block_ids[0][0], turn, tokens, n_earlier)
        self._count("sessions_saved", 1)
        self._announce(turn)
        self._saving[turn.save_id] = save
        self._writers[turn.save_id] = self._vllm_config.parallel_config.world_size
        here = has_kv_transfer_group()
        if here:
            get_kv_transfer_group().save(save)
        else:
            self._step.saves.append(save)
        return not here, {SESSION: said | {"name": turn.name, "saved_tokens": computed}}

    def request_finished(self, request, block_ids):
        return self.request_finished_all_groups(request, (block_ids,))

    def update_connector_output(self, connector_output):
        report = connector_output.kv_connector_worker_meta
        if report is not None:
            self._refused |= report.refused
            self._writers -= report.written  # leaves out what comes to nothing
            for save_id in report.written.keys() - self._writers.keys():
                self._saved(self._saving.pop(save_id))
        for request_id in connector_output.finished_recving or ():
            tokens, refused = self._restoring.pop(request_id, 0), self._refused.pop(request_id, None)
            if not tokens:  # aborted meanwhile
                continue
            if refused:
                self._outcome[request_id] = {"history": refused}
                self._count("sessions_refused", 1)
            else:
                self._count("sessions_restored", 1)
                self._count("session_tokens_reused", tokens)

    def get_kv_connector_stats(self):
        if self._block_pool is None:  # in a worker
            return None
        free = self._block_pool.get_num_free_blocks()
        slots = self._kv_cache_config.num_blocks - 1  # vLLM keeps one block for itself
        stats, self._stats = self._stats, DeltaMemStats()
        stats.data |= {"slots_used": slots - free, "slots_free": free}
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data=None):
        return DeltaMemStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        return DeltaMemPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _complete(self, request, computed: int) -> bool:
        """Whether a request leaves a memory to save: not one whose client has gone."""
        if request.status == RequestStatus.FINISHED_ABORTED:
            # steps under way must not have merged: a memory is taken back to known tokens inside a segment only
            segment = self._plan.layout.segment
            merged = request.num_computed_tokens // segment != computed // segment
            return not merged and stopstring.ended(request, self._vllm_config.model_config)
        return request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)

    def _announce(self, turn: Turn) -> None:
        """Have other processes wait for the save of a turn that is over."""
        try:
            self.store.expect(turn.tenant, turn.name, turn.save_id)
        except SessionRefused as refused:
            logger.warning("deltamem: %s", refused)

    def _saved(self, save: Transfer) -> None:
        """Every worker is done with a save."""
        if self.store.directory is None:
            session = save.turn.tenant, save.turn.name
            self._notes.pop(session, None)
            self._notes[session] = self._note(save.turn.save_id, save.tokens, save.n_earlier)
            if len(self._notes) > self.store.settings.max_sessions:
                del self._notes[next(iter(self._notes))]

    def _over(self, turn: Turn) -> None:
        """A turn ends that is not saved."""
        if self.store.directory is None:
            self._step.ended.append(turn)
        else:
            end(self.store, turn)

    def _last_save(self, tenant: str, name: str) -> Note | None:
        """The last save of a session. The directory tells; host memory is the worker's, so notes are kept.

        A note may outlive its session: the worker then reports that it could not load it. Raises SessionRefused.
        """
        if self.store.directory is None:
            return self._notes.get((tenant, name))
        session = self.store.peek(tenant, name)
        return session and self._note(session.header.save_id, session.tokens, session.header.n_earlier)

    def _unwritten(self, tenant: str, name: str) -> Note | None:
        """The last save of a session, as long as our workers are writing it. Raises SessionRefused."""
        for save in reversed(self._saving.values()):
            turn = save.turn
            if (turn.tenant, turn.name) == (tenant, name):
                erased = self.store.directory is not None and not self.store.holds(tenant, name, turn.save_id)
                return None if erased else self._note(turn.save_id, save.tokens, save.n_earlier)
        return None

    def _note(self, save_id: str, tokens: Sequence[int], n_earlier: int) -> Note:
        return Note.of(save_id, tokens, n_earlier, self._plan.layout.segment)

    def _keep(self, request_id: str, done: int, step: StepMetadata) -> None:
        """Have workers keep a memory as it is before the answer's first merge, while host memory has room for it.

        The next prompt may contain the answer otherwise than it was generated: without its reasoning, its tool calls
        written anew. The prompt before the answer it will contain, and this memory can be taken back to.
        """
        if (len(self._kept) + 1) * self._plan.layout.slot_bytes <= self.store.settings.host_bytes:
            self._kept[request_id] = done
            step.kept[request_id] = self._slots[request_id]

    def _branch(self, request_id: str, done: int, step: StepMetadata) -> None:
        """The same for a request without a session, in a slot that is vacant."""
        request, segment = self._unnamed[request_id], self._plan.layout.segment
        if request.num_tokens // segment < done // segment:  # the last token before the segment is not known yet
            return
        slot = self._vacancies.copy(self._vacancy(request, done))
        if slot is not None:
            step.copies[slot] = self._slots[request_id]

    def _vacancy(self, request, computed: int) -> Vacancy:
        return Vacancy(Span.of(request.all_token_ids[:computed], self._plan.layout.segment), _kind(request))

    def _count(self, name: str, amount: float) -> None:
        if amount:
            self._stats.data[name] = self._stats.data.get(name, 0) + amount

    def _count_tokens(self, scheduler_output) -> None:
        """What the step writes, and where it makes room, from positions alone."""
        cached = scheduler_output.scheduled_cached_reqs
        done = {r.req_id: r.num_computed_tokens for r in scheduler_output.scheduled_new_reqs}
        done |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        layout, longest = self._plan.whole, 0
        for request_id, new in scheduler_output.num_scheduled_tokens.items():
            before, after = done[request_id], done[request_id] + new
            longest = max(longest, after)
            self._count("tokens_written", new)
            for name, amount in layout.placed(before, after).items():
                self._count(f"tokens_{name}", amount)
        if longest:
            self._stats.data |= {
                "bytes_per_sequence": self._plan.bytes_per_sequence,
                "full_attention_bytes": layout.shape.full_attention_bytes(longest),
                "longest_sequence_tokens": longest,
            }

    # In a worker

    def register_kv_caches(self, kv_caches):
        SlotPool.serving()  # what it compiles should not keep the first request waiting

    def bind_connector_metadata(self, connector_metadata):
        """Before every forward pass; loads may start after it."""
        super().bind_connector_metadata(connector_metadata)
        for transfer in connector_metadata.saves:  # no merge is due but those of this step, whose tokens are to come
            self._copy(transfer)
            self._copied.add(transfer.request_id)
        pool = SlotPool.serving()
        if pool is not None:
            pool.pin(connector_metadata.pins)
            for request_id, slot in connector_metadata.kept.items():
                self._earlier[request_id] = self.carrier.copy(pool.slab[slot])
            for target, slot in connector_metadata.copies.items():
                pool.copy(slot, target)
        for turn in connector_metadata.begun:
            self.store.begin(turn.tenant, turn.name, turn.save_id)

    def start_load_kv(self, forward_context, **kwargs):
        restores, pool = self._get_connector_metadata().restores, SlotPool.serving()
        for transfer in restores:
            pool.pin({transfer.slot: []})  # those of the sequence before; its own come when it is scheduled
            self.carrier.read(transfer, pool.slab[transfer.slot])

    def wait_for_save(self):
        """After every forward pass, also one that was replayed from a CUDA graph."""
        pool = SlotPool.serving()
        if pool is not None:
            pool.merge_due()
        metadata = self._get_connector_metadata()
        for turn in metadata.ended:
            self.store.end(turn.tenant, turn.name, turn.save_id)
        if metadata.waiting:
            self.carrier.pause(PAUSE_S)
        for read in self.carrier.arrived():
            self._place(read)
        self._report.written.update(write.transfer.turn.save_id for write in self.carrier.written())

    def save(self, transfer: Transfer) -> None:
        """Save a slot between two steps."""
        SlotPool.serving().merge_due()  # a step may be under way whose last token this save counts
        self._copy(transfer)

    def _copy(self, transfer: Transfer) -> None:
        """Copy a slot, to be written."""
        kept = self._earlier.pop(transfer.request_id, None)
        slot = self.carrier.copy(SlotPool.serving().slab[transfer.slot])
        self.carrier.write(Write(transfer, slot, kept if transfer.n_earlier else None))

    def _place(self, read: Read) -> None:
        """Have a slot hold what was read, and report it."""
        transfer, pool = read.transfer, SlotPool.serving()
        pool.forget([transfer.slot])
        try:
            read.place()
            written, asked = (clip(x, transfer.reach.length) for x in (pool.pins_of(transfer.slot), transfer.pins))
            if written != asked:
                raise SessionRefused("other pins", f"session {transfer.turn.name} was read with other pins")
        except SessionRefused as refused:
            logger.warning("deltamem computes a prompt anew: %s", refused)
            self._report.refused[transfer.request_id] = refused.reason
        self._restored.add(transfer.request_id)

    def get_transfer_results(self, finished_req_ids):
        for request_id in finished_req_ids:
            self._earlier.pop(request_id, None)
        results = KVConnectorTransferResults(self._copied, self._restored, set(self._report.refused))
        self._copied, self._restored = set(), set()
        return results

    def build_connector_worker_meta(self):
        report, self._report = self._report, Report({}, Counter())
        return report if report.refused or report.written else None

    def wait_for_layer_load(self, layer_name):
        return

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        return


def _options(params) -> dict:
    """What a request asks of the memory, by the names in options.py; params: vLLM's SamplingParams, or None."""
    return (params and params.extra_args) or {}


def _pins(params) -> list[list[int]]:
    return _options(params).get(PINS, [])


def _kind(request) -> Kind:
    return Kind(_pins(request.sampling_params), request.cache_salt)


def _source(request) -> str | None:
    """The session that a request starts from."""
    options = _options(request.sampling_params)
    return options.get(SOURCE, options.get(SESSION))
