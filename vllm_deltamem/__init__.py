"""vllm-deltamem: a fixed-size working memory for every sequence that vLLM serves.

`register` is vLLM's plugin entry point. It makes `--attention-backend deltamem` known and changes nothing
else until that backend is chosen; see startup.py for what happens then.
"""

import logging

__version__ = "0.1.0"

BACKEND = "DELTAMEM"


def register() -> None:
    """Called by vLLM in every process, possibly more than once."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_deltamem.patches import config_hook

    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, "vllm_deltamem.backend.DeltaMemBackend")
        # A spawned worker unpickles the config before it loads plugins: pickle a call that registers first.
        AttentionBackendEnum[BACKEND].__reduce_ex__ = lambda protocol: (restore_backend, ())
    config_hook.apply()
    # vLLM gives handlers to its own loggers only: without them what ours say at INFO is lost.
    ours, theirs = logging.getLogger(__name__), logging.getLogger("vllm")
    ours.handlers, ours.level, ours.propagate = theirs.handlers[:], theirs.level, theirs.propagate


def restore_backend():
    """Unpickle the backend's enum member: register it, and patch this process as the sender's was."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_deltamem.startup import apply_patches

    register()
    apply_patches()
    return AttentionBackendEnum[BACKEND]
