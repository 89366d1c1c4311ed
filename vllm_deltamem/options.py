"""What one request asks of the memory: `vllm_xargs` over HTTP, `SamplingParams.extra_args` offline.

    deltamem_pin            text, or a list of texts, that the prompt contains: every occurrence is pinned
    deltamem_pin_tokens     [first, end, first, end, ...], ranges of prompt positions
    deltamem_session        name under which the memory is kept after the request and found before it
    deltamem_session_from   name under which it is found instead: that session stays as it is

They are checked where the request enters, so that a malformed one fails alone; the engine gets `PINS`,
`SESSION`, `SOURCE` and `TENANT` below, already resolved.
"""

from collections.abc import Collection, Iterator
from contextvars import ContextVar

from tokenizers.decoders import DecodeStream
from transformers import TokenizersBackend
from vllm.tokenizers.detokenizer_utils import detokenize_incrementally

from vllm_deltamem.memory import MAX_PINS
from vllm_deltamem.sessionname import check_name, tenant_of

PINS, TENANT = "deltamem_pins", "deltamem_tenant"
SESSIONS = SESSION, SOURCE = "deltamem_session", "deltamem_session_from"
CLIENT_OPTIONS = ("deltamem_pin", "deltamem_pin_tokens", *SESSIONS)

NOBODY = tenant_of(None)
tenant: ContextVar[str] = ContextVar("deltamem_tenant", default=NOBODY)  # of the HTTP request at hand


def resolve(extra_args: dict | None, prompt: list[int] | None, tokenizer, quota: int) -> dict | None:
    """The extra_args with the client's options replaced by what the engine reads.

    prompt: token ids, None of embeddings. quota: tokens that a client may pin. Raises ValueError for an option that is
    unknown or malformed, pins in embeddings, text that the prompt does not contain, and pins over the quota.
    """
    if not extra_args or not any(name.startswith("deltamem") for name in extra_args):
        return extra_args
    options = {name: value for name, value in extra_args.items() if name.startswith("deltamem")}
    for name in options:
        if name not in CLIENT_OPTIONS:
            raise ValueError(f"Unknown option {name!r}; deltamem knows {', '.join(CLIENT_OPTIONS)}.")
    if prompt is None and options.keys() - SESSIONS:
        raise ValueError("deltamem_pin and deltamem_pin_tokens do not go with a prompt of embeddings.")
    resolved = {name: value for name, value in extra_args.items() if name not in options}
    spans = _token_ranges(options.get("deltamem_pin_tokens", []), len(prompt or ()))
    texts = options.get("deltamem_pin", [])
    spans += _text_spans([texts] if isinstance(texts, str) else texts, prompt, tokenizer, quota)
    if spans:
        resolved[PINS] = _united(spans)
        _check_quota(resolved[PINS], quota)
    for name in options.keys() & SESSIONS:
        check_name(options[name])
        resolved |= {name: options[name], TENANT: tenant.get()}
    return resolved


def options_of(params) -> dict:
    """What a request asks of the memory, as the engine reads it; params: vLLM's SamplingParams, or None."""
    return (params and params.extra_args) or {}


def pins_of(params) -> list[list[int]]:
    """The spans [first, end) that a request pins."""
    return options_of(params).get(PINS, [])


def check_session(request, workers: int, directory: str | None) -> None:
    """Raise ValueError for vLLM's request if its session cannot be kept by this server, or not by its tokens alone.

    workers: tensor-parallel, whose parts of a session meet in the directory, of all data-parallel engines, which take
    turns in a conversation and meet there, too.
    """
    if workers > 1 and directory is None:
        raise ValueError(
            "deltamem_session: this server has several workers and no directory where they meet. "
            "Start it with the setting 'sessions.directory', or leave the session out."
        )
    for what in untold(request):
        raise ValueError(f"deltamem_session does not go with {what}: leave the session out.")


