"""Prompts that ask a model for what it read: facts and sentences hidden in filler text, and plain text.

Everything follows from a seed. The default filler is Python's own reference documentation, which every
CPython carries, so that calibration needs no download.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jinja2 import TemplateError

NAMES = (
    "Amara Bengt Chidi Dalia Emeka Farah Goran Hanna Ivo Jelena Kofi Leila Marek Nadia Oskar Priya Quentin "
    "Rosa Stefan Tomoko Ulrich Vera Wanda Xavier Yusuf Zofia"
).split()
THINGS = (
    "lantern compass ledger violin telescope umbrella kettle saddle anchor mirror notebook clock basket "
    "hammer ribbon candle passport trumpet blanket medal".split()
)
PLACES = (
    "cellar attic library orchard harbour station kitchen chapel garage museum bakery stable laboratory "
    "theatre greenhouse tower workshop archive".split()
)
CITIES = "Lisbon Oslo Nairobi Lima Kyoto Tallinn Bergen Quito Hanoi Geneva Dakar Riga Porto Cairo Perth".split()
FOODS = "peanuts shellfish penicillin strawberries latex mustard sesame almonds soy lupin celery gluten".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


@dataclass(frozen=True)
class Prompt:
    """Token ids [T] and the spans (begin, end) whose tokens are to be predicted; `recall` or plain text."""

    ids: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    recall: bool


@dataclass(frozen=True)
class Fact:
    """A statement to hide, and how to ask for it: the answer is `lead` followed by `value`."""

    statement: str
    question: str
    lead: str
    value: str


@dataclass(frozen=True)
class Turn:
    """What the user says, and the answer: `value` after `lead`; whether the value is to be predicted."""

    said: str
    lead: str
    value: str
    end: str = ""  # of the answer
    wanted: bool = True


def default_text() -> str:
    """Filler without a download: the topics of `help()`, in order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def recall_prompt(tokenizer, text: str, length: int, rng: random.Random, facts: int = 5, quotes: int = 2) -> Prompt:
    """A chat of about `length` tokens: filler with facts at random depths, then a question on each in turn.

    quotes: questions for the rest of a sentence of the filler itself, so that not only odd facts count.
    """
    hidden = [rng.choice(FACTS)(rng) for _ in range(facts)]
    room = max(length - 60 * (facts + quotes), 128)
    sentences = _sentences(excerpt(tokenizer, text, room, rng))
    asked = [*hidden, *_quotes(sentences, quotes, rng)]
    for fact in hidden:
        sentences.insert(rng.randint(0, len(sentences)), fact.statement)
    rng.shuffle(asked)
    first = f"Read this text. Questions about it follow.\n\n{' '.join(sentences)}\n\n{asked[0].question}"
    said = [first, *(fact.question for fact in asked[1:])]
    return conversation(tokenizer, [Turn(q, f.lead, f" {f.value}", ".") for q, f in zip(said, asked, strict=True)])


def conversation(tokenizer, turns: list[Turn], system: str | None = None) -> Prompt:
    """The chat of these turns as the model's template renders it, up to the last answer."""
    messages = [{"role": "system", "content": system}] if system and _knows_system(tokenizer) else []
    pieces, rendered = [], ""
    for turn in turns:
        said = turn.said if messages or not system else f"{system}\n\n{turn.said}"
        messages.append({"role": "user", "content": said})
        lead_in = _render(tokenizer, messages, ask=True) + turn.lead
        pieces += [(lead_in[len(rendered) :], False), (turn.value, turn.wanted)]
        rendered = lead_in + turn.value
        messages.append({"role": "assistant", "content": turn.lead + turn.value + turn.end})
        rendered = _common_prefix(rendered, _render(tokenizer, messages, ask=False))
    return _tokenize(tokenizer, pieces)


