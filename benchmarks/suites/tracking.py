"""Variable tracking: a value assigned once and handed on from variable to variable (RULER, arXiv 2404.06654).

RULER has the model list all variables of a chain at once, which no model below a few billion parameters does.
Here it walks the chain, one hop a prompt, from the last variable back to the value; a wrong hop leads astray.
"""

import random
import re
import string

from .needle import exact
from .sample import Outputs, Sample
from .source import Source

HEAD = "Variables are assigned in the following text. Remember their values.\n\n"
QUESTION = "\n\nQuestion: What is the value of VAR {name}?\nAnswer:"
ROOM = 12
LETTERS = 3


class Chain:
    """Variables, the first of which holds the value; each other takes over the one before it."""

    def __init__(self, rng: random.Random, names: list[str]):
        self.names = names
        self.value = str(rng.randrange(10**4, 10**5))
        self.depths = sorted(rng.random() for _ in names)

    def hidden(self) -> list[tuple[float, str]]:
        sources = [self.value] + [f"VAR {name}" for name in self.names[:-1]]
        texts = [f" VAR {name} = {source}." for name, source in zip(self.names, sources, strict=True)]
        return list(zip(self.depths, texts, strict=True))


def tracking(source: Source, seed: int, chains: int = 2, hops: int = 1) -> Sample:
    """`chains` chains of `hops` hand-overs each, in order over the whole context; one chain is asked for."""
    rng = random.Random(f"tracking {seed}")
    names: set[str] = set()
    while len(names) < chains * (hops + 1):
        names.add("".join(rng.choices(string.ascii_uppercase, k=LETTERS)))
    order = rng.sample(sorted(names), len(names))
    all_chains = [Chain(rng, order[i::chains]) for i in range(chains)]
    asked = rng.choice(all_chains)
    hidden = [text for chain in all_chains for text in chain.hidden()]
    walked = hops * len(source.encode(" VAR QXZ = VAR QXZ.")) + len(source.encode(" VAR QXZ ="))
    question = QUESTION.format(name=asked.names[-1])
    context = source.hide(seed, HEAD, hidden, question, walked + ROOM)

    def prompt(outputs: Outputs) -> list[int] | None:
        """The walk so far, and the start of the next statement about the variable that it has come to."""
        if len(outputs) > hops:
            return None
        walk, name = "", asked.names[-1]
        for output in outputs:
            found = re.search(r"[A-Z]+", output["text"])
            previous = found.group() if found else ""
            walk, name = walk + f" VAR {name} = VAR {previous}.", previous
        step = f" VAR {name} =" + (" VAR" if len(outputs) < hops else "")
        return context + source.encode(walk + step)

    def score(outputs, full):
        return {"": exact(outputs[-1]["text"], asked.value)}

    return Sample(seed, prompt, score, ROOM)
