"""Numbers hidden in a novel: one key or four, several questions on one context, and a sweep of depths."""

import random
import re

from .sample import Sample, ask
from .source import Source

KEYS = (
    "amber anchor apple barley basil beacon candle cedar cherry clover copper coral crystal daisy ember "
    "feather garnet ginger hazel harbor iron ivory jasmine juniper lantern lemon lilac magnet maple marble "
    "olive orchid pepper quartz raven saffron silver thistle timber velvet walnut willow"
).split()
HEAD = "There are special magic numbers hidden in the following text. Remember them.\n\n"
NEEDLE = " The special magic number for {key} is {number}."
QUESTION = "\n\nWhat is the special magic number for {key}? The special magic number for {key} is"
ROOM = 12
DEPTHS = 6


def digits_right(text: str, number: str) -> float:
    """Share of the number's digits that the first number in the text has in their place."""
    found = re.search(r"\d+", text)
    return sum(a == b for a, b in zip(found.group(), number, strict=False)) / len(number) if found else 0.0


def exact(text: str, number: str) -> float:
    """1 where the first number in the text is the one asked for."""
    found = re.search(r"\d+", text)
    return float(found is not None and found.group() == number)


def needle(source: Source, seed: int, keys: int = 1, questions: int = 1, sweep: bool = False) -> Sample:
    """`keys` needles at random depths, or one at the depth of its seed; `questions` of them are asked for.

    Scores the share of numbers given exactly, and as part `digits` the share of digits in their place.
    """
    rng = random.Random(f"needle {seed}")
    names = rng.sample(KEYS, keys)
    numbers = {name: str(rng.randrange(10**6, 10**7)) for name in names}
    depths = [seed % DEPTHS / (DEPTHS - 1)] if sweep else [rng.random() for _ in names]
    hidden = [(d, NEEDLE.format(key=name, number=numbers[name])) for d, name in zip(depths, names, strict=True)]
    asked = rng.sample(names, questions)
    tails = [source.encode(QUESTION.format(key=name)) for name in asked]
    context = source.hide(seed, HEAD, hidden, "", max(map(len, tails)) + ROOM)

    def score(outputs, full):
        texts = [o["text"] for o in outputs]
        pairs = [(text, numbers[name]) for text, name in zip(texts, asked, strict=True)]
        right = sum(exact(*pair) for pair in pairs) / len(pairs)
        parts = {"": right, "digits": sum(digits_right(*pair) for pair in pairs) / len(pairs)}
        if sweep:
            parts[f"depth {depths[0]:.1f}"] = right
        return parts

    shared = len(context) if questions > 1 else 0
    return Sample(seed, ask(*(context + tail for tail in tails)), score, max_tokens=ROOM, shared=shared)
