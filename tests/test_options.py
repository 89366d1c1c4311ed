"""What clients may ask of one request, and what the engine gets of it."""

import sys
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_deltamem.memory import MAX_PINS
from vllm_deltamem.options import PINS, SESSION, SOURCE, TENANT, check_session, resolve, tenant
from vllm_deltamem.sessionname import tenant_of


class Characters:
    """A tokenizer of one character per token; token 0 is 'ab', so that a text may begin inside a token."""

    is_fast = True

    def __len__(self):
        return sys.maxunicode + 1

    def convert_ids_to_tokens(self, ids, skip_special_tokens):
        return ["ab" if token == 0 else chr(token) for token in ids]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


PROMPT = [ord(c) for c in "a key: 4711. A door. A key: 4711."]


def pins(options, prompt=PROMPT, quota=32):
    return resolve(options, prompt, Characters(), quota).get(PINS)


@pytest.mark.parametrize("extra", [None, {}, {"top_p": 1}])
def test_without_options_nothing_changes(extra):
    assert resolve(extra, PROMPT, None, 0) is extra


def test_every_occurrence_is_pinned():
    assert pins({"deltamem_pin": "4711"}) == [[7, 11], [28, 32]]
    assert pins({"deltamem_pin": ["4711", "door"]}) == [[7, 11], [15, 19], [28, 32]]


def test_spans_are_united():
    assert pins({"deltamem_pin_tokens": [8, 12, 0, 3, 3, 5, 9, 10]}) == [[0, 5], [8, 12]]
    assert pins({"deltamem_pin_tokens": [6, 8], "deltamem_pin": "4711"}) == [[6, 11], [28, 32]]


