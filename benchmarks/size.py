"""How many bytes a sequence holds, worked out as the backend does at start-up."""

from pathlib import Path

from transformers import AutoConfig

from vllm_deltamem import profile as profiles
from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.layers import find_windows
from vllm_deltamem.memory import Layout, Shape


def shape_of(model: Path, length: int) -> Shape:
    """The attention of a model folder, for sequences of up to `length` tokens."""
    config = AutoConfig.from_pretrained(model)
    known, text = profiles.fingerprint_of(config), config.get_text_config()
    windows = find_windows(text, length)
    return Shape(known["layers"], known["kv_heads"], known["head_size"], text.dtype, length, windows)


def layout_of(model: Path, length: int, settings: dict) -> Layout:
    """The slot under deltamem settings. Raises ValueError where they do not fit the model."""
    config = DeltaMemConfig(**settings)
    profile = profiles.choose(config.profile, AutoConfig.from_pretrained(model))
    return profiles.divide(shape_of(model, length), config, profile)
