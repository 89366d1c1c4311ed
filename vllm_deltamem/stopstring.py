"""Answers that a stop string ends: vLLM's frontend, which alone has their text, aborts such a request in the engine."""

from vllm.tokenizers import cached_tokenizer_from_config


def ended(request, model_config) -> bool:
    """Whether the text of an aborted request contains one of its stop strings: else its client has gone."""
    params, answer = request.sampling_params, list(request.output_token_ids)
    if params is None or not params.stop or not answer:
        return False
    tokenizer = cached_tokenizer_from_config(model_config)  # loaded at start, for structured output
    if tokenizer is None:
        return False
    text = tokenizer.decode(answer, skip_special_tokens=params.skip_special_tokens)
    return any(stop in text for stop in params.stop)
