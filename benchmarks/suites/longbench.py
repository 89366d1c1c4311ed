"""LongBench (arXiv 2308.14508): its prompts, answer lengths and metrics, written from the paper.

Two deviations: Chinese is compared by character where the paper cuts words with jieba, and similarity of
code is 1 - Levenshtein distance / longer length.
"""

import random
import re
import string
from collections import Counter

from .sample import Sample, ask
from .source import Source, pick

PUNCTUATION = string.punctuation + "，。！？、；：“”‘’（）《》【】…—"


def words(text: str) -> list[str]:
    """Lower case, no punctuation, no articles; every Chinese character is a word of its own."""
    text = "".join(c for c in text.lower() if c not in PUNCTUATION)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return re.sub(r"([\u4e00-\u9fff])", r" \1 ", text).split()


def f1(overlap: float, guessed: int, gold: int) -> float:
    return 2 * overlap / (guessed + gold) if overlap else 0.0


def qa_f1(guess: str, gold: str) -> float:
    a, b = words(guess), words(gold)
    return f1(sum((Counter(a) & Counter(b)).values()), len(a), len(b))


def rouge_l(guess: str, gold: str) -> float:
    """F1 of the longest common subsequence of words (Lin, 2004)."""
    a, b = words(guess), words(gold)
    row = [0] * (len(b) + 1)
    for x in a:
        previous = 0
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], previous + 1 if x == y else max(row[j], row[j - 1])
    return f1(row[-1], len(a), len(b))


def classification(guess: str, gold: str, classes: list[str]) -> float:
    """1 / (classes named) where the right one is named; a class that is part of the right name is not."""
    named = [c for c in classes if c in guess and (c == gold or c not in gold)]
    return 1 / len(named) if gold in named else 0.0


def numbers(guess: str, gold: str) -> float:
    """Share of the numbers in the guess that are the number in the gold answer: retrieval and count."""
    found, right = re.findall(r"\d+", guess), re.findall(r"\d+", gold)[0]
    return found.count(right) / len(found) if found else 0.0


def edit_similarity(guess: str, gold: str) -> float:
    """1 - Levenshtein distance / longer length, of the first line that is code."""
    lines = [line for line in guess.lstrip("\n").split("\n") if not re.search(r"`|#|//", line)]
    guess = lines[0] if lines else ""
    row = list(range(len(gold) + 1))
    for i, x in enumerate(guess, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(gold, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return 1 - row[-1] / max(len(guess), len(gold), 1)


TASKS = {  # metric, longest answer in tokens, whether the prompt is a chat turn
    "narrativeqa": (qa_f1, 128, True),
    "qasper": (qa_f1, 128, True),
    "multifieldqa_en": (qa_f1, 64, True),
    "multifieldqa_zh": (qa_f1, 64, True),
    "hotpotqa": (qa_f1, 32, True),
    "2wikimqa": (qa_f1, 32, True),
    "musique": (qa_f1, 32, True),
    "dureader": (rouge_l, 128, True),
    "gov_report": (rouge_l, 512, True),
    "qmsum": (rouge_l, 512, True),
    "multi_news": (rouge_l, 512, True),
    "vcsum": (rouge_l, 512, True),
    "trec": (classification, 64, False),
    "triviaqa": (qa_f1, 32, False),
    "samsum": (rouge_l, 128, False),
    "lsht": (classification, 64, False),
    "passage_count": (numbers, 32, True),
    "passage_retrieval_en": (numbers, 32, True),
    "passage_retrieval_zh": (numbers, 32, True),
    "lcc": (edit_similarity, 64, False),
    "repobench-p": (edit_similarity, 64, False),
}
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # few-shot tasks: the model goes on with more examples


def judge(task: str, guess: str, gold: list[str] | dict) -> float:
    """The best score over the gold answers; `gold` of a classification also lists `all_classes`."""
    metric = TASKS[task][0]
    if task in FIRST_LINE:
        guess = guess.lstrip("\n").split("\n")[0]
    if metric is classification:
        return max(classification(guess, answer, gold["all_classes"]) for answer in gold["answers"])
    return max(metric(guess, answer) for answer in gold)


def longbench(source: Source, seed: int) -> Sample | None:
    """A sample of longbench*.jsonl, cut in the middle to the context as in the paper; short ones stay short.

    The score is also given as a part of its task.
    """
    records = source.records("longbench*.jsonl")
    random.Random(0).shuffle(records)  # they come task by task
    record = pick(records, seed)
    if record is None:
        return None
    task, gold = record["task"], record["gold"]
    _, room, chat = TASKS[task]
    mark = "<<prompt>>"
    before, after = source.start, []
    if chat:
        text = source.tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
        before, after = map(source.encode, text.split(mark))
    tokens = source.encode(record["prompt"])
    keep = source.context - room - len(before) - len(after)
    if len(tokens) > keep:
        tokens = tokens[: keep // 2] + tokens[len(tokens) - (keep - keep // 2) :]

    def score(outputs, full):
        value = judge(task, outputs[0]["text"], gold)
        return {"": value, task: value}

    return Sample(seed, ask(before + tokens + after), score, room)
