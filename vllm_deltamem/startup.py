"""What happens at start-up once the backend is chosen: checks, adjustments of vLLM's config, patches."""

import os
from pathlib import Path

from vllm.config import KVTransferConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_deltamem import BACKEND, register
from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.layers import count_recurrent
from vllm_deltamem.plan import plan_memory
from vllm_deltamem.precision import fast_dtype
from vllm_deltamem.rope import extend
from vllm_deltamem.seal import Seal
from vllm_deltamem.sessiondirectory import SessionDirectory
from vllm_deltamem.sessionsettings import SessionSettings

logger = init_logger(__name__)

KNOWN_VLLM = ("0.32.",)
CONNECTOR = "DeltaMemConnector"
CONTINUING = "continuing"  # whether prompts may go on in slots that others have left
WORKER_EXTENSION = "vllm_deltamem.worker.SessionWorker"
EXPANDING = "expandable_segments:True"  # of PyTorch's allocator: memory of the cache may be mapped anew


def is_chosen(vllm_config) -> bool:
    """Whether any layers of this config use the backend."""
    attention = vllm_config.attention_config
    return any(b is not None and b.name == BACKEND for b in (attention.backend, *attention.backend_per_kind.values()))


def engine_config(model: str, **options):
    """vLLM's config of a model with the backend chosen, checked and adjusted; options as for vLLM's EngineArgs.

    Media are left out of it. Raises ValueError as configure() does, and what vLLM raises.
    """
    from vllm.engine.arg_utils import EngineArgs

    register()
    args = EngineArgs(model=model, attention_backend=BACKEND, language_model_only=True, **options)
    return args.create_engine_config()


def configure(vllm_config) -> None:
    """Check a config that chose the backend and adjust it. check_sizes() follows.

    Raises ValueError for an unsupported model or feature of vLLM, an unknown or contradictory setting, or a profile of
    another model.
    """
    if vllm_config.model_config is None or not is_chosen(vllm_config):
        return
    check_version()
    settings = DeltaMemConfig.from_vllm(vllm_config)
    _refuse_unsupported(vllm_config)
    continuing = _continues(vllm_config)
    if vllm_config.cache_config.enable_prefix_caching:
        recurrent = count_recurrent(vllm_config.model_config.hf_text_config)
        logger.warning(
            "deltamem keeps one memory per sequence, so vLLM's prefix caching is off: a prompt that continues an "
            "earlier request goes on in its slot%s (--no-enable-prefix-caching turns that off, too).",
            "" if recurrent else ", one that begins as others did goes on in a copy of theirs",
        )
        vllm_config.cache_config.enable_prefix_caching = False
    dtype = vllm_config.model_config.dtype
    if fast_dtype(dtype, current_platform.device_type) != dtype:
        logger.warning(
            "This CPU has no instructions for bfloat16: --dtype float32 reads prompts several times faster, in twice "
            "the memory."
        )
    layout = plan_memory(vllm_config, settings).layout
    drafted = vllm_config.num_speculative_tokens
    if drafted > layout.segment - 2:
        raise ValueError(
            f"deltamem: a segment of {layout.segment} tokens has no room for {drafted} that are drafted beyond those "
            "that are known: lower num_speculative_tokens, or raise the setting 'segment'."
        )
    extend(vllm_config.model_config, layout.window + 2 * layout.segment)
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path="vllm_deltamem.connector",
        kv_role="kv_producer",  # vLLM takes a consumer's slots back once no step is under way
        kv_connector_extra_config={CONTINUING: continuing},
        kv_load_failure_policy="recompute",
    )
    vllm_config.parallel_config.worker_extension_cls = WORKER_EXTENSION
    apply_patches()


def check_sizes(vllm_config) -> None:
    """Once vLLM has settled the dtypes of states: raise ValueError for a memory too small for them, or sessions that
    have no place for it or a key or directory that cannot hold them.
    """
    if vllm_config.model_config is not None and is_chosen(vllm_config):
        settings, plan = DeltaMemConfig.from_vllm(vllm_config), plan_memory(vllm_config)
        _check_sessions(SessionSettings.from_dict(settings.sessions, plan.bytes_per_sequence))


def check_version() -> None:
    """Raise ValueError for a vLLM whose internals this version of the plugin does not know."""
    import vllm

    if not vllm.__version__.startswith(KNOWN_VLLM):
        raise ValueError(
            f"vllm-deltamem knows vLLM {', '.join(v + 'x' for v in KNOWN_VLLM)}, this is {vllm.__version__}. "
            "Install that vLLM, or a vllm-deltamem made for this one."
        )


