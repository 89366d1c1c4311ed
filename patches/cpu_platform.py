"""Lets the CPU platform use the backend, which it otherwise replaces by CPU_ATTN."""

from functools import wraps


def apply() -> None:
    """Wrap CpuPlatform.get_attn_backend_cls."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.get_attn_backend_cls.__func__
    if hasattr(original, "deltamem"):
        return

    @wraps(original)
    def get_attn_backend_cls(cls, selected_backend, *args, **kwargs):
        if selected_backend is not None and selected_backend.name == "DELTAMEM":
            return selected_backend.get_path()
        return original(cls, selected_backend, *args, **kwargs)

    get_attn_backend_cls.deltamem = True
    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
