"""What sessions cost, and whether they are sound, on real servers.

    python -m benchmarks.sessions turns --model DIR    first-token time of every turn of a growing conversation
    python -m benchmarks.sessions pauses --model DIR   how long others wait while a session is saved or restored
    python -m benchmarks.sessions soak                 thousands of turns of many sessions, on the CPU

`turns`: one conversation grows to the model's limit, or past it (--context): with a session, without one in the slot
that the turn before has left, without either, and on the stock backend, which ends at the limit, with its prefix
caching on and off. The memory is 15% of the limit, however far the conversation goes. Metrics ttft_s and
computed_tokens (of the prompt), medians of the repeats.

`pauses`: an answer is streamed while another client has two turns of a short conversation: none at all, without a name,
with one, whose memory is saved to the disk twice and restored once. Metric pause_s: the longest time between two
tokens of the stream from then on, median of the repeats.

`soak`: sessions talk several at a time to a model with random weights. Some turns are broken off, some sessions
are erased in the middle of a turn, some answers lack their beginning when the client sends them back, most slots do
not fit into host memory and come back from the directory.
Every few turns the answer is asked of a second server from the whole prompt, without a session, and compared
token by token. Metrics: rss_mb (of the server and its workers) and its slope over the second half of the turns,
answers_equal of answers_compared, wrong_histories (what the server said of a session against what must be).
"""

import argparse
import json
import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression, median

import psutil
from tqdm import tqdm

from vllm_deltamem.memory import DEFAULT_SHARE

from . import common
from .server import VllmServer
from .tiny_llama import save_tiny_llama

TEXT = Path(__file__).parent / "demo_text.txt"
OURS = "DELTAMEM"
# oneDNN keeps what it compiled for 1,024 shapes of products: with all lengths of prompts, memory would grow for
# thousands of turns until that is full, sessions or not.
SOAKED = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
HOST_BYTES = 2 << 20  # of the soak's server, less than its sessions take
LONG = 200  # tokens of an answer that is broken off: it must not end before that


def body_of(prompt: list[int], count: int, session: str | None, source: str | None = None) -> dict:
    """A request for exactly `count` tokens, greedily; source: the session that it starts from, if not from its own."""
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    names = {"deltamem_session": session, "deltamem_session_from": source}
    return body | {"vllm_xargs": {name: value for name, value in names.items() if value}}


def complete(server: VllmServer, prompt: list[int], count: int, session: str | None = None) -> tuple[list[int], str]:
    """The answer's tokens, and what the server says of the session's history. Raises requests.HTTPError."""
    response = server.call("POST", "/v1/completions", json=body_of(prompt, count, session))
    response.raise_for_status()
    said = response.json()
    history = (said.get("kv_transfer_params") or {}).get("deltamem_session", {}).get("history", "")
    return said["choices"][0]["token_ids"], history


def stream(
    server: VllmServer, prompt: list[int], count: int, session: str | None = None, source: str | None = None
) -> Iterator[dict]:
    """The events of an answer; closing the iterator breaks it off. Raises requests.HTTPError."""
    body = body_of(prompt, count, session, source) | {"stream": True, "stream_options": {"include_usage": True}}
    with server.call("POST", "/v1/completions", json=body, stream=True) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))


# turns


