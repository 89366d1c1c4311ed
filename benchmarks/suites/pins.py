"""A fact at the beginning, pinned in the request, and imitations of it all the way down to the question."""

import random

from .needle import HEAD, KEYS, NEEDLE, QUESTION, ROOM, exact
from .sample import Sample, ask
from .source import Source

IMITATION = " Remember that the number of day {day} was {number}."
IMITATIONS = 12
LATEST = 0.05  # depth of the fact at most


def pins(source: Source, seed: int) -> Sample:
    """Scores the number given exactly where it is pinned, and as part `unpinned` for the same prompt without a pin.

    The pin is the number as it stands in the text, a token or so for each of its digits. To a memory imitations look
    as important as the fact; a small model still tells them apart, as it does not with other hidden keys.
    """
    rng = random.Random(f"pins {seed}")
    number, *others = (str(number) for number in rng.sample(range(10**4, 10**5), IMITATIONS + 1))
    name = rng.choice(KEYS)
    hidden = [(LATEST * rng.random(), NEEDLE.format(key=name, number=number))]
    for day, other in enumerate(others, 1):
        hidden.append((rng.uniform(LATEST, 1), IMITATION.format(day=day, number=other)))
    prompt = source.hide(seed, HEAD, hidden, QUESTION.format(key=name), ROOM)

    def score(outputs, full):
        return {part: exact(o["text"], number) for part, o in zip(("", "unpinned"), outputs, strict=True)}

    return Sample(seed, ask(prompt, prompt), score, ROOM, pinned=(f" {number}", None))
