"""Of the layers of a model: which see a sliding window only, how wide it is, their heads, and which have a RoPE."""

FULL, SLIDING = "full_attention", "sliding_attention"
BEFORE = ("cohere2", "cohere2_moe")  # families whose sliding_window leaves out the query itself
UNROTATED = ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe")  # their sliding layers alone have RoPE


def find_windows(hf_config, max_model_len: int) -> tuple[int | None, ...]:
    """Tokens that a query of each layer sees, itself among them; None where that is all of them.

    Raises ValueError for layers of a third kind, and when every layer slides.
    """
    layers, width = hf_config.num_hidden_layers, getattr(hf_config, "sliding_window", None)
    kinds = getattr(hf_config, "layer_types", None) or [SLIDING if width else FULL] * layers
    kinds = kinds[:layers]
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise ValueError(f"--attention-backend deltamem does not support layers of {kind.replace('_', ' ')}.")
    if width is None or SLIDING not in kinds:
        return (None,) * layers
    width += hf_config.model_type in BEFORE
    if FULL in kinds:
        return tuple(min(width, max_model_len) if kind == SLIDING else None for kind in kinds)
    if width >= max_model_len:
        return (None,) * layers  # no window ever slides
    raise ValueError(
        f"Every layer of this model sees the last {width:,} tokens only: --attention-backend deltamem has nothing to "
        "compress. Serve it with another backend."
    )


def find_heads(arch_config, windows: tuple[int | None, ...]) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Kv heads and their size in full-attention layers, and in sliding ones where theirs are others (Gemma 4).

    arch_config: vLLM's ModelArchitectureConfig. Raises ValueError when they differ among layers of one kind.
    """
    found: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    for layer, window in enumerate(windows):
        heads = arch_config[layer]
        found[window is not None].add((heads.total_num_kv_heads, heads.head_size))
    if max(map(len, found.values())) > 1:
        raise ValueError("--attention-backend deltamem does not support layers of one kind with unequal heads.")
    ((full,), sliding) = found[False], next(iter(found[True]), None)
    return full, None if sliding == full else sliding


def check_windows(planned: tuple[int | None, ...], given: dict[int, int | None], max_model_len: int) -> None:
    """Raise ValueError unless vLLM gave the layers, by their place in the model, the windows that were planned."""
    if given.keys() != set(range(len(planned))):
        raise ValueError(
            f"--attention-backend deltamem does not support this model: vLLM has {len(given)} layers that attend alike "
            f"where its config tells {len(planned)}."
        )
    for layer, window in given.items():
        expected = planned[layer] or max_model_len
        if min(window or max_model_len, max_model_len) != expected:
            raise ValueError(
                f"--attention-backend deltamem does not support this model: its layer {layer} should see the last "
                f"{expected:,} tokens by its config, but vLLM gives it a window of {window}."
            )


def find_rotated(hf_config) -> tuple[bool, ...]:
    """Whether each layer of a model that has a rotary embedding uses it."""
    layers, kinds = hf_config.num_hidden_layers, getattr(hf_config, "layer_types", None) or ()
    if hf_config.model_type in UNROTATED and SLIDING in kinds:
        return tuple(kind == SLIDING for kind in kinds[:layers])
    # Despite its name, of those that have one; Granite's thetas
    listed = getattr(hf_config, "no_rope_layers", None) or getattr(hf_config, "layer_rope_theta", None) or ()
    return tuple(bool(has) for has in listed[:layers]) or (True,) * layers
