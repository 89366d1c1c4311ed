"""MMLU (arXiv 2009.03300), five-shot: the likeliest of the four letters after 'Answer:'."""

from .sample import Sample, ask
from .source import Source, pick

LETTERS = "ABCD"


def asked(record: dict) -> str:
    choices = "".join(f"{letter}. {record[f'choice{i}']}\n" for i, letter in enumerate(LETTERS))
    return f"{record['question'].strip()}\n{choices}Answer:"


def solved(record: dict) -> str:
    return f"{asked(record)} {LETTERS[int(record['answer'])]}\n\n"


def topic(subject: str) -> str:
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def mmlu(source: Source, seed: int) -> Sample | None:
    """A question after five solved ones of its subject, mostly far shorter than the context and not padded.

    Raises ValueError where the prompt is longer than the context or a letter is not one token.
    """
    record = pick(source.records("mmlu/test.jsonl"), seed)
    if record is None:
        return None
    shots = source.records("mmlu/dev.jsonl")
    own = [r for r in shots if r["subject"] == record["subject"]][:5]
    prompt = source.encode(topic(record["subject"]) + "".join(map(solved, own)) + asked(record))
    room = source.context - 1 - len(source.start) - len(prompt)
    if room < 0:
        raise ValueError(f"A context of {source.context} tokens is too short for MMLU by {-room} tokens.")
    letters = [source.encode(" " + letter) for letter in LETTERS]
    if any(len(tokens) != 1 for tokens in letters):
        raise ValueError("MMLU needs a tokenizer that has ' A' to ' D' as one token each.")
    choices = tuple(tokens[0] for tokens in letters)
    gold = choices[int(record["answer"])]
    return Sample(
        seed,
        ask(source.start + prompt),
        lambda outputs, full: {"": float(outputs[0]["choice"] == gold)},
        choices=choices,
    )
