"""Conversations of an agent at a help desk: tools answer with JSON documents, and later calls need what these held."""

import json
import random
import string
from collections.abc import Iterator

from vllm_deltamem.calibration.prompts import (
    CITIES,
    NAMES,
    PLACES,
    THINGS,
    Prompt,
    Turn,
    conversation,
    count_tokens,
    excerpt,
    letters,
)

TURN_EXTRA = 10  # tokens that the model's chat template adds to a turn, about
RULES = 0.25  # share of a prompt that its rules take up, which no call depends on
RECORDS = "order loan repair parcel rental".split()
STATUS = "open paid shipped closed delayed".split()
METHODS = "credit_card gift_card bank_account voucher".split()
ACTIONS = "cancel refund readdress report".split()
STYLES = (  # what opens a call, and what stands between its name and its arguments, and at its end
    ('<tool_call>{"name": "', '", "arguments": ', "}</tool_call>"),
    ('{"tool": "', '", "with": ', "}"),
    ("call ", " ", ""),
)


def case_prompt(tokenizer, text: str, length: int, rng: random.Random) -> Prompt:
    """A chat of about `length` tokens: customers one after another, whose every request is a tool call to be predicted.

    Its rules are from `text`. Of every customer all records are looked up in turn, then some are acted on.
    """
    kind, style = rng.choice(RECORDS), rng.choice(STYLES)
    signatures = [f"find_{kind}({kind})", f"refund({kind}, item, payment)", f"readdress({kind}, city, street)"]
    signatures += ["find_customer(customer)", f"cancel({kind})", "report(value)"]
    rules = " ".join(excerpt(tokenizer, text, round(RULES * length), rng).split())
    tools = "\n".join(f"- {signature}" for signature in rng.sample(signatures, len(signatures)))
    system = f"You look after the {kind}s of customers. Every answer is one tool call.\n\n# Rules\n\n{rules}"
    system += f"\n\n# Tools\n\n{tools}\n\nCall one tool: {style[0]}...{style[1]}{{...}}{style[2]}"
    turns, left = [], length - count_tokens(tokenizer, system)
    for said, name, arguments in _customers(kind, rng):
        value = f"{name}{style[1]}{json.dumps(arguments)}{style[2]}"
        left -= count_tokens(tokenizer, said + style[0] + value) + TURN_EXTRA
        if left < 0 and len(turns) > 1:  # something is to be predicted
            return conversation(tokenizer, turns, system)
        turns.append(Turn(said, style[0], value, wanted=name != "find_customer"))


def _customers(kind: str, rng: random.Random) -> Iterator[tuple[str, str, dict]]:
    while True:
        yield from _customer(kind, rng)


def _customer(kind: str, rng: random.Random) -> Iterator[tuple[str, str, dict]]:
    """What is said to the agent, and the name and arguments of the call that follows, for one customer."""
    first, last = rng.sample(NAMES, 2)
    number = f"{first}_{last}_{rng.randint(1000, 9999)}".lower()
    payments = [f"{method}_{rng.randint(10**6, 10**7 - 1)}" for method in rng.sample(METHODS, 2)]
    things = rng.sample(THINGS, 6)
    records = [_record(kind, number, things[2 * i : 2 * i + 2], rng.choice(payments), rng) for i in range(3)]
    said = f"Hello, this is {first} {last}, my customer number is {number}. I have a question about my {kind}s."
    yield said, "find_customer", {"customer": number}
    found = {"customer": number, "name": {"first": first, "last": last}, "address": _address(rng)}
    found |= {"payment_methods": payments, f"{kind}s": [record[kind] for record in records]}
    for record in records:
        yield _response(found), f"find_{kind}", {kind: record[kind]}
        found = record
    yield _response(found), "report", {"value": len(records)}
    for record in rng.sample(records, len(records)):
        yield _request(kind, record, rng)


def _request(kind: str, record: dict, rng: random.Random) -> tuple[str, str, dict]:
    """Something to be done with a record, which is named by one of its things alone."""
    item, action, that = rng.choice(record["items"]), rng.choice(ACTIONS), {kind: record[kind]}
    if action == "cancel":
        return f"Please cancel the {kind} that has the {item['name']}.", action, that
    if action == "refund":
        return (f"I do not want the {item['name']}. Pay it back the way it was paid.", action,
                that | {"item": item["item"], "payment": record["payment"]})  # fmt: skip
    if action == "readdress":
        address = _address(rng)
        return (f"The {kind} with the {item['name']} has to go to {address['street']} in {address['city']}.", action,
                that | {"city": address["city"], "street": address["street"]})  # fmt: skip
    field, name = rng.choice((("price", "what the {} cost"), ("item", "the item number of the {}")))
    return f"Tell me {name.format(item['name'])}.", action, {"value": item[field]}


def _record(kind: str, customer: str, things: list[str], payment: str, rng: random.Random) -> dict:
    date = f"2024-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    items = [{"name": thing, "item": letters(rng, string.digits, 10), "price": _price(rng)} for thing in things]
    record = {kind: letters(rng, string.ascii_uppercase + string.digits, 6), "customer": customer, "date": date}
    return record | {"status": rng.choice(STATUS), "items": items, "payment": payment, "address": _address(rng)}


def _address(rng: random.Random) -> dict:
    street = f"{rng.randint(1, 999)} {rng.choice(PLACES).capitalize()} Street"
    return {"street": street, "city": rng.choice(CITIES), "zip": str(rng.randint(10000, 99999))}


def _price(rng: random.Random) -> str:
    return f"{rng.randint(5, 400)}.{rng.randint(10, 99)}"


def _response(document: dict) -> str:
    return f"<tool_response>{json.dumps(document)}</tool_response>"
