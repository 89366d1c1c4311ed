"""What one process of the quality benchmark has to do; given to it as JSON on its standard input."""

import json
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from transformers import AutoTokenizer

from . import outputs as store
from .suites import Sample, draw
from .suites.source import Source


@dataclass(frozen=True)
class Plan:
    """Either `settings`, or `alternative` with its sizes, or neither: full attention by vLLM's own backend."""

    model: str  # folder
    data: str  # folder, see suites/source.py
    context: int  # tokens of a prompt and its answer
    suites: list[str]
    seed: int  # of the first sample
    n: int
    outputs: str = ""  # folder
    cache: int | None = None  # bytes of vLLM's KV cache; None: what vLLM finds free
    settings: dict | None = None  # deltamem's
    alternative: str | None = None  # name in alternatives.ALTERNATIVES
    room: int = 0  # bytes that a sequence of it may hold
    segment: int = 0  # tokens that it reads at a time

    @classmethod
    def read(cls) -> "Plan":
        return cls(**json.load(sys.stdin))

    def written(self) -> str:
        return json.dumps(asdict(self))

    def path(self, suite: str) -> Path:
        """Where the outputs of a suite go."""
        return Path(self.outputs) / f"{suite}.jsonl"

    @cached_property
    def samples(self) -> dict[str, list[Sample]]:
        """Suite -> its samples."""
        source = Source(AutoTokenizer.from_pretrained(self.model), Path(self.data), self.context)
        return {suite: draw(suite, source, self.seed, self.n) for suite in self.suites}

    def waiting(self) -> list[tuple[str, Sample]]:
        """The samples that have no outputs yet, each with its suite."""
        kept = {suite: store.kept(self.path(suite), samples) for suite, samples in self.samples.items()}
        return [(suite, s) for suite, samples in self.samples.items() for s in samples if s.seed not in kept[suite]]
