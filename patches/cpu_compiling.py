"""Has a model that was compiled for the CPU before come from a cache, so that the next start is a short one."""

import os


def apply() -> None:
    """Set VLLM_USE_AOT_COMPILE=0 unless the user has set it: what it saves on a CPU, vLLM cannot load again."""
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