def untold(request) -> list[str]:
    """What the memory of vLLM's request depends on besides its tokens, in words."""
    found = {
        "a LoRA adapter": request.lora_request is not None,
        "images or other media": bool(request.mm_features),
        "a prompt of embeddings": request.prompt_embeds is not None,
    }
    return [what for what, present in found.items() if present]


def _token_ranges(flat, length: int) -> list[tuple[int, int]]:
    if not isinstance(flat, list) or len(flat) % 2 or not all(type(p) is int for p in flat):
        raise ValueError(
            f"deltamem_pin_tokens must be a list [first, end, first, end, ...] of token positions, got {flat!r:.200}."
        )
    spans = list(zip(flat[::2], flat[1::2], strict=True))
    for first, end in spans:
        if not 0 <= first < end <= length:
            raise ValueError(f"deltamem_pin_tokens: [{first}, {end}) is not a range in a prompt of {length} tokens.")
    return spans


def _text_spans(texts, prompt: list[int], tokenizer, quota: int) -> list[tuple[int, int]]:
    """Token ranges of every occurrence of every text in the prompt, looked for as long as they are within the quota."""
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"deltamem_pin must be a text or a list of texts, got {texts!r:.200}.")
    if not texts:
        return []
    if tokenizer is None:
        raise ValueError("deltamem_pin needs a tokenizer, which this server skips: use deltamem_pin_tokens.")
    texts = dict.fromkeys(texts)
    if len(texts) > MAX_PINS:
        raise ValueError(f"deltamem_pin has {len(texts)} texts; this server allows {MAX_PINS} per request. Pin less.")
    joined, owners = _decoded(prompt, tokenizer)
    spans, pinned = set(), set()
    for text in texts:
        at = joined.find(text)
        if at < 0:
            raise ValueError(f"deltamem_pin: the prompt does not contain {text!r:.200}.")
        while at >= 0:
            span = owners[at][0], owners[at + len(text) - 1][1]
            if span not in spans:
                spans.add(span)
                pinned.update(range(*span))
                if len(pinned) > quota:
                    _check_quota(_united(spans), quota)
            at = joined.find(text, at + 1)
    return list(spans)


def _decoded(prompt: list[int], tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The prompt's text, and of each of its characters the tokens that it is from, as a range.

    Decoded on and on as vLLM decodes an answer: alone, a token may lose its space or be part of a character.
    """
    pieces, owners, begin = [], [], 0
    for i, piece in enumerate(_pieces(prompt, tokenizer)):
        if piece:
            pieces.append(piece)
            owners += [(begin, i + 1)] * len(piece)
            begin = i + 1
    return "".join(pieces), owners


def _pieces(prompt: list[int], tokenizer) -> Iterator[str | None]:
    """What each token adds to the text."""
    if isinstance(tokenizer, TokenizersBackend):  # several times faster
        stream = DecodeStream(skip_special_tokens=False)
        for token in prompt:
            try:
                yield stream.step(tokenizer._tokenizer, token)
            except Exception as error:  # it has no kind of its own
                if "Invalid prefix" not in str(error):
                    raise
                stream = DecodeStream(skip_special_tokens=False)
                yield stream.step(tokenizer._tokenizer, token)
        return
    tokens, prefix, read = [], 0, 0
    for token in prompt:
        new, piece, prefix, read = detokenize_incrementally(tokenizer, [token], tokens, prefix, read)
        tokens += new
        yield piece


def _united(spans: Collection[tuple[int, int]]) -> list[list[int]]:
    """The same positions as the fewest ascending spans."""
    united: list[list[int]] = []
    for first, end in sorted(spans):
        if united and first <= united[-1][1]:
            united[-1][1] = max(united[-1][1], end)
        else:
            united.append([first, end])
    return united


def _check_quota(spans: list[list[int]], quota: int) -> None:
    count = sum(end - first for first, end in spans)
    if count > quota or len(spans) > MAX_PINS:
        raise ValueError(
            f"The pins cover at least {count} tokens in {len(spans)} spans; this server allows {quota} tokens in "
            f"{MAX_PINS} spans per request (setting 'pinned'). Pin less."
        )
