"""Variable tracking: a value assigned once and handed on from variable to variable (RULER, arXiv 2404.06654).

RULER asks for every variable of a chain; here the value of the chain's last variable is asked for, which a
small model can do, among chains that it must not mix up.
"""

import random
import string

from .needle import exact
from .sample import Sample, ask
from .source import Source

HEAD = "Variables are assigned in the following text. Remember the value of every variable.\n\n"
FIRST = " VAR {name} = {value}."
NEXT = " VAR {name} = VAR {previous}, so {name} is {previous}."
QUESTION = "\n\nQuestion: What is the value of VAR {name}? Answer: VAR {name} ="
ROOM = 12


def tracking(source: Source, seed: int, chains: int = 2, hops: int = 1) -> Sample:
    """`chains` chains of `hops` hand-overs each, in order over the whole context; one chain is asked for."""
    rng = random.Random(f"tracking {seed}")
    names = set()
    while len(names) < chains * (hops + 1):
        names.add("".join(rng.choices(string.ascii_uppercase, k=3)))
    names = rng.sample(sorted(names), len(names))
    hidden, ends = [], []
    for _ in range(chains):
        chain, names = names[: hops + 1], names[hops + 1 :]
        value = str(rng.randrange(10**4, 10**5))
        depths = sorted(rng.random() for _ in chain)
        hidden.append((depths[0], FIRST.format(name=chain[0], value=value)))
        for depth, previous, name in zip(depths[1:], chain, chain[1:], strict=False):
            hidden.append((depth, NEXT.format(name=name, previous=previous)))
        ends.append((chain[-1], value))
    name, value = rng.choice(ends)
    prompt = source.hide(seed, HEAD, hidden, QUESTION.format(name=name), ROOM)
    return Sample(
        seed, ask(prompt), lambda outputs, full: {"": exact(outputs[0]["text"], value)}, source.context, ROOM
    )
