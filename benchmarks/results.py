"""The rows of results.jsonl as figures and tables take them: of those that measure the same thing the last."""

import json
from pathlib import Path

KEYS = {  # of each benchmark: what a row measures
    "quality": ("model", "suite", "context", "reduction", "policy"),
    "sessions": ("model", "backend", "reuse", "memory_tokens", "turn", "metric"),
}
TITLES = {  # what readers are shown of quality, in this order; other rows are parts of these
    "needle1": "a number hidden in a novel",
    "needle4": "one of four hidden numbers",
    "needle_many": "four hidden numbers, all asked for",
    "needle_depth": "a number, at every depth",
    "pins": "a number among imitations, pinned",
    "pins/unpinned": "the same, not pinned",
    "tracking": "a value handed on from name to name",
    "kv": "key-value pairs, a context full",
    "kv16": "16 key-value pairs in a novel",
    "kv75": "75 key-value pairs",
    "kv75_many": "75 key-value pairs, eight asked for",
    "babi": "bAbI facts in a novel",
    "longbench": "LongBench",
    "mmlu": "MMLU, 5 shots",
    "agent10": "agent, 10 errands",
    "agent30": "agent, 30 errands",
    "agent100": "agent, 100 errands",
    "airline": "next call of a recorded agent",
    "airline/name": "the tool of that call",
    "language/perplexity": "perplexity of a novel",
    "language/kl": "KL from full attention, nats",
    "language/top1": "same likeliest token",
}


def last(results: Path, benchmark: str) -> list[dict]:
    """The rows of a benchmark, one for each of its KEYS; rows without one of them are left out.

    Of rows that measure the same thing the last in the file: rows of trials stand before those of what ships.
    """
    found = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["benchmark"] == benchmark and all(key in row for key in KEYS[benchmark]):
            found[tuple(row[key] for key in KEYS[benchmark])] = row
    return list(found.values())


def values(rows: list[dict], key: str) -> list:
    return sorted({row[key] for row in rows})


def pick(rows: list[dict], **fields) -> list[dict]:
    return [row for row in rows if all(row[key] == value for key, value in fields.items())]
