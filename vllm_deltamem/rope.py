"""The model's rotary embedding: tables that can undo it, and positions past the trained context."""

import torch
from vllm.logger import init_logger

from vllm_deltamem.kernels.slot import Rope
from vllm_deltamem.windows import is_unrotated

logger = init_logger(__name__)

TRAINED = "deltamem_trained"  # in the text config: tokens of context that the model was made for, once extended
EXTENDABLE = ("default", "llama3")  # rope types whose angles do not depend on how many positions there are


def extend(model_config, least: int) -> None:
    """Let the model count to a max_model_len past the context that it was made for.

    vLLM makes a model's rotary tables as long as the config says: the config gets the new length, and keeps the
    old one, from which on distances stand still (kernels/README.md, 7). least: tokens that it must have.

    Raises ValueError for a model whose positions cannot be continued.
    """
    text, wanted = model_config.hf_text_config, model_config.max_model_len
    if wanted <= getattr(text, "max_position_embeddings", wanted):
        return
    trained = model_config.get_and_verify_max_len(None)
    if wanted <= trained:  # the rope's own scaling goes that far
        return
    obstacle = _obstacle(text) or (trained < least and f"a window and segments of {least} tokens")
    if obstacle:
        raise ValueError(
            f"max_model_len {wanted} is past the {trained} tokens that the model was made for, and deltamem cannot "
            f"continue them with {obstacle}: lower --max-model-len."
        )
    setattr(text, TRAINED, trained)
    text.max_position_embeddings = wanted
    logger.info(
        "deltamem: past the %s tokens that the model was made for, what lies farther back is attended from there.",
        f"{trained:,}",
    )


def _obstacle(text) -> str | None:
    """What keeps positions from being continued, if anything does."""
    from vllm.transformers_utils.config import iter_rope_parameters

    ropes = list(iter_rope_parameters(text))
    for rope in ropes:
        if rope["rope_type"] not in EXTENDABLE:
            return f"a rotary embedding of type {rope['rope_type']}"
        if rope.get("mrope_section") or rope.get("use_fope"):
            return "a multimodal or Fourier rotary embedding"
    if getattr(text, "dual_chunk_attention_config", None):
        return "dual chunk attention"
    if not ropes or 0 in (getattr(text, "no_rope_layers", None) or ()) or is_unrotated(text):
        return "layers that have no rotary embedding"
    return None


def find_rope(hf_config, head_size: int, dtype: torch.dtype, positions: int) -> Rope | None:
    """Tables of the rope that the model just loaded uses in its full-attention layers, [positions, rotary / 2].

    Scaled ropes (llama3, YaRN) included; their magnitude factor is taken out, as a key keeps it when turned.
    None when those layers have none, or when no rope of the loaded model fits: keys are then compared and merged as
    they are.
    Raises ValueError where positions go past the tables, or past the trained ones of such a model.
    """
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT, get_rope

    if is_unrotated(hf_config):
        return None
    trained = getattr(hf_config, TRAINED, 0)
    parameters = getattr(hf_config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    loaded, known = set(_ROPE_DICT), {id(rope) for rope in _ROPE_DICT.values()}
    longest = getattr(hf_config, "max_position_embeddings", positions)
    for neox in (True, False):
        try:
            with torch.device("cpu"):
                rope = get_rope(head_size, longest, neox, parameters or None, dtype)
        except ValueError:  # some kinds are of one style only
            continue
        finally:
            for made in _ROPE_DICT.keys() - loaded:  # or it would be known to the next call
                del _ROPE_DICT[made]
        if id(rope) in known:
            break
    else:
        if trained:
            raise ValueError(
                f"max_model_len {positions} is past the {trained} tokens that the model was made for, and deltamem "
                "found no rotary embedding that it knows: lower --max-model-len."
            )
        logger.warning("deltamem found no rotary embedding it knows: merging compares rotated keys.")
        return None
    with torch.device("cpu"):
        cos, sin = _table(rope).float().cpu().chunk(2, -1)
    norm = (cos[:1] ** 2 + sin[:1] ** 2).sqrt()
    if len(cos) < positions:
        raise ValueError(
            f"max_model_len {positions} is past the {len(cos)} positions of the model's rotary embedding: lower it."
        )
    return Rope((cos / norm).contiguous(), (sin / norm).contiguous(), interleaved=not neox, trained=trained)


def _table(rope) -> torch.Tensor:
    """What vLLM's rotary embedding reads angles from; LongRoPE's long or short one, as it does."""
    if not hasattr(rope, "long_short_cos_sin_cache"):
        return rope._compute_cos_sin_cache()
    which = "long" if rope.use_long_rope else "short"
    scaling = getattr(rope, f"{which}_factor"), getattr(rope, f"{which}_mscale")
    return rope._compute_cos_sin_cache(rope.max_position_embeddings, *scaling)
