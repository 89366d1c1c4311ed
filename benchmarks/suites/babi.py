"""bAbI's facts (arXiv 1502.05698) scattered through a novel, as BABILong does (arXiv 2406.10149)."""

import random
import re
from pathlib import Path

from .sample import Sample, ask
from .source import Source, pick

HEAD = "Facts about a few people are hidden in the following text. Remember all of them.\n\n"
QUESTION = "\n\nAnswer from the facts alone, with one word.\n{examples}Question: {question}\nAnswer:"
ROOM = 8


def stories(path: Path) -> list[tuple[list[str], str, str]]:
    """(facts, question, answer) for the first question of each story of a task file."""
    found, facts, asked = [], [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        number, text = line.split(" ", 1)
        if number == "1":
            facts, asked = [], False
        if "\t" not in text and "|" not in text:
            facts.append(text.strip())
        elif not asked:
            question, answer = re.split(r"\s*[\t|]", text)[:2]
            found.append((list(facts), question.strip(), answer.strip()))
            asked = True
    return found


def read(source: Source, task: str, kind: str) -> list[tuple[list[str], str, str]]:
    return [story for path in source.files(f"babi_en/{task}_*{kind}.txt") for story in stories(path)]


def babi(source: Source, seed: int, tasks: tuple[str, ...], examples: int = 3) -> Sample | None:
    """One story of the task whose turn it is; scores the first word, also as a part of its task."""
    task = tasks[seed % len(tasks)]
    item = pick(read(source, task, "test"), seed)
    if item is None:
        return None
    facts, question, answer = item
    rng = random.Random(f"babi {seed}")
    depths = sorted(rng.random() for _ in facts)
    shown = "".join(
        f"Facts: {' '.join(f)}\nQuestion: {q}\nAnswer: {a}\n\n"
        for f, q, a in rng.sample(read(source, task, "train"), examples)
    )
    tail = QUESTION.format(examples=shown, question=question)
    prompt = source.hide(seed, HEAD, [(d, " " + f) for d, f in zip(depths, facts, strict=True)], tail, ROOM)

    def score(outputs, full):
        words = re.findall(r"[\w,]+", outputs[0]["text"])
        right = float(bool(words) and words[0].lower() == answer.lower())
        return {"": right, task: right}

    return Sample(seed, ask(prompt), score, ROOM, stop=("\n",))
