"""The model's rotary embedding, as tables that can undo it."""

import torch
from vllm.logger import init_logger

from vllm_deltamem.kernels.slot import Rope
from vllm_deltamem.windows import SLIDING

logger = init_logger(__name__)

UNROTATED = ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe")  # their sliding layers alone have RoPE


def find_rope(hf_config, head_size: int, dtype: torch.dtype, positions: int) -> Rope | None:
    """Tables of the rope that the model just loaded uses in its full-attention layers, [positions, rotary / 2].

    Scaled ropes (llama3, YaRN) included; their magnitude factor is taken out, as a key keeps it when turned.
    None when those layers have none, or when no rope of the loaded model fits: keys are then compared and merged as
    they are.
    """
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT, get_rope

    if hf_config.model_type in UNROTATED and SLIDING in (getattr(hf_config, "layer_types", None) or ()):
        return None
    parameters = getattr(hf_config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    known = {id(rope) for rope in _ROPE_DICT.values()}
    for neox in (True, False):
        rope = get_rope(head_size, hf_config.max_position_embeddings, neox, parameters or None, dtype)
        if id(rope) in known:
            break
    else:
        logger.warning("deltamem found no rotary embedding it knows: merging compares rotated keys.")
        return None
    cos, sin = rope._compute_cos_sin_cache().float().cpu().chunk(2, -1)
    norm = (cos[:1] ** 2 + sin[:1] ** 2).sqrt()
    if len(cos) < positions:
        raise ValueError(
            f"max_model_len {positions} is past the {len(cos)} positions of the model's rotary embedding: lower it, "
            "or raise max_position_embeddings with --hf-overrides."
        )
    return Rope((cos / norm).contiguous(), (sin / norm).contiguous(), interleaved=not neox)
