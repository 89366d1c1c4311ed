"""Variable tracking: a value stated once and handed on from name to name (RULER, arXiv 2404.06654).

RULER assigns variables (VAR X1 = VAR X2) and has the model list a chain at once: no model below a few billion
parameters does that, and one of 135M does not read such assignments at all. Here names hand on a number in plain
words, and the model walks the chain, one hop a prompt, from the last name back to the number.
"""

import random
import re

from .needle import HEAD, KEYS, exact
from .sample import Outputs, Sample
from .source import Source

NUMBER = " The special magic number for {name} is"
STATED, HANDED = " the number", " that of"
ROOM = 12


class Chain:
    """Names, the first of which has the value; each other takes over that of the one before it."""

    def __init__(self, rng: random.Random, names: list[str]):
        self.names = names
        self.value = str(rng.randrange(10**6, 10**7))
        self.depths = sorted(rng.random() for _ in names)

    def hidden(self) -> list[tuple[float, str]]:
        ends = [f"{STATED} {self.value}."] + [f"{HANDED} {name}." for name in self.names[:-1]]
        texts = [NUMBER.format(name=name) + end for name, end in zip(self.names, ends, strict=True)]
        return list(zip(self.depths, texts, strict=True))


def word(text: str) -> str:
    """The name at the beginning of an answer."""
    found = re.match(r"\s*([a-z]+)", text)
    return found.group(1) if found else ""


def tracking(source: Source, seed: int, chains: int = 2, hops: int = 1) -> Sample:
    """`chains` chains of `hops` hand-overs each, in order over the whole context; one chain is asked for.

    Scores 1 where the whole walk is right: an answer by luck, after a wrong hop, does not count.
    """
    rng = random.Random(f"tracking {seed}")
    order = rng.sample(KEYS, chains * (hops + 1))
    all_chains = [Chain(rng, order[i::chains]) for i in range(chains)]
    asked = rng.choice(all_chains)
    hidden = [text for chain in all_chains for text in chain.hidden()]
    question = f"\n\nWhat is the special magic number for {asked.names[-1]}?"
    step = len(source.encode(NUMBER.format(name="") + HANDED + ".")) + 2 * ROOM  # a wrong name may be ROOM tokens long
    context = source.hide(seed, HEAD, hidden, question, (hops + 1) * step)

    def prompt(outputs: Outputs) -> list[int] | None:
        """The walk so far, and the start of the next statement, about the name that it has come to."""
        if len(outputs) > hops:
            return None
        walk, name = "", asked.names[-1]
        for output in outputs:
            walk, name = walk + NUMBER.format(name=name) + f"{HANDED} {word(output['text'])}.", word(output["text"])
        return context + source.encode(walk + NUMBER.format(name=name) + (HANDED if len(outputs) < hops else STATED))

    def score(outputs, full):
        walked = [word(output["text"]) for output in outputs[:-1]] == asked.names[-2::-1]
        return {"": float(walked) * exact(outputs[-1]["text"], asked.value)}

    return Sample(seed, prompt, score, ROOM, stop=(".",), growing=True)
