"""The session store of one process of vLLM's."""

import hashlib
import json
from dataclasses import asdict

import vllm

from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.kernels.slot import STATE
from vllm_deltamem.plan import plan_memory
from vllm_deltamem.sessions import Fingerprint, SessionStore
from vllm_deltamem.sessionsettings import SessionSettings
from vllm_deltamem.weights import weights_digest

# scheduler and worker of one process share a store
_stores: dict[tuple[Fingerprint, SessionSettings], SessionStore] = {}


def open_store(vllm_config, rank: int) -> SessionStore:
    """The session store of a worker (or of the scheduler, rank 0). Raises ValueError as SessionStore does."""
    fingerprint, memory_bytes = fingerprint_of(vllm_config, rank), plan_memory(vllm_config).worker_bytes
    settings = SessionSettings.from_dict(DeltaMemConfig.from_vllm(vllm_config).sessions, memory_bytes)
    if (fingerprint, settings) not in _stores:
        _stores.clear()
        _stores[fingerprint, settings] = SessionStore(settings, fingerprint)
    return _stores[fingerprint, settings]


def fingerprint_of(vllm_config, rank: int) -> Fingerprint:
    """What must be equal for a saved slot to mean the same."""
    plan, model = plan_memory(vllm_config), vllm_config.model_config
    layout = {**asdict(plan.whole), "shape": str(plan.whole.shape), "merge": plan.merge}
    if plan.part:
        layout["part"] = [plan.part.cells, plan.block_bytes]
    if plan.whole.shape.state_bytes:
        cache = vllm_config.cache_config
        layout["states"] = [plan.whole.shape.state_bytes, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype]
    profile = plan.profile.digest if plan.profile else "none"
    config = model.hf_text_config.to_dict() | {"revision": model.revision, "quantization": model.quantization}
    config |= {"commit": getattr(model.hf_config, "_commit_hash", None), "weights": weights_digest(model.model)}
    return Fingerprint(
        model=f"{model.hf_text_config.model_type}-{_digest({'model': model.model, **config})}",
        profile=profile,
        settings=_digest(layout),
        state=str(STATE),
        dtype=str(model.dtype),
        vllm=vllm.__version__,
        tp_size=vllm_config.parallel_config.tensor_parallel_size,
        tp_rank=rank,
    )


def _digest(value: dict) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
