"""Which layers of a model see a sliding window only, and how wide it is."""

from vllm.model_executor.models.utils import extract_layer_index

FULL, SLIDING = "full_attention", "sliding_attention"
INCLUSIVE = ("cohere2", "cohere2_moe")  # families that count the tokens before the query


def find_windows(hf_config, max_model_len: int) -> tuple[int | None, ...]:
    """Tokens that a query of each layer sees, itself among them; None where that is all of them.

    Raises ValueError for layers of a third kind, and when every layer slides.
    """
    layers, width = hf_config.num_hidden_layers, getattr(hf_config, "sliding_window", None)
    kinds = getattr(hf_config, "layer_types", None) or [SLIDING if width else FULL] * layers
    kinds = kinds[:layers]
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise ValueError(f"--attention-backend deltamem does not support layers of the kind {kind!r}.")
    if width is None or SLIDING not in kinds:
        return (None,) * layers
    width += hf_config.model_type in INCLUSIVE
    if FULL in kinds:
        return tuple(min(width, max_model_len) if kind == SLIDING else None for kind in kinds)
    if width >= max_model_len:
        return (None,) * layers  # no window ever slides
    raise ValueError(
        f"Every layer of this model sees the last {width} tokens only: there is nothing that --attention-backend "
        "deltamem could compress. Serve it with another backend."
    )


def check_windows(windows: tuple[int | None, ...], attention: dict, max_model_len: int) -> None:
    """Raise ValueError unless vLLM's attention layers, by name, have the windows that were planned."""
    for name, layer in attention.items():
        planned = windows[extract_layer_index(name)] or max_model_len
        if min(layer.sliding_window or max_model_len, max_model_len) != planned:
            raise ValueError(
                f"--attention-backend deltamem does not support this model: its config says that {name} sees "
                f"{planned} tokens, but vLLM made it with a window of {layer.sliding_window}."
            )
