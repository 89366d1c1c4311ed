"""The plugin's KV connector: carries pins to the slots, merges after decoding, saves and restores sessions, counts.

vLLM makes one in the scheduler (connectorscheduler.py) and one in every worker (connectorworker.py); the metadata of a
step goes from the first to the others.
"""

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA

from vllm_deltamem.connectorscheduler import ConnectorScheduler
from vllm_deltamem.connectorworker import ConnectorWorker
from vllm_deltamem.enginestore import open_store
from vllm_deltamem.metrics import DeltaMemPromMetrics, DeltaMemStats
from vllm_deltamem.startup import CONTINUING
from vllm_deltamem.transfers import Transfer


class DeltaMemConnector(KVConnectorBase_V1, SupportsHMA):
    """Has a scheduler's side or a worker's: vLLM calls the methods of the other one nowhere."""

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        parallel = vllm_config.parallel_config
        self._groups = len(kv_cache_config.kv_cache_groups)
        if role == KVConnectorRole.WORKER:
            self.store = open_store(vllm_config, parallel.rank % parallel.tensor_parallel_size)
            self.worker, self.scheduler = ConnectorWorker(self.store), None
        else:
            self.store = open_store(vllm_config, 0)
            self.worker, self.scheduler = None, ConnectorScheduler(vllm_config, self.store, kv_cache_config.num_blocks)

    def shutdown(self):
        if self.worker is not None:
            self.worker.shutdown()
        self.store.sweeper.stop()

    # In the scheduler

    def on_new_request(self, request):
        self.scheduler.arrive(request)

    def bind_kv_cache_manager(self, kv_cache_manager):
        super().bind_kv_cache_manager(kv_cache_manager)
        (slots,) = kv_cache_manager.coordinator.single_type_managers
        self.scheduler.bind(slots, self._kv_transfer_config.get_from_extra_config(CONTINUING, False))

    def get_loaded_kv_cache_group_ids(self, request):
        return tuple(range(self._groups))

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        return self.scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        self.scheduler.claim(request, num_external_tokens)

    def outgrown(self, running):
        return self.scheduler.outgrown(running)

    def most_drafts(self, request):
        return self.scheduler.most_drafts(request)

    def build_connector_meta(self, scheduler_output):
        return self.scheduler.plan_step(scheduler_output)

    def request_finished_all_groups(self, request, block_ids):
        save, said = self.scheduler.finish(request, block_ids[0])
        if save is None:
            return False, said
        if has_kv_transfer_group():  # a worker in this process, which nobody may step again
            get_kv_transfer_group().save(save)
            return False, said
        self.scheduler.save_with_next_step(save)
        return True, said

    def request_finished(self, request, block_ids):
        return self.request_finished_all_groups(request, (block_ids,))

    def reset_cache(self):
        self.scheduler.reset()
        return True

    def update_connector_output(self, connector_output):
        arrived = connector_output.finished_recving or ()
        self.scheduler.hear(connector_output.kv_connector_worker_meta, arrived)

    def get_kv_connector_stats(self):
        return self.scheduler and self.scheduler.stats()  # vLLM asks workers, too

    @classmethod
    def build_kv_connector_stats(cls, data=None):
        return DeltaMemStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        return DeltaMemPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # In a worker

    def register_kv_caches(self, kv_caches):
        self.worker.start()

    def bind_connector_metadata(self, connector_metadata):
        super().bind_connector_metadata(connector_metadata)
        self.worker.begin_step(connector_metadata)

    def start_load_kv(self, forward_context, **kwargs):
        self.worker.restore(self._get_connector_metadata())

    def wait_for_save(self):
        """After every forward pass, also one that was replayed from a CUDA graph."""
        self.worker.end_step(self._get_connector_metadata())

    def save(self, transfer: Transfer) -> None:
        """Save a slot between two steps."""
        self.worker.save(transfer)

    def get_transfer_results(self, finished_req_ids):
        return self.worker.results(finished_req_ids)

    def build_connector_worker_meta(self):
        return self.worker.report()

    def wait_for_layer_load(self, layer_name):
        return

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        return
