"""The last quarter of a stretch of a novel: perplexity, and how far predictions leave full attention's."""

import math

from .sample import Outputs, Sample, ask
from .source import Source

TOP = 64  # log-probabilities kept per token


def divergence(full: tuple[list[int], list[float]], other: tuple[list[int], list[float]]) -> float:
    """KL(full || other) in nats of two next-token distributions given by their likeliest tokens.

    Both are coarsened to the tokens that both list and one event for all others, so this is a lower bound of
    the true divergence (data processing inequality).
    """
    p, q = dict(zip(*full, strict=True)), dict(zip(*other, strict=True))
    shared = p.keys() & q.keys()
    total = sum(math.exp(p[t]) * (p[t] - q[t]) for t in shared)
    rest_p = max(1 - sum(math.exp(p[t]) for t in shared), 1e-6)
    rest_q = max(1 - sum(math.exp(q[t]) for t in shared), 1e-6)
    return max(0.0, total + rest_p * math.log(rest_p / rest_q))


def agreement(outputs: Outputs, full: Outputs) -> dict[str, float]:
    """Mean negative log-likelihood (as `perplexity`, see quality.summary), KL and same likeliest token."""
    nll, ours, theirs = outputs[0]["nll"], outputs[0]["top"], full[0]["top"]
    return {
        "perplexity": sum(nll) / len(nll),
        "kl": sum(map(divergence, theirs, ours)) / len(ours),
        "top1": sum(a[0][0] == b[0][0] for a, b in zip(theirs, ours, strict=True)) / len(ours),
    }


def language(source: Source, seed: int) -> Sample:
    prompt = source.start + source.filler(seed, source.context - 1 - len(source.start))
    return Sample(seed, ask(prompt), agreement, scored=source.context // 4)