def test_a_text_pins_the_tokens_that_it_touches():
    assert pins({"deltamem_pin": "b!"}, prompt=[0, ord("!"), 0]) == [[0, 2]]
    assert pins({"deltamem_pin": "bab"}, prompt=[0, 0]) == [[0, 2]]


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it: a space belongs to the next word, what is not in the vocabulary is bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁to", "▁allergic", "▁penicillin"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_tokens(words[-3:])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level() -> PreTrainedTokenizerFast:
    """As Llama 3 and Qwen have it, here without any merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [sentencepiece, byte_level])
@pytest.mark.parametrize("text", ["allergic to penicillin", "to penicillin 🎂", "🎂", "Zoë, 過敏"])
def test_a_text_is_found_whatever_its_tokens_are(make, text):
    tokenizer = make()
    prompt = tokenizer("Dr. Zoë, 過敏: allergic to penicillin 🎂 or 🧁")["input_ids"]
    ((first, end),) = resolve({"deltamem_pin": text}, prompt, tokenizer, 99)[PINS]
    assert text in tokenizer.decode(prompt[first:end])
    for shorter in (prompt[first + 1 : end], prompt[first : end - 1]):
        assert text not in tokenizer.decode(shorter)


def test_tokens_that_are_no_text_are_passed_over():
    """The first byte of a character that never comes."""
    tokenizer = sentencepiece()
    _, first_byte, *_ = tokenizer("過")["input_ids"]
    prompt = [*tokenizer("to")["input_ids"], first_byte, *tokenizer("allergic to penicillin")["input_ids"]]
    assert resolve({"deltamem_pin": "penicillin"}, prompt, tokenizer, 99)[PINS]


def test_other_arguments_pass():
    assert resolve({"top_p": 1, "deltamem_pin_tokens": [0, 1]}, PROMPT, None, 8) == {"top_p": 1, PINS: [[0, 1]]}


def test_a_session_belongs_to_the_caller():
    token = tenant.set(tenant_of("key"))
    try:
        found = resolve({"deltamem_session": "chat-1"}, PROMPT, None, 8)
    finally:
        tenant.reset(token)
    assert found == {SESSION: "chat-1", TENANT: tenant_of("key")}
    assert resolve({"deltamem_session": "chat-1"}, PROMPT, None, 8)[TENANT] == tenant_of(None)
    assert resolve({"deltamem_session_from": "doc"}, PROMPT, None, 8) == {SOURCE: "doc", TENANT: tenant_of(None)}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"deltamem_pins": [[0, 900]]}, "Unknown option 'deltamem_pins'"),
        ({"deltamem_tenant": "0" * 64, "deltamem_session": "a"}, "Unknown option 'deltamem_tenant'"),
        ({"deltamem_session": ""}, "a session name has"),
        ({"deltamem_session": "a/b"}, "a session name has"),
        ({"deltamem_session": ["a"]}, "a session name has"),
        ({"deltamem_session": "a", "deltamem_session_from": "../b"}, "a session name has"),
        ({"deltamem_pin": 7}, "must be a text or a list of texts"),
        ({"deltamem_pin": ["4711", ""]}, "must be a text or a list of texts"),
        ({"deltamem_pin": ""}, "must be a text or a list of texts"),
        ({"deltamem_pin": False}, "must be a text or a list of texts"),
        ({"deltamem_pin": "4712"}, "the prompt does not contain '4712'"),
        ({"deltamem_pin_tokens": "0,4"}, "must be a list"),
        ({"deltamem_pin_tokens": [0]}, "must be a list"),
        ({"deltamem_pin_tokens": [0, 1.5]}, "must be a list"),
        ({"deltamem_pin_tokens": [True, 4]}, "must be a list"),
        ({"deltamem_pin_tokens": [-1, 4]}, "is not a range"),
        ({"deltamem_pin_tokens": [4, 4]}, "is not a range"),
        ({"deltamem_pin_tokens": [0, len(PROMPT) + 1]}, "is not a range"),
        ({"deltamem_pin_tokens": [0, 33]}, "cover at least 33 tokens in 1 spans; this server allows 32"),
    ],
)
def test_malformed_options(options, message):
    with pytest.raises(ValueError, match=message):
        resolve(options, PROMPT, Characters(), quota=32)


def test_pins_have_a_quota_of_spans():
    alternate = [position for i in range(MAX_PINS + 1) for position in (2 * i, 2 * i + 1)]
    with pytest.raises(ValueError, match=f"in {MAX_PINS} spans"):
        resolve({"deltamem_pin_tokens": alternate}, [1] * 100, None, 100)


def test_texts_are_looked_for_within_the_quota_only(monkeypatch):
    """A client could have a server look for the same letter for minutes."""
    with pytest.raises(ValueError, match="cover at least 9 tokens"):
        resolve({"deltamem_pin": ["o"] * 10_000}, [ord("o")] * 100_000, Characters(), 8)
    with pytest.raises(ValueError, match=f"has 40 texts; this server allows {MAX_PINS}"):
        resolve({"deltamem_pin": [str(i) for i in range(40)]}, PROMPT, Characters(), 8)


def test_a_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="use deltamem_pin_tokens"):
        resolve({"deltamem_pin": "4711"}, PROMPT, None, 32)


def test_a_long_option_is_quoted_in_part():
    with pytest.raises(ValueError) as error:
        resolve({"deltamem_pin": "x" * 100_000}, PROMPT, Characters(), 32)
    assert len(str(error.value)) < 400


TOKENS_ALONE = {"lora_request": None, "mm_features": None, "prompt_embeds": None}


@pytest.mark.parametrize(
    "more, message",
    [
        ({"lora_request": "adapter"}, "does not go with a LoRA adapter"),
        ({"mm_features": ["image"]}, "does not go with images"),
        ({"prompt_embeds": [[0.1]]}, "does not go with a prompt of embeddings"),
    ],
)
def test_a_session_takes_what_its_tokens_tell(more, message):
    check_session(SimpleNamespace(**TOKENS_ALONE), 1, None)
    check_session(SimpleNamespace(**TOKENS_ALONE | {"mm_features": []}), 1, None)
    with pytest.raises(ValueError, match=message):
        check_session(SimpleNamespace(**TOKENS_ALONE | more), 1, None)


def test_sessions_of_several_workers_need_a_directory():
    check_session(SimpleNamespace(**TOKENS_ALONE), 2, "folder")
    with pytest.raises(ValueError, match="sessions.directory"):
        check_session(SimpleNamespace(**TOKENS_ALONE), 2, None)


@pytest.mark.parametrize(
    "asked, message",
    [
        ("deltamem_sesion", "Unknown option 'deltamem_sesion'"),
        ("deltamem_session", "does not go with a LoRA adapter"),
        ("deltamem_session_from", "does not go with a LoRA adapter"),
    ],
)
def test_a_malformed_option_is_the_clients_error(monkeypatch, asked, message):
    """vLLM answers 500 to a ValueError from here, 400 to its own kind."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_deltamem import plan, startup
    from vllm_deltamem.patches import request_options

    params = SimpleNamespace(extra_args={asked: "a"})
    others = TOKENS_ALONE | {"lora_request": "adapter"}
    request = SimpleNamespace(sampling_params=params, prompt_token_ids=PROMPT, **others)
    monkeypatch.setattr(InputProcessor, "process_inputs", lambda self: request)
    monkeypatch.setattr(startup, "is_chosen", lambda config: True)
    monkeypatch.setattr(plan, "plan_memory", lambda config: SimpleNamespace(layout=SimpleNamespace(pinned=8)))
    request_options.apply()
    parallel = SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1)
    config = SimpleNamespace(additional_config={}, parallel_config=parallel)
    processor = SimpleNamespace(vllm_config=config, renderer=SimpleNamespace(tokenizer=None))
    with pytest.raises(VLLMValidationError, match=message):
        InputProcessor.process_inputs(processor)
