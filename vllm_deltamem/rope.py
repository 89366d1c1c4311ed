"""The model's rotary embedding: tables that can undo it, and positions past the trained context."""

from itertools import product

import torch
from vllm.logger import init_logger

from vllm_deltamem.hfrope import rope_of
from vllm_deltamem.kernels.slot import Rope
from vllm_deltamem.layers import FULL, find_rotated
from vllm_deltamem.memory import Shape

logger = init_logger(__name__)

TRAINED = "deltamem_trained"  # in the text config: tokens of context that the model was made for, once extended
BY_LENGTH = ("dynamic", "longrope")  # rope types of Transformers whose angles depend on how many tokens there are
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


def trained_context(text) -> int:
    """Tokens of context that a model was made for, where extend() has it count further; else 0."""
    return getattr(text, TRAINED, 0)


def _obstacle(text) -> str | None:
    """What keeps positions from being continued, if anything does."""
    ropes = _ropes(text)
    for rope in ropes:
        if rope["rope_type"] not in EXTENDABLE:
            return f"a rotary embedding of type {rope['rope_type']}"
        if rope.get("mrope_section") or rope.get("use_fope"):
            return "a multimodal or Fourier rotary embedding"
    if getattr(text, "dual_chunk_attention_config", None):
        return "dual chunk attention"
    if not ropes or not all(find_rotated(text)):
        return "layers that have no rotary embedding"
    return None


def find_ropes(model_config, shape: Shape, device: torch.device | str) -> list[Rope | None]:
    """Of every layer, the tables of the rope that it uses in the model just loaded, [max_model_len, rotary / 2].

    Scaled ropes (llama3, YaRN) included; their magnitude factor is taken out, as a key keeps it when turned.
    None for layers that have none, and for all when no rope that is known is the loaded model's: keys are then compared
    and merged as they are. In sliding layers, where nothing is merged, it may be another one than theirs.
    Raises ValueError where positions go past the tables, or past the trained ones of such a model.
    """
    text, positions = model_config.hf_text_config, shape.max_model_len
    rotated, trained = find_rotated(text), trained_context(text)
    if not any(rotated[layer] for layer in shape.full_layers):
        return [None] * shape.layers
    if model_config.using_transformers_backend():
        rope = _transformers(model_config, positions)
    else:
        rope = _vllms(text, shape, model_config.dtype)
    if rope is None:
        if trained:
            raise ValueError(
                f"max_model_len {positions} is past the {trained} tokens that the model was made for, and deltamem "
                "found no rotary embedding that it knows: lower --max-model-len."
            )
        if _ropes(text):
            logger.warning("deltamem found no rotary embedding it knows: merging compares rotated keys.")
    elif len(rope.cos) < positions:
        raise ValueError(
            f"max_model_len {positions} is past the {len(rope.cos)} positions of the model's rotary embedding: "
            "lower it."
        )
    rope = rope and Rope(rope.cos.to(device), rope.sin.to(device), rope.interleaved, trained)
    return [rope if has else None for has in rotated]


def _ropes(text) -> list[dict]:
    """The parameters of every rope that a config tells."""
    from vllm.transformers_utils.config import iter_rope_parameters

    return list(iter_rope_parameters(text))


def _vllms(text, shape: Shape, dtype: torch.dtype) -> Rope | None:
    """Of the ropes that vLLM has made, the one of a config's full-attention layers."""
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT, get_rope

    parameters = getattr(text, "rope_parameters", None) or {}
    parameters = parameters.get(FULL, parameters)
    if listed := getattr(text, "layer_rope_theta", None):  # Granite's, 0 for layers without
        thetas = {listed[layer] for layer in shape.full_layers} - {0}
        if len(thetas) > 1:
            return None
        parameters = parameters | {"rope_theta": thetas.pop()}
    # As long as the config says; PLaMo 3's is no longer than what is served.
    lengths = dict.fromkeys((getattr(text, "max_position_embeddings", shape.max_model_len), shape.max_model_len))
    made = dict(_ROPE_DICT)
    for longest, neox in product(lengths, (True, False)):
        try:
            with torch.device("cpu"):
                probe = get_rope(shape.head_size, longest, neox, parameters or None, dtype)
        except (ValueError, TypeError):  # some kinds are of one style only; Step 3.5 lists its thetas
            continue
        finally:
            for own in _ROPE_DICT.keys() - made.keys():  # or it would be known to the next call
                del _ROPE_DICT[own]
        if probe in made.values() or any(_alike(probe, rope) for rope in made.values()):
            cos, sin = _table(probe).chunk(2, -1)
            norm = (cos[:1] ** 2 + sin[:1] ** 2).sqrt()
            return Rope((cos / norm).contiguous(), (sin / norm).contiguous(), interleaved=not neox)
    return None


def _alike(probe, rope) -> bool:
    """Whether a rope turns as a probe does: a model may ask for another dtype, and tell less than its config does."""
    if type(rope) is not type(probe) or getattr(rope, "is_neox_style", None) != getattr(probe, "is_neox_style", None):
        return False
    table, other = _table(probe), _table(rope)
    return table.shape == other.shape and torch.allclose(table, other, atol=1e-4)


def _transformers(model_config, positions: int) -> Rope | None:
    """Of a model that vLLM runs with Transformers' own modules."""
    from transformers import MODEL_MAPPING, AutoModel

    text = model_config.hf_text_config
    if type(text) not in MODEL_MAPPING or any(rope["rope_type"] in BY_LENGTH for rope in _ropes(text)):
        return None
    with torch.device("meta"):
        made = AutoModel.from_config(text)
    with torch.device("cpu"):
        embedding = getattr(made, "rotary_emb", None)
        return rope_of(embedding and type(embedding)(text), text, positions, "cpu")


def _table(rope) -> torch.Tensor:
    """What vLLM's rotary embedding reads angles from, cos and sin [P, rotary] fp32; LongRoPE's long or short ones."""
    with torch.device("cpu"):
        if not hasattr(rope, "long_short_cos_sin_cache"):
            return rope._compute_cos_sin_cache().float().cpu()
        which = "long" if rope.use_long_rope else "short"
        scaling = getattr(rope, f"{which}_factor"), getattr(rope, f"{which}_mscale")
        return rope._compute_cos_sin_cache(rope.max_position_embeddings, *scaling).float().cpu()
