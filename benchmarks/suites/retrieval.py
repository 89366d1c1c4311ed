"""Key-value retrieval (Lost in the Middle, arXiv 2307.03172): the value of one key of a JSON object."""

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


def sample(source: Source, seed: int, records: list[tuple[str, str]], key: str, value: str, depth: float):
    """The records as one JSON object, a novel filling what they leave of the context."""
    room = len(source.encode(value)) + 8
    hidden = [(depth, "\n\n" + block(records) + "\n\n")]
    prompt = source.hide(seed, HEAD, hidden, QUESTION.format(key=key), room)

    def score(outputs, full):
        return {"": float(outputs[0]["text"].split('"')[0].strip() == value)}

    return Sample(seed, ask(prompt), score, room, stop=('"',))


def fitting(source: Source, records: list[tuple[str, str]], key: str, value: str) -> int:
    """How many of the records leave room for the question and the answer."""
    left = source.context - len(source.encode(HEAD + QUESTION.format(key=key) + value)) - SPARE
    counts = range(1, len(records) + 1)
    return bisect_right(counts, left, key=lambda n: len(source.encode(block(records[:n]))))


def generated(source: Source, seed: int, pairs: int | None = None, digits: int = 8) -> Sample:
    """`pairs` random records at a random depth of a novel; None: as many as the context holds."""
    rng = random.Random(f"retrieval {seed}")
    drawn = [f"{rng.getrandbits(4 * digits):0{digits}x}" for _ in range(2 * (pairs or source.context // 8))]
    records = list(zip(drawn[::2], drawn[1::2], strict=True))
    if pairs is None:
        records = records[: fitting(source, records, *records[0])]
    key, value = rng.choice(records)
    return sample(source, seed, records, key, value, rng.random())


def recorded(source: Source, seed: int) -> Sample | None:
    """A sample of kv_retrieval*.jsonl, with as many of its records as the context holds."""
    record = pick(source.records("kv_retrieval*.jsonl"), seed)
    if record is None:
        return None
    key, value = record["key"], record["value"]
    records = [tuple(r) for r in record["ordered_kv_records"]]
    others = [r for r in records if r[0] != key]
    random.Random(f"retrieval {seed}").shuffle(others)
    kept = {(key, value), *others[: fitting(source, [(key, value), *others], key, value) - 1]}
    records = [r for r in records if r in kept]
    return sample(source, seed, records, key, value, 1.0)
