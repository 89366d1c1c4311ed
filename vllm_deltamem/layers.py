"""Of the layers of a model: which attend, which see a sliding window only, their heads, and which have a RoPE."""

FULL, SLIDING = "full_attention", "sliding_attention"
RECURRENT = ("linear_attention", "mamba", "conv")  # layers of hybrid models that keep a state and do not attend
BOTH = "hybrid"  # layers that do
NEITHER = ("mlp", "moe")  # layers of hybrid models that do neither
BEFORE = ("cohere2", "cohere2_moe")  # families whose sliding_window leaves out the query itself
UNROTATED = ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe")  # their sliding layers alone have RoPE


def _kinds(hf_config) -> list[str]:
    """Of every layer."""
    layers, listed = hf_config.num_hidden_layers, ("layer_types", "layers_block_type")
    told = next(filter(None, (getattr(hf_config, name, None) for name in listed)), None)
    usual = SLIDING if getattr(hf_config, "sliding_window", None) else FULL
    return list(told or [usual] * layers)[:layers]


def find_attending(hf_config) -> list[int]:
    """The places in the model of the layers that attend. Elsewhere they are counted by themselves."""
    return [i for i, kind in enumerate(_kinds(hf_config)) if kind not in (*RECURRENT, *NEITHER)]


def count_recurrent(hf_config) -> int:
    """Layers that keep a state, some of which may attend as well."""
    return sum(kind in (*RECURRENT, BOTH) for kind in _kinds(hf_config))


def find_windows(hf_config, max_model_len: int) -> tuple[int | None, ...]:
    """Tokens that a query of each layer that attends sees, itself among them; None where that is all of them.

    Raises ValueError for layers of a kind that is not known, and when every layer slides.
    """
    width, kinds = getattr(hf_config, "sliding_window", None), _kinds(hf_config)
    kinds = [FULL if kinds[i] in ("attention", BOTH) else kinds[i] for i in find_attending(hf_config)]
    layers = len(kinds)
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


def find_heads(
    arch_config, places: list[int], windows: tuple[int | None, ...]
) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Kv heads and their size in full-attention layers, and in sliding ones where theirs are others (Gemma 4).

    arch_config: vLLM's ModelArchitectureConfig. places, windows: of the layers that attend. Raises ValueError when they
    differ among layers of one kind.
    """
    found: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    for place, window in zip(places, windows, strict=True):
        heads = arch_config[place]
        found[window is not None].add((heads.total_num_kv_heads, heads.head_size))
    if max(map(len, found.values())) > 1:
        raise ValueError("--attention-backend deltamem does not support layers of one kind with unequal heads.")
    ((full,), sliding) = found[False], next(iter(found[True]), None)
    return full, None if sliding == full else sliding


def check_windows(planned: tuple[int | None, ...], given: list[int | None], max_model_len: int) -> None:
    """Raise ValueError unless vLLM gave the layers that attend the windows that were planned."""
    if len(given) != len(planned):
        raise ValueError(
            f"--attention-backend deltamem does not support this model: vLLM has {len(given)} layers that attend alike "
            f"where its config tells {len(planned)}."
        )
    for layer, window in enumerate(given):
        expected = planned[layer] or max_model_len
        if min(window or max_model_len, max_model_len) != expected:
            raise ValueError(
                f"--attention-backend deltamem does not support this model: its layer {layer} should see the last "
                f"{expected:,} tokens by its config, but vLLM gives it a window of {window}."
            )


def find_rotated(hf_config) -> tuple[bool, ...]:
    """Whether each layer that attends uses the rotary embedding, if the model has one."""
    kinds, places = _kinds(hf_config), find_attending(hf_config)
    if hf_config.model_type in UNROTATED and SLIDING in kinds:
        return tuple(kinds[i] == SLIDING for i in places)
    if getattr(hf_config, "position_embedding_type", None) == "nope":  # Granite 4
        return (False,) * len(places)
    # Despite its name, of those that have one; Granite's thetas
    listed = getattr(hf_config, "no_rope_layers", None) or getattr(hf_config, "layer_rope_theta", None)
    return tuple(bool(listed[i]) if listed else True for i in places)
