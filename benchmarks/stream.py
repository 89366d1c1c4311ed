"""Reads a stream far longer than the context that a model was made for, in a memory of fixed size, inside vLLM.

    python benchmarks/stream.py --model DIR --text FILE
    python benchmarks/stream.py --model DIR --text FILE --length 200000 --memory 1229

Perplexity of stretches along the stream, against full attention that reads only the last three quarters of the
trained context before the end of the same stretch; and needles hidden in the last trained context of the stream,
asked for at its end, against full attention and a fresh memory that read only this last context. Every engine
runs in a process of its own. Rows go to benchmarks/results.jsonl.
"""

import argparse
import math
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common
from benchmarks.engine import start
from benchmarks.suites.needle import HEAD, KEYS, NEEDLE, QUESTION, ROOM, exact
from benchmarks.suites.source import clean_book

SCORED = 1024  # tokens of a stretch
NEEDLES = 8
POINTS = 3  # stretches along the stream, besides the first
SLACK = 128  # room for a question and its answer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder; its name names the rows")
    parser.add_argument("--text", type=Path, required=True, help="English text of at least --length tokens")
    parser.add_argument("--length", type=int, default=100_000, help="tokens of the stream")
    parser.add_argument("--memory", type=int, help="tokens per head; default: 15%% of the trained context")
    parser.add_argument("--seed", type=int, default=2000, help="of the needles")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="file that the rows are added to")
    return parser.parse_args()


class Stream:
    """The tokens of a text with needles in its last `recent` tokens, and the questions about them."""

    def __init__(self, tokenizer, text: str, length: int, recent: int, seed: int):
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False).input_ids

        rng = random.Random(f"stream {seed}")
        self.numbers = {name: str(rng.randrange(10**6, 10**7)) for name in rng.sample(KEYS, NEEDLES)}
        self.questions = [encode(QUESTION.format(key=name)) for name in self.numbers]
        self.head = tokenizer("").input_ids + encode(HEAD)
        needles = [encode(NEEDLE.format(key=name, number=number)) for name, number in self.numbers.items()]
        book, room = encode(text), sum(map(len, needles)) + len(self.head)
        if len(book) < length - room:
            raise ValueError(f"The text has {len(book)} tokens: give a longer one, or a --length of at most that.")
        book = book[: length - room]
        self.tokens, done = list(self.head), 0
        self.distances = []
        for i, needle in enumerate(needles):
            cut = len(book) - (recent - room) * (NEEDLES - i) // NEEDLES
            while cut < len(book) and not tokenizer.decode([book[cut - 1]]).rstrip("\"'”’ ").endswith("."):
                cut += 1
            self.tokens += book[done:cut] + needle
            self.distances.append(length - len(self.tokens))
            done = cut
        self.tokens += book[done:]

    def last(self, count: int, end: int | None = None) -> list[int]:
        """The head and the tokens up to `end` of the stream, `count` of them altogether."""
        end = len(self.tokens) if end is None else end
        return self.head + self.tokens[end - count + len(self.head) : end]


class Reader:
    """An engine that reads and answers."""

    def __init__(self, model: str, settings: dict | None, length: int):
        self.engine, self.sessions = start(model, settings, length, enforce_eager=True), settings is not None

    def read(self, tokens: list[int], name: str, scored: int = 0) -> list[float]:
        """Negative log-likelihoods in nats of the last tokens, one fewer than `scored`.

        A memory goes on where it last stopped as session `name`, and stays as that session.
        """
        if self.sessions or not scored:
            self._run({name: (tokens[: len(tokens) - scored], 1)}, None, name)
        if not scored:
            return []
        rows = self._run({name: (tokens, 1)}, 0, f"{name}, scored")[name].prompt_logprobs
        found = [-rows[i][tokens[i]].logprob for i in range(len(tokens) - scored + 1, len(tokens))]
        print(f"{name}: perplexity {perplexity(found):.3f} up to token {len(tokens):,}", flush=True)
        return found

    def ask(self, tokens: list[int], questions: list[list[int]], name: str) -> list[str]:
        """Answers to questions, each asked right after the tokens that were read as `name`."""
        prompts = {f"{name}-{i}": (tokens + question, ROOM) for i, question in enumerate(questions)}
        if self.sessions:
            self._copy(name, prompts)
        done = self._run(prompts, None, f"{name}, asked")
        return [done[key].outputs[0].text for key in prompts]

    def _copy(self, name: str, copies) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        from vllm_deltamem.enginestore import open_store
        from vllm_deltamem.sessionname import tenant_of

        store, tenant = open_store(self.engine.vllm_config, 0), tenant_of(None)
        get_kv_transfer_group().worker.carrier.finish()  # it is written beside the steps
        session = store.restore(tenant, name)
        for copy in copies:
            store.save(tenant, copy, session.tokens, session.slab)

    def _run(self, prompts: dict[str, tuple[list[int], int]], prompt_logprobs: int | None, title: str) -> dict:
        from vllm import SamplingParams

        for name, (tokens, count) in prompts.items():
            extra = {"deltamem_session": name} if self.sessions else None
            sampling = SamplingParams(
                temperature=0, max_tokens=count, prompt_logprobs=prompt_logprobs,
                flat_logprobs=prompt_logprobs is not None, extra_args=extra,
                # start from the session even so: the rows of its tokens hold nothing, and cannot be decoded
                skip_reading_prefix_cache=False if self.sessions else None, detokenize=prompt_logprobs is None,
            )  # fmt: skip
            self.engine.add_request(name, {"prompt_token_ids": tokens}, sampling)
        scheduler, done = self.engine.engine_core.engine_core.scheduler, {}
        with tqdm(total=sum(len(tokens) for tokens, _ in prompts.values()), unit="token", desc=title) as bar:
            while self.engine.has_unfinished_requests():
                done |= {request.request_id: request for request in self.engine.step() if request.finished}
                waiting = [r.num_computed_tokens for r in scheduler.requests.values() if r.request_id not in done]
                bar.update(sum(len(prompts[name][0]) for name in done) + sum(waiting) - bar.n)
        return done