def measure_turns(server: VllmServer, text: list[int], turns: int, per_turn: int, answer: int, session: str | None):
    """One conversation. Yields (prompt tokens, seconds to the first token, prompt tokens computed) of every turn."""
    prompt = []
    for turn in range(turns):
        prompt += text[turn * per_turn : (turn + 1) * per_turn - answer]
        began, first, tokens = time.monotonic(), None, []
        for event in stream(server, prompt, answer, session):
            for choice in event["choices"]:
                first = first or time.monotonic() - began
                tokens += choice["token_ids"] or []
            usage = event.get("usage")
        reused = (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0
        yield len(prompt), first, len(prompt) - reused
        prompt = prompt + tokens


def turns(args: argparse.Namespace) -> list[dict]:
    import torch
    from transformers import AutoConfig, AutoTokenizer

    limit = AutoConfig.from_pretrained(args.model).max_position_embeddings
    context = args.context or limit
    memory = args.memory or round(DEFAULT_SHARE * limit)
    per_turn = context // args.turns
    if per_turn <= args.answer:
        raise ValueError(f"a turn of {per_turn} tokens has no room for an answer of {args.answer}: take fewer turns")
    text = AutoTokenizer.from_pretrained(args.model)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    text *= -(-(per_turn * args.turns + 1000 * args.repeats) // len(text))
    stock = "FLASH_ATTN" if torch.cuda.is_available() else "CPU_ATTN"
    settings = ["--additional-config", json.dumps({"deltamem": {"memory": memory}})]
    servers = [(OURS, [*settings, "--enable-prefix-caching"], ("sessions", "slots"), max(context, limit))]
    servers += [(OURS, [*settings, "--no-enable-prefix-caching"], ("none",), max(context, limit))]
    servers += [(stock, ["--enable-prefix-caching"], ("prefix caching",), limit)]
    servers += [(stock, ["--no-enable-prefix-caching"], ("none",), limit)]
    rows = []
    for backend, options, reuses, longest in servers:
        options += ["--attention-backend", backend, "--max-num-seqs", "2", "--enable-prompt-tokens-details"]
        options += ["--dtype", args.dtype]
        options += ["--max-model-len", str(longest), *([] if torch.cuda.is_available() else ["--enforce-eager"])]
        count = min(args.turns, longest // per_turn)  # turns that fit
        with (
            tempfile.TemporaryDirectory() as folder,
            VllmServer(args.model, options, Path(folder, "log"), {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}) as server,
        ):
            complete(server, text[-per_turn:], args.answer)
            for reuse in reuses:
                runs = []
                for repeat in range(args.repeats):
                    start = 1000 * repeat  # nothing of one conversation is the beginning of another
                    session = f"conversation-{repeat}" if reuse == "sessions" else None
                    run = measure_turns(server, text[start:], count, per_turn, args.answer, session)
                    runs.append(list(tqdm(run, f"{backend}, reuse: {reuse}", count, unit="turn")))
                shape = {"model": args.model.name, "backend": backend, "reuse": reuse}
                shape |= {"memory_tokens": memory if backend == OURS else None}
                shape |= {"dtype": args.dtype} if args.dtype != "auto" else {}
                for turn, figures in enumerate(zip(*runs, strict=True), 1):
                    tokens, first, computed = (median(column) for column in zip(*figures, strict=True))
                    shape |= {"turn": turn, "context": tokens, "batch": 1, "n": args.repeats}
                    rows.append(shape | {"metric": "ttft_s", "value": round(first, 4)})
                    rows.append(shape | {"metric": "computed_tokens", "value": computed})
    return rows


# pauses


def longest_pause(server: VllmServer, text: list[int], args: argparse.Namespace, talk: Callable[[], None]) -> float:
    """Seconds between two tokens of a streamed answer, at most, after talk() has begun."""
    arrivals = []
    with ThreadPoolExecutor(1) as pool:
        other = began = None
        for _ in stream(server, text, args.streamed):
            arrivals.append(time.monotonic())
            if len(arrivals) == args.before:
                began, other = arrivals[-1], pool.submit(talk)
        other.result()
    if len(arrivals) < args.streamed or time.monotonic() - arrivals[-1] > 1:
        raise ValueError("the stream ended before the conversation beside it: give a longer one, --streamed")
    return max(later - earlier for earlier, later in pairwise(arrivals) if earlier >= began)


def pauses(args: argparse.Namespace) -> list[dict]:
    import torch
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(args.model)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    rows = []
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        settings = {"deltamem": {"memory": args.memory, "sessions": {"directory": f"{folder}/sessions"}}}
        options = ["--attention-backend", OURS, "--max-num-seqs", "2", "--dtype", args.dtype]
        options += ["--additional-config", json.dumps(settings), "--no-enable-prefix-caching"]
        options += [] if torch.cuda.is_available() else ["--enforce-eager"]
        room = {"VLLM_CPU_KVCACHE_SPACE": "4"}
        with VllmServer(args.model, options, Path(folder, "log"), room) as server:
            complete(server, text[:64], 8)

            def talk(name: str | None) -> None:
                prompt = text[100:150]
                answer, _ = complete(server, prompt, 8, name)
                _, history = complete(server, prompt + answer + text[150:170], 8, name)
                if name and history != "restored":
                    raise ValueError(f"the second turn of {name} was answered anew: {history}")

            for beside in ("nobody", "unnamed", "named"):
                found = []
                for repeat in tqdm(range(args.repeats), f"beside: {beside}"):
                    name = f"talk-{repeat}" if beside == "named" else None
                    other = (lambda: None) if beside == "nobody" else partial(talk, name)
                    found.append(longest_pause(server, text[1000 + repeat :][:64], args, other))
                shape = {"model": args.model.name, "backend": OURS, "memory_tokens": args.memory, "dtype": args.dtype}
                shape |= {"beside": beside, "bytes_per_sequence": server.metrics()["bytes_per_sequence"]}
                rows.append(shape | {"metric": "pause_s", "value": round(median(found), 4), "n": args.repeats})
    return rows


# soak


@dataclass
class Conversation:
    """One session and what the server must know of it; one thread at a time has its turn."""

    name: str
    rng: random.Random
    tokens: list[int] = field(default_factory=list)
    history: str = "new"  # what the server must say of the next turn


@dataclass
class Soak:
    """The turns of all conversations, several at a time."""

    server: VllmServer
    plain: VllmServer  # never sees a session
    args: argparse.Namespace
    counts: dict[str, int] = field(default_factory=dict)
    samples: list[tuple[int, float]] = field(default_factory=list)  # turns done, MB
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        waiting, numbers = queue.SimpleQueue(), iter(tqdm(range(self.args.turns), unit="turn", mininterval=5))
        for i in range(self.args.sessions):
            waiting.put(Conversation(f"session-{i}", random.Random(i)))

        def talk() -> None:
            while True:
                with self.lock:
                    number = next(numbers, None)
                    if number is None:
                        return
                    if number % self.args.sample_every == 0:
                        self.samples.append((number, self._rss_mb()))
                conversation = waiting.get()
                self._turn(conversation, compared=number % self.args.compare_every == 0)
                waiting.put(conversation)

        with ThreadPoolExecutor(self.args.at_once) as pool:
            for future in [pool.submit(talk) for _ in range(self.args.at_once)]:
                future.result()
        self.samples.append((self.args.turns, self._rss_mb()))

    def _turn(self, talk: Conversation, compared: bool) -> None:
        """A turn, or one that is broken off, or one during which the session is erased."""
        kind = talk.rng.choices(["whole", "broken off", "erased"], [92, 4, 4])[0]
        if len(talk.tokens) + LONG + self.args.question > self.args.context:
            talk.tokens, talk.history = [], talk.history.replace("restored", "other history")
        question = [talk.rng.randrange(1, self.args.vocabulary) for _ in range(self.args.question)]
        prompt = talk.tokens + question
        self._count(kind)
        if kind == "whole":
            answer, history = complete(self.server, prompt, self.args.answer, talk.name)
            self._count("wrong_histories", history != talk.history)
            self._count("restored", history == "restored")
            if compared:
                self._count("answers_compared")
                self._count("answers_equal", answer == complete(self.plain, prompt, self.args.answer)[0])
            cut = talk.rng.randrange(len(answer)) if talk.rng.random() < 0.2 else 0  # as reasoning is left out
            self._count("answers cut", cut > 0)
            talk.tokens, talk.history = prompt + answer[cut:], "restored"
            return
        count = LONG if kind == "broken off" else self.args.answer
        with closing(stream(self.server, prompt, count, talk.name)) as events:
            next(events)
            if kind == "erased":
                self.server.call("DELETE", f"/v1/deltamem/sessions/{talk.name}")
                talk.history = "new"
                list(events)

    def _count(self, name: str, amount: int = 1) -> None:
        with self.lock:
            self.counts[name] = self.counts.get(name, 0) + amount

    def _rss_mb(self) -> float:
        """Of the server's processes."""
        root = psutil.Process(self.server.process.pid)
        return sum(process.memory_info().rss for process in (root, *root.children(recursive=True))) / 1e6


def soak(args: argparse.Namespace) -> list[dict]:
    options = ["--attention-backend", OURS, "--enforce-eager", "--dtype", "bfloat16", "--disable-uvicorn-access-log"]
    # No more slots than are needed: vLLM takes them in turn, and memory would grow until each was touched.
    options += ["--max-num-seqs", str(args.at_once), "--num-gpu-blocks-override", str(args.at_once + 1)]
    options += ["--no-enable-prefix-caching"]  # what has no session is computed
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_llama(Path(folder, "model"))
        config = json.loads((model / "config.json").read_text())
        args.vocabulary, args.context = config["vocab_size"], config["max_position_embeddings"]

        def start(name: str, sessions: dict) -> VllmServer:
            settings = {"memory": args.memory, "segment": 16, "window": 32, "pinned": 16, "sessions": sessions}
            more = ["--additional-config", json.dumps({"deltamem": settings})]
            return VllmServer(model, options + more, Path(folder, name), SOAKED)

        kept = {"directory": f"{folder}/sessions", "host_bytes": HOST_BYTES}
        with start("log", kept) as server, start("plain-log", {}) as plain:
            held = server.metrics()["bytes_per_sequence"]
            if held * args.sessions <= HOST_BYTES:
                raise ValueError(f"{args.sessions} sessions fit into host memory: take more, or a larger --memory")
            run = Soak(server, plain, args)
            began = time.monotonic()
            run.run()
            seconds, metrics = time.monotonic() - began, server.metrics()
    half = [sample for sample in run.samples if sample[0] >= args.turns / 2]
    slope = linear_regression(*zip(*half, strict=True)).slope
    values = {
        "turns_per_s": round(args.turns / seconds, 2),
        "rss_mb": round(run.samples[-1][1], 1),
        "rss_mb_at_half": round(half[0][1], 1),
        "rss_slope_mb_per_1000_turns": round(1000 * slope, 3),
        "bytes_per_sequence": held,
        "tokens_reused": metrics["session_tokens_reused"],
        "tokens_computed": metrics["tokens_written"],
    } | {name.replace(" ", "_"): count for name, count in sorted(run.counts.items())}
    shape = {"model": "tiny llama", "backend": OURS, "context": args.context, "batch": args.at_once}
    shape |= {"memory_tokens": args.memory, "sessions": args.sessions, "n": args.turns}
    return [shape | {"metric": metric, "value": value} for metric, value in values.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="file that the rows are added to")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("turns", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--model", type=Path, required=True, help="model folder; its name names the rows")
    command.add_argument("--turns", type=int, default=30)
    command.add_argument("--context", type=int, help="tokens that it grows to; default: the model's limit")
    command.add_argument("--memory", type=int, help="of deltamem, in tokens; default: 15%% of the limit")
    command.add_argument("--answer", type=int, default=32, help="tokens of an answer")
    command.add_argument("--dtype", default="auto", help="as of `vllm serve`; a CPU may be faster at float32")
    command.add_argument("--repeats", type=int, default=3)
    command.set_defaults(run=turns)
    command = commands.add_parser("pauses", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--model", type=Path, required=True, help="model folder; its name names the rows")
    command.add_argument("--memory", type=int, default=8192, help="of deltamem, in tokens")
    command.add_argument("--streamed", type=int, default=150, help="tokens of the answer that is streamed")
    command.add_argument("--before", type=int, default=10, help="of these, how many come before the conversation")
    command.add_argument("--disk", type=Path, help="folder for the sessions; default: for temporary files")
    command.add_argument("--dtype", default="auto", help="as of `vllm serve`; a CPU may be faster at float32")
    command.add_argument("--repeats", type=int, default=5)
    command.set_defaults(run=pauses)
    command = commands.add_parser("soak", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--turns", type=int, default=3000)
    command.add_argument("--sessions", type=int, default=50)
    command.add_argument("--at-once", type=int, default=6)
    command.add_argument("--memory", type=int, default=160)
    command.add_argument("--question", type=int, default=12, help="tokens of a question")
    command.add_argument("--answer", type=int, default=12, help="tokens of an answer")
    command.add_argument("--compare-every", type=int, default=5, help="turns from one comparison to the next")
    command.add_argument("--sample-every", type=int, default=25, help="turns from one look at the memory to the next")
    command.set_defaults(run=soak)
    args = parser.parse_args()
    rows = args.run(args)
    common.append(rows, "sessions", args.results)
    for row in rows:
        where = f"{row['reuse']:16} turn {row['turn']:3} of {row['context']:7} tokens  " if "turn" in row else ""
        where += f"beside {row['beside']:10}" if "beside" in row else ""
        print(f"{row['backend']:10} {where}{row['metric']:28} {row['value']:>14,}")


if __name__ == "__main__":
    main()
