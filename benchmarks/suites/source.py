"""Where samples come from: the tokenizer, the data folder and the context length."""

import json
import random
import re
from functools import cached_property, lru_cache
from pathlib import Path

TRAINING_BOOKS = ("war_and_peace", "great_expectations")
VALIDATION_BOOKS = ("dracula",)
SPLIT_STARTS = {"training": 0, "validation": 1000, "reported": 2000}


def split_of(seed: int) -> str:
    """Training seeds are below 1000, validation 1000 to 1999, reported from 2000."""
    return "training" if seed < 1000 else "validation" if seed < 2000 else "reported"


def take_split(items: list, seed: int) -> list:
    """The part of `items` that the split of `seed` may use: half is reported, a quarter each the others'."""
    quarters = {"training": (0,), "validation": (1,), "reported": (2, 3)}[split_of(seed)]
    return [item for i, item in enumerate(items) if i % 4 in quarters]


def place(seed: int) -> int:
    """The seed's place among those of its split, from 0."""
    return seed - SPLIT_STARTS[split_of(seed)]


def pick(items: list, seed: int):
    """The item of this seed, each item once per split; None when the split has no more."""
    part = take_split(items, seed)
    return part[place(seed)] if place(seed) < len(part) else None


def clean_book(text: str) -> str:
    """A Project Gutenberg text without its licence, one line per paragraph."""
    text = re.split(r"\*\*\* ?START OF[^\n]*\n", text)[-1]
    text = re.split(r"\*\*\* ?END OF", text)[0]
    return "\n\n".join(" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if p.strip())


class Source:
    """Tokens for samples whose prompt and answer fill `context` tokens of `tokenizer`.

    `data` is laid out as books/*.txt, mmlu/{dev,test}.jsonl, babi_en/*.txt, longbench*.jsonl,
    kv_retrieval*.jsonl and agent*.json; a suite needs only its own part of it.
    """

    def __init__(self, tokenizer, data: Path, context: int):
        self.tokenizer = tokenizer
        self.data = data
        self.context = context
        self.book = lru_cache(self._book)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @cached_property
    def start(self) -> list[int]:
        """What the model expects before any text: its BOS token, or nothing."""
        return self.tokenizer("").input_ids

    def chat(self, messages: list[dict], answer: str = "") -> list[int]:
        """The conversation in the model's own chat format, and the first words of the answer to come."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.encode(text + answer)

    def files(self, pattern: str) -> list[Path]:
        """Raises ValueError where the data folder holds no such file."""
        found = sorted(self.data.glob(pattern))
        if not found:
            raise ValueError(f"The data folder has no {pattern}: give --data the folder that holds it.")
        return found

    def records(self, pattern: str) -> list[dict]:
        """The lines of all matching .jsonl files."""
        return [json.loads(line) for path in self.files(pattern) for line in path.open(encoding="utf-8")]

    def _book(self, path: Path) -> list[int]:
        return self.encode(clean_book(path.read_text(encoding="utf-8-sig")))

    def filler(self, seed: int, n: int) -> list[int]:
        """`n` tokens of a novel that the split of `seed` may use, from a place that the seed picks."""
        named = {"training": TRAINING_BOOKS, "validation": VALIDATION_BOOKS}.get(split_of(seed))
        known = TRAINING_BOOKS + VALIDATION_BOOKS
        books = [p for p in self.files("books/*.txt") if (p.stem in named if named else p.stem not in known)]
        rng = random.Random(f"filler {seed}")
        book = self.book(rng.choice(books))
        i = rng.randrange(max(1, len(book) - n))
        tokens = book[i : i + n]
        while len(tokens) < n:
            tokens = tokens + book[: n - len(tokens)]
        return tokens

    def hide(self, seed: int, head: str, hidden: list[tuple[float, str]], tail: str, room: int) -> list[int]:
        """A prompt of `context - room` tokens: head, a novel with the `hidden` texts in it, tail.

        A hidden text is (depth in [0, 1], text); it goes to the sentence end nearest below its depth, and
        texts of equal depth keep their order. Raises ValueError where the context is too short.
        """
        before, after = self.start + self.encode(head), self.encode(tail)
        texts = [(depth, self.encode(text)) for depth, text in sorted(hidden, key=lambda h: h[0])]
        n = self.context - room - len(before) - len(after) - sum(len(t) for _, t in texts)
        if n < 0:
            raise ValueError(f"A context of {self.context} tokens is too short for this suite, by {-n}.")
        filler = self.filler(seed, n) if n else []
        closing = {t for t in set(filler) if self.tokenizer.decode([t]).rstrip("\"'”’ ").endswith(".")}
        ends = [0] + [i + 1 for i, token in enumerate(filler) if token in closing]
        prompt, done = before, 0
        for depth, text in texts:
            cut = max(end for end in ends if end <= depth * n)
            prompt = prompt + filler[done:cut] + text
            done = cut
        return prompt + filler[done:] + after
