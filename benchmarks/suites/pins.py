"""A fact at the beginning, pinned in the request, and imitations of it all the way down to the question."""

import random

from .needle import HEAD, KEYS, NEEDLE, QUESTION, ROOM, exact
from .sample import Sample, ask
from .source import Source

IMITATIONS = 12
LATEST = 0.05  # depth of the fact at most


def pins(source: Source, seed: int) -> Sample:
    """Scores the number given exactly where it is pinned, and as part `unpinned` for the same prompt without a pin.

    The pin is the number as it stands in the text, a token or so for each of its digits. Imitations look as
    important as the fact to a memory; a small model still tells them apart (other hidden keys it takes for this one).
    """
    rng = random.Random(f"pins {seed}")
    number, *others = (str(number) for number in rng.sample(range(10**4, 10**5), IMITATIONS + 1))
    name = rng.choice(KEYS)
    hidden = [(LATEST * rng.random(), NEEDLE.format(key=name, number=number))]
    hidden += [
        (rng.uniform(LATEST, 1), NEEDLE.format(key=f"day {day}", number=other)) for day, other in enumerate(others, 1)
    ]
    prompt = source.hide(seed, HEAD, hidden, QUESTION.format(key=name), ROOM)

    def score(outputs, full):
        return {part: exact(o["text"], number) for part, o in zip(("", "unpinned"), outputs, strict=True)}

    return Sample(seed, ask(prompt, prompt), score, ROOM, pinned=(f" {number}", None))
