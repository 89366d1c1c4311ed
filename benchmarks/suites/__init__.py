"""The suites: name -> function of (source, seed) that builds a sample, or None where the data has no more."""

from functools import partial

from .agent import agent
from .airline import airline
from .babi import babi
from .language import language
from .longbench import longbench
from .mmlu import mmlu
from .needle import needle
from .pins import pins
from .retrieval import generated, recorded
from .sample import Sample
from .source import Source
from .tracking import tracking

SUITES = {
    "needle1": partial(needle, keys=1),
    "needle4": partial(needle, keys=4),
    "needle_many": partial(needle, keys=4, questions=4),
    "needle_depth": partial(needle, sweep=True),
    "pins": pins,
    "tracking": tracking,
    "kv": generated,
    "kv16": partial(generated, pairs=16),
    "kv75": recorded,
    "kv75_many": partial(recorded, questions=8),
    "babi": partial(babi, tasks=("qa1", "qa2", "qa3", "qa5", "qa7", "qa8")),
    "longbench": longbench,
    "mmlu": mmlu,
    "language": language,
    "agent10": partial(agent, turns=10),
    "agent30": partial(agent, turns=30),
    "agent100": partial(agent, turns=100),
    "airline": airline,
}


def draw(suite: str, source: Source, first: int, n: int) -> list[Sample]:
    """The samples of the seeds first to first + n - 1 that the data has. Raises ValueError if it has none."""
    samples = [SUITES[suite](source, seed) for seed in range(first, first + n)]
    samples = [sample for sample in samples if sample is not None]
    if not samples:
        raise ValueError(f"Suite {suite} has no samples for seeds from {first}: give a lower --seed.")
    return samples