def apply_patches() -> None:
    """Apply what no extension point of vLLM offers, see patches/README.md. In every process, idempotent."""
    from vllm_deltamem.patches import (
        draft_lengths,
        http_tenant,
        hybrid_states,
        outgrown_parts,
        profiling_cache,
        request_options,
    )

    check_version()
    profiling_cache.apply()
    hybrid_states.apply()
    outgrown_parts.apply()
    draft_lengths.apply()
    request_options.apply()
    http_tenant.apply()
    if current_platform.is_cpu():
        from vllm_deltamem.patches import cpu_compiling, cpu_numba, cpu_platform, cpu_products, ray_cpu

        cpu_compiling.apply()
        cpu_numba.apply()
        cpu_platform.apply()
        cpu_products.apply()
        ray_cpu.apply()


def _refuse_unsupported(vllm_config) -> None:
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    hf, drafting = model.hf_text_config, getattr(vllm_config.speculative_config, "method", None)
    refusals = {
        "multi-head latent attention (MLA) models": model.use_mla,
        "attention-free models": model.is_attention_free,
        "encoder-decoder models": model.is_encoder_decoder,
        "soft-capped attention logits": bool(getattr(hf, "attn_logit_softcapping", None)),
        "ALiBi": hf.model_type in ("bloom", "step1") or getattr(hf, "alibi", False),
        "layers that share a KV cache": bool(getattr(hf, "num_kv_shared_layers", 0)),
        "prompts that are read in both directions": hf.model_type == "hrm_text",
        "images that are read in both directions (--language-model-only serves text)": model.is_mm_prefix_lm,
        "MiniCPM3 and MiMo-V2, whose configs do not tell the sizes of their heads": hf.model_type.startswith(
            ("minicpm3", "mimo_v2")
        ),
        "layers with unequal numbers of query heads": _has_unequal_queries(hf),
        "layers of several blocks or none (block_configs)": bool(getattr(hf, "block_configs", None)),
        "pooling models": model.runner_type == "pooling",
        f"speculative decoding by {drafting} (--speculative-config; ngram is supported)": drafting
        not in (None, "ngram"),  # which takes no model, and plans one step at a time
        "speculative decoding (--speculative-config) with recurrent layers": drafting and count_recurrent(hf),
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "batches in halves (--enable-dbo, --ubatch-size)": parallel.use_ubatching,
        "--worker-extension-cls (its own reaches the sessions)": parallel.worker_extension_cls
        not in ("", WORKER_EXTENSION),
        "--kv-transfer-config (its own connector carries sessions)": _foreign_connector(vllm_config),
        "--kv-offloading-size (see the setting 'sessions')": cache.kv_offloading_size is not None,
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True without --enable-cumem-allocator (nor does vLLM beside any "
        "KV connector, as is what carries sessions)": EXPANDING in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
        and not model.enable_cumem_allocator,
        f"--kv-cache-dtype {cache.cache_dtype} (see the setting 'fidelity')": cache.cache_dtype
        not in ("auto", str(model.dtype).removeprefix("torch.")),
    }
    for feature, present in refusals.items():
        if present:
            raise ValueError(f"--attention-backend deltamem does not support {feature}.")


def _has_unequal_queries(hf) -> bool:
    """Laguna and Step 3.5 tell so."""
    counts = set(getattr(hf, "num_attention_heads_per_layer", None) or ())
    return len(counts) > 1 or bool(getattr(hf, "attention_other_setting", None))


def _continues(vllm_config) -> bool:
    """Whether the user has left prefix caching on; a config that is made again from an adjusted one still says so."""
    transfer = vllm_config.kv_transfer_config
    adjusted = transfer is not None and transfer.get_from_extra_config(CONTINUING, False)
    return bool(vllm_config.cache_config.enable_prefix_caching) or adjusted


def _check_sessions(settings: SessionSettings) -> None:
    """Raise ValueError here, not in the engine, for a bad key or directory. Makes no directory: the engine does."""
    Seal.of(settings)
    if settings.directory is None:
        return
    if os.path.lexists(settings.directory):
        SessionDirectory.of(settings)
        return
    parent = next(p for p in Path(settings.directory).absolute().parents if os.path.lexists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"sessions: cannot make the directory {settings.directory}: {parent} is no folder to write in")


def _foreign_connector(vllm_config) -> bool:
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector not in (None, CONNECTOR)
