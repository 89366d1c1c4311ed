"""Key-value retrieval (Lost in the Middle, arXiv 2307.03172): values of one or several keys of a JSON object."""

import random
from bisect import bisect_right

from .sample import Sample, ask
from .source import Source, pick

SPARE = 40  # tokens for braces, line ends and the answer's end
HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
QUESTION = '\n\nKey: "{key}"\nCorresponding value: "'


def block(records: list[tuple[str, str]]) -> str:
    lines = ",\n ".join(f'"{key}": "{value}"' for key, value in records)
    return "{" + lines + "}"


def sample(source: Source, seed: int, records: list[tuple[str, str]], asked: list[tuple[str, str]], depth: float):
    """The records as one JSON object, a novel filling what they leave of the context; scores the share of `asked`.

    Of several also in parts, by the half of the records that they are in.
    """
    tails = [source.encode(QUESTION.format(key=key)) for key, _ in asked]
    room = max(len(source.encode(value)) for _, value in asked) + 8
    hidden = [(depth, "\n\n" + block(records) + "\n\n")]
    context = source.hide(seed, HEAD, hidden, "", max(map(len, tails)) + room)

    place = {key: i for i, (key, _) in enumerate(records)}

    def score(outputs, full):
        given = [output["text"].split('"')[0].strip() for output in outputs]
        right = {key: float(a == value) for a, (key, value) in zip(given, asked, strict=True)}
        parts = {"": sum(right.values()) / len(right)}
        for half in (0, 1) if len(asked) > 1 else ():
            own = [r for key, r in right.items() if place[key] * 2 // len(records) == half]
            parts |= {f"half {half + 1}": sum(own) / len(own)} if own else {}
        return parts

    shared = len(context) if len(asked) > 1 else 0
    return Sample(seed, ask(*(context + tail for tail in tails)), score, room, stop=('"',), shared=shared)


def fitting(source: Source, records: list[tuple[str, str]], asked: list[tuple[str, str]]) -> int:
    """How many of the records leave room for any of the questions and its answer."""
    around = max(len(source.encode(HEAD + QUESTION.format(key=key) + value)) for key, value in asked) + SPARE
    counts = range(1, len(records) + 1)
    return bisect_right(counts, source.context - around, key=lambda n: len(source.encode(block(records[:n]))))


def generated(source: Source, seed: int, pairs: int | None = None, digits: int = 8) -> Sample:
    """`pairs` random records at a random depth of a novel; None: as many as the context holds."""
    rng = random.Random(f"retrieval {seed}")
    drawn = [f"{rng.getrandbits(4 * digits):0{digits}x}" for _ in range(2 * (pairs or source.context // 8))]
    records = list(zip(drawn[::2], drawn[1::2], strict=True))
    if pairs is None:
        records = records[: fitting(source, records, records[:1])]
    asked = [rng.choice(records)]
    return sample(source, seed, records, asked, rng.random())


def recorded(source: Source, seed: int, questions: int = 1) -> Sample | None:
    """A sample of kv_retrieval*.jsonl, with as many of its records as the context holds; asks for `questions`."""
    record = pick(source.records("kv_retrieval*.jsonl"), seed)
    if record is None:
        return None
    own, records = (record["key"], record["value"]), [tuple(r) for r in record["ordered_kv_records"]]
    others = [r for r in records if r[0] != own[0]]
    random.Random(f"retrieval {seed}").shuffle(others)
    drawn = [own, *others]
    asked = drawn[:questions]
    kept = set(drawn[: fitting(source, drawn, asked)])
    return sample(source, seed, [r for r in records if r in kept], asked, 1.0)
