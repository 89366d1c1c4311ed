"""Dialogues with an assistant that calls tools, and needs what its instructions and earlier turns said."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from vllm_deltamem.calibration.prompts import (
    CITIES,
    DAYS,
    FACTS,
    NAMES,
    PLACES,
    THINGS,
    Prompt,
    Turn,
    conversation,
    excerpt,
)

TURN_TOKENS = 100  # of a turn: about half of it a passage of the filler
TURN_EXTRA = 60  # what a turn has besides
INSTRUCTIONS = 250  # tokens of the system message, about


@dataclass(frozen=True)
class Tool:
    """`ask` draws a request and the arguments of the call that fulfils it."""

    names: tuple[str, ...]
    does: str
    ask: Callable[[random.Random], tuple[str, tuple[str | int, ...]]]


def _heat(rng):
    place, degrees = rng.choice(PLACES), rng.randint(10, 30)
    return f"Heat the {place} to {degrees} degrees.", (place, degrees)


def _book(rng):
    city, day = rng.choice(CITIES), rng.choice(DAYS)
    return f"I want to travel to {city} on {day}.", (city, day)


def _lend(rng):
    thing, name = rng.choice(THINGS), rng.choice(NAMES)
    return f"{name} has borrowed the {thing}.", (thing, name)


def _buy(rng):
    thing, count = rng.choice(THINGS), rng.randint(2, 90)
    return f"We need {count} more of this: {thing}.", (thing, count)


def _lock(rng):
    place = f"{rng.choice(CITIES)} {rng.choice(PLACES)}"
    return f"Nobody may enter the {place} any more.", (place,)


def _call(rng):
    name, hour = rng.choice(NAMES), f"{rng.randint(8, 19)}:{rng.randint(10, 59)}"
    return f"Remind me to call {name} at {hour}.", (name, hour)


TOOLS = (
    Tool(("heat", "set_heating", "thermostat"), "heat a room to so many degrees", _heat),
    Tool(("book", "book_ticket", "reserve"), "book a ticket to a city for a day", _book),
    Tool(("lend", "record_loan", "lent"), "record that a thing is with somebody", _lend),
    Tool(("buy", "order_more", "shop"), "order so many of a thing", _buy),
    Tool(("lock", "close_room", "deny_entry"), "lock a room", _lock),
    Tool(("remind", "set_reminder", "alarm"), "remind the user of a call at a time", _call),
)
REPORT = ("report", "reply", "say")  # names of the tool that tells what was asked for

STYLES: tuple[Callable[[str, tuple], str], ...] = (  # how a call is written
    lambda name, values: f"{name}({', '.join(json.dumps(value) for value in values)})",
    lambda name, values: json.dumps({"tool": name, "arguments": list(values)}),
    lambda name, values: f"{name.upper()} {' | '.join(map(str, values))}",
)


def dialogue_prompt(tokenizer, text: str, length: int, rng: random.Random) -> Prompt:
    """A chat of about `length` tokens whose every answer is a tool call, those after the first two to be predicted.

    In passing the user tells facts and reads from `text`; a third of the requests ask for a fact told before.
    """
    style, report = rng.choice(STYLES), rng.choice(REPORT)
    names = [rng.choice(tool.names) for tool in TOOLS]
    tools = [f"{style(name, tool.ask(rng)[1])}  {tool.does}" for name, tool in zip(names, TOOLS, strict=True)]
    tools.append(f"{style(report, ('...',))}  tell the user what was asked for")
    rng.shuffle(tools)
    system = "You answer every message with one tool call and nothing else. The tools, by example:\n" + "\n".join(tools)
    turns, told = [], []
    for i in range(max((length - INSTRUCTIONS) // TURN_TOKENS, 4)):
        fact = rng.choice(FACTS)(rng)
        if told and rng.random() < 1 / 3:
            asked = told.pop(rng.randrange(len(told)))
            request, call = asked.question, style(report, (asked.value,))
        else:
            name, tool = rng.choice(list(zip(names, TOOLS, strict=True)))
            request, values = tool.ask(rng)
            call = style(name, values)
        passage = excerpt(tokenizer, text, TURN_TOKENS - TURN_EXTRA, rng)
        said = f"[{'done' if i else 'ready'}]\n(Aloud: {' '.join(passage.split())})\n{fact.statement} {request}"
        told.append(fact)
        turns.append(Turn(said, "", call, wanted=i > 1))
    return conversation(tokenizer, turns, system)
