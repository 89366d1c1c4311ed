"""What the API server may ask of every worker's session store, over vLLM's collective_rpc."""

from vllm.distributed.kv_transfer import get_kv_transfer_group


class SessionWorker:
    """vLLM's worker_extension_cls: its methods become the worker's. They raise what SessionStore raises."""

    def deltamem_list(self, tenant: str) -> list[dict]:
        """See SessionStore.summaries."""
        return get_kv_transfer_group().store.summaries(tenant)

    def deltamem_erase(self, tenant: str, name: str) -> bool:
        """Erase a session, its copy in this worker's host memory included; False if there was none."""
        return get_kv_transfer_group().store.erase(tenant, name)
