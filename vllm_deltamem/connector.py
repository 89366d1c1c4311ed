"""The plugin's KV connector: carries pins to the slots, saves and restores sessions, counts.

vLLM makes one in the scheduler and one in every worker; the metadata of a step goes from the first to the
others. A session is restored before the step that computes its first new token, and saved when its request
has finished: the slot is held back until the save is done. Of several requests on one session each starts
from the last save when it is admitted, and the last to finish is the one that stays.
"""

import hashlib
import json
import uuid
from dataclasses import asdict, dataclass, field

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.metrics import DeltaMemPromMetrics, DeltaMemStats
from vllm_deltamem.options import PINS, SESSION, TENANT
from vllm_deltamem.plan import plan_memory
from vllm_deltamem.pool import SlotPool
from vllm_deltamem.sessions import Fingerprint, SessionRefused, SessionStore
from vllm_deltamem.sessionsettings import SessionSettings

logger = init_logger(__name__)

_stores: dict[Fingerprint, SessionStore] = {}  # scheduler and worker of one process share a store


@dataclass
class Transfer:
    """A session to save from a slot or to restore into it."""

    request_id: str
    slot: int
    tenant: str
    name: str
    save_id: str
    tokens: list[int] = field(default_factory=list)


@dataclass
class StepMetadata(KVConnectorMetadata):
    pins: dict[int, list[list[int]]] = field(default_factory=dict)  # of slots that a sequence just claimed
    restores: list[Transfer] = field(default_factory=list)
    saves: list[Transfer] = field(default_factory=list)


def open_store(vllm_config, rank: int) -> SessionStore:
    """The session store of a worker (or of the scheduler, rank 0). Raises ValueError as SessionStore does."""
    fingerprint = fingerprint_of(vllm_config, rank)
    if fingerprint not in _stores:
        settings = SessionSettings.from_dict(DeltaMemConfig.from_vllm(vllm_config).sessions)
        _stores.clear()
        _stores[fingerprint] = SessionStore(settings, fingerprint)
    return _stores[fingerprint]


def fingerprint_of(vllm_config, rank: int) -> Fingerprint:
    """What must be equal for a saved slot to mean the same."""
    plan, model = plan_memory(vllm_config), vllm_config.model_config
    layout = {**asdict(plan.whole), "shape": str(plan.whole.shape), "merge": plan.merge}
    profile = plan.profile.digest if plan.profile else "none"
    config = model.hf_text_config.to_dict() | {"revision": model.revision}
    return Fingerprint(
        model=f"{model.hf_text_config.model_type}-{_digest({'model': model.model, **config})}",
        profile=profile,
        settings=_digest(layout),
        dtype=str(model.dtype),
        vllm=vllm.__version__,
        tp_size=vllm_config.parallel_config.tensor_parallel_size,
        tp_rank=rank,
    )


def _digest(value: dict) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


class DeltaMemConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        self._plan = plan_memory(vllm_config)
        parallel = vllm_config.parallel_config
        rank = parallel.rank % parallel.tensor_parallel_size if role == KVConnectorRole.WORKER else 0
        self.store = open_store(vllm_config, rank)
        self._requests = {}  # scheduler: running requests by id
        self._matched: dict[str, Transfer] = {}  # scheduler: restores that wait for a slot
        self._step = StepMetadata()  # scheduler: being put together
        self._saving: dict[str, Transfer] = {}  # scheduler: by request, until the save is done
        self._saves: dict[tuple[str, str], Transfer] = {}  # scheduler: what the workers keep in host memory
        self._outcome: dict[str, str] = {}  # scheduler: what became of a request's session, for its response
        self._stats = DeltaMemStats()
        self._saved: set[str] = set()  # worker: requests whose save is done
        self._failed: set[int] = set()  # worker: slots that could not be restored
        self._block_pool = None

    # In the scheduler

    def bind_gpu_block_pool(self, gpu_block_pool):
        self._block_pool = gpu_block_pool

    def get_loaded_kv_cache_group_ids(self, request):
        return tuple(range(len(self._kv_cache_config.kv_cache_groups)))

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        name, tenant = self._session_of(request)
        if name is None or num_computed_tokens or request.request_id in self._matched:
            matched = self._matched.get(request.request_id)
            return (len(matched.tokens), False) if matched and not num_computed_tokens else (0, False)
        if any((tenant, name) == (save.tenant, save.name) for save in self._saving.values()):
            return None, False  # its last turn is still being saved: ask again
        outcome, tokens = "new", []
        try:
            save_id, saved = self._last_save(tenant, name)
            if save_id is not None:
                fits = len(saved) < request.num_tokens and saved == list(request.all_token_ids[: len(saved)])
                outcome, tokens = ("restored", saved) if fits else ("other history", [])
        except SessionRefused as refused:
            outcome = refused.reason
            logger.warning("deltamem computes a prompt anew: %s", refused)
        self._outcome[request.request_id] = outcome
        if not tokens:
            self._count("sessions_refused", outcome != "new")
            return 0, False
        transfer = Transfer(request.request_id, -1, tenant, name, save_id, tokens)
        self._matched[request.request_id] = transfer
        return len(tokens), False

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        transfer = self._matched.pop(request.request_id, None)
        if transfer is not None and num_external_tokens:
            transfer.slot = blocks.get_block_ids()[0][0]
            self._step.restores.append(transfer)
            self._count("sessions_restored", 1)
            self._count("session_tokens_reused", num_external_tokens)

    def build_connector_meta(self, scheduler_output):
        step, self._step = self._step, StepMetadata()
        cached = scheduler_output.scheduled_cached_reqs
        for request in scheduler_output.scheduled_new_reqs:
            self._requests[request.req_id] = request.sampling_params
            step.pins[request.block_ids[0][0]] = self._pins(request.req_id)
            self._count("tokens_pinned", sum(end - first for first, end in self._pins(request.req_id)))
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                step.pins[blocks[0][0]] = self._pins(request_id)
        self._count_tokens(scheduler_output)
        return step

    def request_finished_all_groups(self, request, block_ids):
        self._requests.pop(request.request_id, None)
        self._matched.pop(request.request_id, None)
        outcome = self._outcome.pop(request.request_id, None)
        name, tenant = self._session_of(request)
        completed = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
        computed = min(request.num_computed_tokens, request.num_tokens)
        if name is None or not completed or not block_ids[0] or not computed:
            return False, None
        tokens = list(request.all_token_ids[:computed])
        save = Transfer(request.request_id, block_ids[0][0], tenant, name, uuid.uuid4().hex, tokens)
        self._step.saves.append(save)
        self._saving[request.request_id] = save
        self._count("sessions_saved", 1)
        return True, {"deltamem_session": {"name": name, "history": outcome, "saved_tokens": computed}}

    def request_finished(self, request, block_ids):
        return self.request_finished_all_groups(request, (block_ids,))

    def update_connector_output(self, connector_output):
        for request_id in connector_output.finished_sending or ():
            save = self._saving.pop(request_id, None)
            if save is not None and self.store.directory is None:
                self._saves.pop((save.tenant, save.name), None)
                self._saves[save.tenant, save.name] = save
                if len(self._saves) > self.store.settings.max_sessions:
                    del self._saves[next(iter(self._saves))]

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

    def _last_save(self, tenant: str, name: str) -> tuple[str | None, list[int]]:
        """Save id and tokens of a session. The directory tells; host memory is the worker's, so notes are kept.

        A note may outlive its session: the worker then reports that it could not load it. Raises SessionRefused.
        """
        if self.store.directory is None:
            save = self._saves.get((tenant, name))
            return (save.save_id, save.tokens) if save else (None, [])
        session = self.store.peek(tenant, name)
        return (session.header.save_id, session.tokens.tolist()) if session else (None, [])

    def _session_of(self, request) -> tuple[str | None, str | None]:
        extra = (request.sampling_params and request.sampling_params.extra_args) or {}
        return extra.get(SESSION), extra.get(TENANT)

    def _pins(self, request_id: str) -> list[list[int]]:
        params = self._requests.get(request_id)
        return ((params and params.extra_args) or {}).get(PINS, [])

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
            workers = self._vllm_config.parallel_config.tensor_parallel_size
            self._stats.data |= {
                "bytes_per_sequence": self._plan.layout.slot_bytes * workers,
                "full_attention_bytes": layout.shape.full_attention_bytes(longest),
                "longest_sequence_tokens": longest,
            }

    # In a worker

    def bind_connector_metadata(self, connector_metadata):
        super().bind_connector_metadata(connector_metadata)
        if SlotPool.serving is not None:
            SlotPool.serving.pin(connector_metadata.pins)

    def start_load_kv(self, forward_context, **kwargs):
        for transfer in self._get_connector_metadata().restores:
            row = SlotPool.serving.slab[transfer.slot]
            SlotPool.serving.forget([transfer.slot])
            try:
                staging = row if row.device.type == "cpu" else None
                session = self.store.restore(transfer.tenant, transfer.name, transfer.save_id, out=staging)
                if session is None:
                    raise SessionRefused("erased", f"session {transfer.name} is gone")
                if staging is None:
                    row.copy_(session.slab)
            except SessionRefused as refused:
                logger.warning("deltamem computes a prompt anew: %s", refused)
                self._failed.add(transfer.slot)

    def wait_for_save(self):
        for transfer in self._get_connector_metadata().saves:
            slab = SlotPool.serving.slab[transfer.slot].cpu().contiguous()
            try:
                self.store.save(transfer.tenant, transfer.name, transfer.tokens, slab, transfer.save_id)
            except SessionRefused as refused:
                logger.warning("deltamem could not save a session: %s", refused)
            self._saved.add(transfer.request_id)

    def get_finished(self, finished_req_ids):
        saved, self._saved = self._saved, set()
        return saved or None, None

    def get_block_ids_with_load_errors(self):
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name):
        return

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        return