def full_attention(model: str, stream: Stream, trained: int, ends: list[int]) -> tuple[list[list[float]], list[str]]:
    """Of full attention: likelihoods of the stretches that end there, and answers."""
    reader = Reader(model, None, trained)
    likelihoods = [reader.read(stream.last(trained * 3 // 4, end), f"full-{end}", SCORED) for end in ends]
    recent = stream.last(trained - SLACK)
    return likelihoods, reader.ask(recent, stream.questions, "full")


def memory(model: str, settings: dict, stream: Stream, trained: int, ends: list[int]):
    """Of the memory: likelihoods of the same stretches, answers at the end of the stream, and of a fresh memory."""
    reader = Reader(model, settings, len(stream.tokens) + SLACK)
    recent = stream.last(trained - SLACK)
    reader.read(recent, "recent")
    fresh = reader.ask(recent, stream.questions, "recent")
    likelihoods = [reader.read(stream.tokens[:end], "stream", SCORED) for end in ends]
    return likelihoods, reader.ask(stream.tokens, stream.questions, "stream"), fresh


def perplexity(likelihoods: list[float]) -> float:
    return math.exp(fmean(likelihoods))


def apart(function, *arguments):
    """The function's result from a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    args = parse()
    trained = AutoConfig.from_pretrained(args.model).max_position_embeddings
    held = args.memory or round(0.15 * trained)
    text = clean_book(args.text.read_text(encoding="utf-8-sig"))
    stream = Stream(AutoTokenizer.from_pretrained(args.model), text, args.length, trained - 2 * SLACK, args.seed)
    first = trained * 3 // 4
    model = str(args.model.absolute())
    ends = [first + (len(stream.tokens) - first) * i // POINTS for i in range(POINTS + 1)]
    with TemporaryDirectory() as folder:
        settings = {"memory": held, "sessions": {"directory": folder}}
        ours, answers, fresh = apart(memory, model, settings, stream, trained, ends)
    theirs, wanted = apart(full_attention, model, stream, trained, ends)

    rows = [
        {"metric": "perplexity", "context": end, "n": len(a), "value": perplexity(a), "full_value": perplexity(b),
         "ci95": common.paired_interval(a, b, perplexity)}
        for end, a, b in zip(ends, ours, theirs, strict=True)
    ]  # fmt: skip
    right = [[exact(*pair) for pair in zip(a, stream.numbers.values(), strict=True)] for a in (answers, fresh, wanted)]
    rows.append(
        {"metric": "needles", "context": len(stream.tokens), "n": NEEDLES, "value": fmean(right[0]),
         "fresh_value": fmean(right[1]), "full_value": fmean(right[2]),
         "distances": {d: found for d, *found in zip(stream.distances, *right, strict=True)}}
    )  # fmt: skip
    shared = {"model": args.model.name, "backend": "DELTAMEM", "memory_tokens": held, "trained": trained}
    common.append([shared | row for row in rows], "stream", args.results)
    for row in rows:
        print({key: row[key] for key in row if key != "n"})
    print(*zip(stream.distances, stream.numbers.values(), answers, fresh, wanted, strict=True), sep="\n")


if __name__ == "__main__":
    main()
