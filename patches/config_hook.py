"""Lets the plugin see the finished arguments before vLLM derives anything from them."""

from functools import wraps


def apply() -> None:
    """Wrap VllmConfig.try_verify_and_update_config, the first thing its __post_init__ calls on the model."""
    from vllm.config import VllmConfig

    original = VllmConfig.try_verify_and_update_config
    if hasattr(original, "deltamem"):
        return

    @wraps(original)
    def verify(self):
        from vllm_deltamem.startup import configure

        configure(self)
        return original(self)

    verify.deltamem = True
    VllmConfig.try_verify_and_update_config = verify
