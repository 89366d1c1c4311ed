"""Has CUDA graphs profiled with a cache of one slot, where vLLM makes one of a block for every sequence."""

from functools import wraps


def apply() -> None:
    """Wrap may_override_num_blocks, which names the blocks of a cache that no memory is set aside for."""
    from vllm.v1.core import kv_cache_utils

    original = kv_cache_utils.may_override_num_blocks
    if hasattr(original, "deltamem"):
        return

    @wraps(original)
    def may_override_num_blocks(vllm_config, num_blocks):
        from vllm_deltamem.plan import plan_memory
        from vllm_deltamem.startup import is_chosen

        blocks = original(vllm_config, num_blocks)
        if num_blocks == 0 and is_chosen(vllm_config):  # and vLLM's null block, which the rows of a capture hold
            return min(blocks, plan_memory(vllm_config).parts + 1)
        return blocks

    may_override_num_blocks.deltamem = True
    kv_cache_utils.may_override_num_blocks = may_override_num_blocks