def text_prompt(tokenizer, text: str, length: int, rng: random.Random) -> Prompt:
    """Plain text of `length` tokens; those of its second half are to be predicted."""
    ids = torch.tensor(tokenizer(excerpt(tokenizer, text, length, rng))["input_ids"][:length])
    return Prompt(ids, ((len(ids) // 2, len(ids)),), recall=False)


def _magic_number(rng):
    key, value = f"{rng.choice(NAMES)}'s {rng.choice(THINGS)}", str(rng.randint(10**6, 10**7 - 1))
    return Fact(
        f"One of the special magic numbers for {key} is: {value}.",
        f"What is the special magic number for {key} mentioned in the text?",
        f"The special magic number for {key} is",
        value,
    )


def _code(rng):
    place, value = (
        f"{rng.choice(CITIES)} {rng.choice(PLACES)}",
        letters(rng, string.ascii_uppercase + string.digits, 6),
    )
    return Fact(
        f"The access code of the {place} is {value}.",
        f"What is the access code of the {place}?",
        f"The access code of the {place} is",
        value,
    )


def _allergy(rng):
    name, value = rng.choice(NAMES), rng.choice(FOODS)
    return Fact(
        f"By the way, {name} is allergic to {value}.",
        f"What is {name} allergic to?",
        f"{name} is allergic to",
        value,
    )


def _meeting(rng):
    name, value = rng.choice(NAMES), f"{rng.choice(DAYS)} at {rng.randint(1, 12)}:{rng.randint(10, 59)}"
    return Fact(
        f"The meeting with {name} takes place on {value}.",
        f"When does the meeting with {name} take place?",
        f"The meeting with {name} takes place on",
        value,
    )


def _hiding_place(rng):
    name, thing, value = rng.choice(NAMES), rng.choice(THINGS), f"{rng.choice(CITIES)} {rng.choice(PLACES)}"
    return Fact(
        f"{name} left the {thing} in the {value}.",
        f"Where did {name} leave the {thing}?",
        f"{name} left the {thing} in the",
        value,
    )


def _pair(rng):
    key, value = letters(rng, "0123456789abcdef", 8), letters(rng, "0123456789abcdef", 8)
    return Fact(f'"{key}": "{value}",', f'What value belongs to the key "{key}"?', f'"{key}":', f'"{value}"')


def _variable(rng):
    name, value = letters(rng, string.ascii_uppercase, 3), str(rng.randint(10000, 99999))
    return Fact(f"VAR {name} = {value}", f"What is the value of the variable {name}?", f"VAR {name} =", value)


def _order(rng):
    number, value = (
        str(rng.randint(1000, 9999)),
        f"{rng.choice(CITIES)} for ${rng.randint(10, 99)}.{rng.randint(10, 99)}",
    )
    return Fact(
        f"Order #{number} ships to {value}.",
        f"Where does order #{number} ship to, and for how much?",
        f"Order #{number} ships to",
        value,
    )


def _handed_on(rng):
    """Something that is said only by reference to another: nothing in it looks worth keeping by itself."""
    (name, other), (thing, that) = rng.sample(NAMES, 2), rng.sample(THINGS, 2)
    place, elsewhere = (f"{city} {rng.choice(PLACES)}" for city in rng.sample(CITIES, 2))
    variable, source = letters(rng, string.ascii_uppercase, 3), letters(rng, string.ascii_uppercase, 3)
    said, question, value = rng.choice(
        (
            (f"The locker number of {name} is the one of", f"Whose locker number does {name} have?", other),
            (f"The {place} has got the key of the", f"Which key has the {place} got?", elsewhere),
            (f"{name}'s {thing} weighs as much as {other}'s", f"What weighs as much as {name}'s {thing}?", that),
            (f"The {thing} of {name} is kept with that of", f"With whose is the {thing} of {name} kept?", other),
            (f"VAR {variable} = VAR", f"Which variable is {variable} assigned from?", source),
        )
    )
    return Fact(f"{said} {value}.", question, said, value)


FACTS: tuple[Callable[[random.Random], Fact], ...] = (
    _magic_number,
    _magic_number,
    _code,
    _allergy,
    _meeting,
    _hiding_place,
    _pair,
    _variable,
    _order,
    _handed_on,
    _handed_on,
)


def _quotes(sentences, count, rng):
    long = [s for s in sentences if 12 <= len(s.split()) <= 40]
    for sentence in rng.sample(long, min(count, len(long))):
        words = sentence.split()
        half = len(words) // 2
        start = " ".join(words[:half])
        yield Fact(
            sentence,
            f'How does the text go on after "{start}"?',
            f"{start}",
            " ".join(words[half : half + 12]),
        )


def letters(rng: random.Random, alphabet: str, count: int) -> str:
    """A random word of so many letters."""
    return "".join(rng.choice(alphabet) for _ in range(count))


def count_tokens(tokenizer, text: str) -> int:
    """Tokens of text that stands inside a prompt."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def excerpt(tokenizer, text, tokens, rng):
    """About that many tokens of text from a random place."""
    width = min(tokens * 6, len(text))
    begin = rng.randint(0, len(text) - width)
    piece = tokenizer(text[begin : begin + width], return_offsets_mapping=True)
    offsets = piece["offset_mapping"]
    return text[begin : begin + offsets[min(tokens, len(offsets)) - 1][1]]


def _sentences(text):
    return [part.strip() + "." for part in " ".join(text.split()).split(". ") if part.strip()]


def _knows_system(tokenizer):
    """Whether the chat template takes a system message; some models have none."""
    try:
        return "instructed" in _render(tokenizer, [{"role": "system", "content": "instructed"}, _ANYTHING], ask=True)
    except TemplateError:
        return False


_ANYTHING = {"role": "user", "content": "?"}
_ROLES = {"system": "", "user": "Question: ", "assistant": "Answer: "}


def _render(tokenizer, messages, ask):
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    lines = [_ROLES[m["role"]] + m["content"] for m in messages]
    return "\n".join(lines) + ("\nAnswer: " if ask else "\n")


def _common_prefix(a, b):
    """What two renderings share: the answered span must be a prefix of the next turn's text."""
    return a if b.startswith(a) else b


def _tokenize(tokenizer, pieces):
    ids, spans = [], []
    for piece, wanted in pieces:
        begin = len(ids)
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if wanted:
            spans.append((begin, len(ids)))
    return Prompt(torch.tensor(ids), tuple(spans), recall=True)
