"""Serve the default model on this machine's CPU, ask it about a real text, show what the memory takes.

`make demo` runs it; `python -m benchmarks.demo --backend CPU_ATTN` asks full attention the same.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from openai import OpenAI, OpenAIError

from benchmarks.server import VllmServer
from vllm_deltamem.models import DEFAULT_MODEL, fetch_default_model
from vllm_deltamem.precision import fast_dtype

HERE = Path(__file__).parent
TEXT = HERE / "demo_text.txt"  # from chapter I of Bram Stoker's Dracula, 1897, in the public domain
MODEL = HERE.parent / ".models" / DEFAULT_MODEL
CONTEXT = 8192  # tokens that the model was trained for
MEMORY = 640  # tokens per head, under a sixth of the text
QUESTIONS = {  # and what the text says
    "What was the chicken dish with red pepper called?": "paprika hendl",
    "What time did Jonathan Harker leave Munich?": "8:35",
}
INSTRUCTION = "Answer the question from the text above, in a few words."
OURS = "DELTAMEM"
PATIENCE = 600  # seconds, for the server to start and for each answer


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    first_token: float  # seconds
    total: float  # seconds


class Progress:
    """Shows every 5 seconds how far the log of a starting server has come."""

    def __init__(self, log: Path):
        self.log, self.due, self.shown = log, 0.0, ""

    def __call__(self, waited: float) -> None:
        if waited < self.due:
            return
        self.due = waited + 5
        lines = self.log.read_text(errors="replace").splitlines()
        last = lines[-1][:100] if lines else ""
        print(f"{waited:5.0f} s  {'...' if last == self.shown else last}", flush=True)
        self.shown = last


def options(backend: str) -> list[str]:
    """Those of the server."""
    given = {"--served-model-name": DEFAULT_MODEL, "--attention-backend": backend, "--max-model-len": CONTEXT}
    given |= {"--max-num-seqs": 4, "--dtype": str(fast_dtype(torch.bfloat16)).removeprefix("torch.")}
    if backend.upper() == OURS:
        given["--additional-config"] = json.dumps({"deltamem": {"memory": MEMORY}})
    # Compiling takes longer than a few questions gain by it.
    return [
        "--enforce-eager",
        "--no-enable-prefix-caching",
        *(str(word) for option in given.items() for word in option),
    ]


def ask(client: OpenAI, text: str, question: str) -> Answer:
    """Ask, streaming. Raises what the client raises."""
    began, first, words, usage = time.monotonic(), None, [], None
    events = client.chat.completions.create(
        model=DEFAULT_MODEL,
        messages=[{"role": "user", "content": f"{text}\n\n{INSTRUCTION}\nQuestion: {question}"}],
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in events:
        usage = event.usage or usage
        for choice in event.choices:
            words.append(choice.delta.content or "")
            if first is None and (words[-1] or choice.finish_reason):
                first = time.monotonic() - began
    return Answer("".join(words).strip(), usage.prompt_tokens, first, time.monotonic() - began)


def memory_line(metrics: dict[str, float], backend: str) -> str:
    """What the sequence held beside what full attention would have held.

    Raises RuntimeError, naming the metric, where the server has our backend and does not publish it.
    """
    if backend.upper() != OURS:
        return "a KV cache that grows with every token"
    sizes = []
    for name in ("bytes_per_sequence", "full_attention_bytes"):
        if name not in metrics:
            raise RuntimeError(f"The server's /metrics has no {name}: is the backend {OURS} really running?")
        sizes.append(f"{metrics[name] / 1e6:.1f} MB")
    return "a memory of {} per head holds {}, full attention would hold {}".format(MEMORY, *sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a served model about a text longer than its memory.")
    parser.add_argument("--backend", default=OURS, help="the server's attention backend (%(default)s)")
    backend = parser.parse_args().backend
    print(f"Model: {MODEL}", flush=True)
    fetch_default_model(MODEL)
    print(f"Starting `vllm serve` with --attention-backend {backend.lower()}", flush=True)
    text = TEXT.read_text(encoding="utf-8").strip()
    with tempfile.TemporaryDirectory(prefix="deltamem-demo-") as folder:
        right = ask_all(backend, text, Path(folder) / "log")
    print(f"{right} of {len(QUESTIONS)} answers say what the text says.")


def ask_all(backend: str, text: str, log: Path) -> int:
    """Serve, ask every question, print answers; returns how many say what the text says."""
    server, right = VllmServer(MODEL, options(backend), log).start(PATIENCE, Progress(log)), 0
    try:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0)
        for question, expected in QUESTIONS.items():
            print(f"\nQuestion  {question}", flush=True)
            answer = ask(client, text, question)
            found = expected.lower() in answer.text.lower()
            right += found
            print(f"Answer    {answer.text}")
            print(f"Text      {expected!r}, {'as' if found else 'not'} in the answer")
            print(f"Time      {answer.first_token:.1f} s to the first token, {answer.total:.1f} s in all")
            print(f"Memory    {answer.prompt_tokens:,} tokens read; {memory_line(server.metrics(), backend)}")
        print("\nStopping the server", flush=True)
    finally:
        server.stop()
    return right


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, ValueError, OpenAIError) as error:
        sys.exit(f"demo: {error}")
