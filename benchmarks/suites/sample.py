"""The sample: prompts for one engine and the judgement of what it answered."""

from collections.abc import Callable
from dataclasses import dataclass

Outputs = list[dict]


@dataclass(frozen=True)
class Sample:
    """One unit of a score, built from its seed alone; the same for every policy. Prompt and answer fit the context.

    An output is what the engine gave for one prompt: `text`, and where asked for `choice` (the likeliest of
    `choices`), `nll` [scored] in nats, `top` (token ids and log-probabilities of the likeliest tokens).
    """

    seed: int
    prompt: Callable[[Outputs], list[int] | None]  # the next prompt, given the outputs so far; None: finished
    score: Callable[[Outputs, Outputs], dict[str, float]]  # (outputs, full attention's) -> part -> score
    max_tokens: int = 1
    stop: tuple[str, ...] = ()
    choices: tuple[int, ...] = ()  # token ids to choose among
    scored: int = 0  # last tokens of the prompt whose distribution is wanted
    pinned: tuple[str | None, ...] = ()  # text that is pinned in each prompt, where the memory can pin
    growing: bool = False  # a prompt begins with the one before it and its answer: an engine may go on from there
    shared: int = 0  # tokens that all its prompts begin with: an engine may read them once


def ask(*prompts: list[int]) -> Callable[[Outputs], list[int] | None]:
    """The `prompt` of a sample whose prompts do not depend on the answers."""
    return lambda outputs: prompts[len(outputs)] if len(outputs) < len(prompts) else None
