"""Has the states of recurrent layers lie in the blocks of the slots, where vLLM gives them blocks of their own."""

from functools import wraps


def apply() -> None:
    """Wrap get_kv_cache_groups, which shares blocks out among layers by their specs, and who asks for such blocks."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import KVCacheConfig, iter_layer_specs

    grouped, has_states = kv_cache_utils.get_kv_cache_groups, KVCacheConfig.has_mamba_layers
    if hasattr(grouped, "deltamem"):
        return

    @wraps(grouped)
    def get_kv_cache_groups(vllm_config, kv_cache_spec):
        from vllm_deltamem.spec import place_states
        from vllm_deltamem.startup import is_chosen

        return grouped(vllm_config, place_states(kv_cache_spec) if is_chosen(vllm_config) else kv_cache_spec)

    def has_mamba_layers(self) -> bool:
        """Whether blocks must be as many as sequences of a CUDA graph, and cleared by vLLM before they are used."""
        from vllm_deltamem.spec import StateSpec

        specs = [spec for group in self.kv_cache_groups for spec in iter_layer_specs(group.kv_cache_spec)]
        return has_states.fget(self) and not any(isinstance(spec, StateSpec) for spec in specs)

    get_kv_cache_groups.deltamem = True
    kv_cache_utils.get_kv_cache_groups = get_kv_cache_groups
    KVCacheConfig.has_mamba_layers = property(has_mamba_layers)
