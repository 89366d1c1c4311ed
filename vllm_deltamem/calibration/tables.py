"""Prompts that ask for single records of a long list, none of which looks more worth keeping than another."""

import random
import string
from collections.abc import Callable

from vllm_deltamem.calibration.prompts import (
    CITIES,
    DAYS,
    NAMES,
    PLACES,
    THINGS,
    Fact,
    Prompt,
    Turn,
    conversation,
    count_tokens,
    excerpt,
    letters,
)

SHARE = 0.15, 0.9  # of a prompt that its records take up
QUESTION_TOKENS = 60  # with its answer, at most
HEX = "0123456789abcdef"


def table_prompt(tokenizer, text: str, length: int, rng: random.Random, questions: int = 8) -> Prompt:
    """A chat of about `length` tokens: records of one kind amid filler, then questions about some of them in turn."""
    opening, record, closing = rng.choice(TABLES)
    room = max(length - QUESTION_TOKENS * questions, 256)
    left, records = room * rng.uniform(*SHARE), {}
    while left > 0 or len(records) < questions:
        fact = record(rng)
        if fact.question not in records:  # one answer to a question
            records[fact.question] = fact
            left -= count_tokens(tokenizer, fact.statement + "\n")
    block = "\n".join([opening, *(fact.statement for fact in records.values()), closing])
    rest = room - count_tokens(tokenizer, block)
    before, after = "", ""
    if rest > 0:
        filler = excerpt(tokenizer, text, rest, rng)
        cut = rng.randint(0, len(filler))
        before, after = filler[:cut], filler[cut:]
    asked = rng.sample(list(records.values()), questions)
    first = f"Read this. Questions about it follow.\n\n{before}\n{block}\n{after}\n\n{asked[0].question}"
    said = [first, *(fact.question for fact in asked[1:])]
    return conversation(tokenizer, [Turn(q, f.lead, f" {f.value}", ".") for q, f in zip(said, asked, strict=True)])


def _hexadecimal(digits: int) -> Callable[[random.Random], Fact]:
    def draw(rng):
        key, value = letters(rng, HEX, digits), letters(rng, HEX, digits)
        return Fact(f' "{key}": "{value}",', f'What value belongs to the key "{key}"?', f'"{key}":', f'"{value}"')

    return draw


def _identifier(rng):
    """As most programs write random ones: 8-4-4-4-12."""
    key, value = ("-".join(letters(rng, HEX, n) for n in (8, 4, 4, 4, 12)) for _ in range(2))
    return Fact(
        f' "{key}": "{value}",', f'Key: "{key}". What is the corresponding value?', "The value is", f'"{value}"'
    )


def _telephone(rng):
    name, value = f"{rng.choice(NAMES)} {rng.choice(NAMES)}", f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}"
    return Fact(f"{name}: {value}", f"What is the telephone number of {name}?", f"The number of {name} is", value)


def _stock(rng):
    number, thing, place = rng.randint(1000, 9999), rng.choice(THINGS), rng.choice(PLACES)
    count = rng.randint(2, 900)
    return Fact(f"{number},{thing},{place},{count}", f"How many pieces are there of item {number}?",
                f"Of item {number} there are", str(count))  # fmt: skip


def _setting(rng):
    name = f"{rng.choice(THINGS)}_{rng.choice(PLACES)}_{rng.choice(('port', 'limit', 'size', 'seed'))}".upper()
    value = str(rng.randint(1000, 65535))
    return Fact(f"{name}={value}", f"What is {name} set to?", f"{name}=", value)


def _flight(rng):
    number, city = letters(rng, string.ascii_uppercase, 2) + str(rng.randint(100, 999)), rng.choice(CITIES)
    value = f"{city} on {rng.choice(DAYS)} at {rng.randint(6, 22)}:{rng.randint(10, 59)}"
    return Fact(f'{{"flight": "{number}", "leaves": "for {value}"}}', f"When and for where does flight {number} leave?",
                f"Flight {number} leaves for", value)  # fmt: skip


TABLES: tuple[tuple[str, Callable[[random.Random], Fact], str], ...] = (  # what opens a list, a record, what closes it
    ("{", _hexadecimal(8), "}"),
    ("{", _hexadecimal(16), "}"),
    ("JSON data:\n{", _identifier, "}"),
    ("Telephone numbers", _telephone, ""),
    ("item,name,place,pieces", _stock, ""),
    ("# settings", _setting, ""),
    ("[", _flight, "]"),
)
