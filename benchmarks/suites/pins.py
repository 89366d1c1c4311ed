"""A fact at the beginning, pinned in the request, and imitations of it all the way down to the question."""

import random

from .needle import HEAD, KEYS, NEEDLE, QUESTION, ROOM, exact
from .sample import Sample, ask
from .source import Source

IMITATIONS = 12
LATEST = 0.05  # depth of the fact at most


def pins(source: Source, seed: int) -> Sample:
    """Scores the number given exactly where it is pinned, and as part `unpinned` for the same prompt without a pin.

    The pin is the number as it stands in the text, a token or so for each of its digits.
    """
    rng = random.Random(f"pins {seed}")
    names = rng.sample(KEYS, IMITATIONS + 1)
    numbers = [str(number) for number in rng.sample(range(10**4, 10**5), len(names))]
    depths = [LATEST * rng.random(), *(rng.uniform(LATEST, 1) for _ in range(IMITATIONS))]
    facts = [NEEDLE.format(key=name, number=number) for name, number in zip(names, numbers, strict=True)]
    tail = QUESTION.format(key=names[0])
    prompt = source.hide(seed, HEAD, list(zip(depths, facts, strict=True)), tail, ROOM)

    def score(outputs, full):
        return {part: exact(o["text"], numbers[0]) for part, o in zip(("", "unpinned"), outputs, strict=True)}

    return Sample(seed, ask(prompt, prompt), score, ROOM, pinned=(f" {numbers[0]}", None))
