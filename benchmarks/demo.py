"""Serve the default model on this machine's CPU, ask it about a real text, show what the memory takes.

`make demo` runs it; `python -m benchmarks.demo --backend CPU_ATTN` asks full attention the same.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from prometheus_client.parser import text_string_to_metric_families

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
HELD = "vllm:deltamem_bytes_per_sequence"
FULL = "vllm:deltamem_full_attention_bytes"
PATIENCE = 600  # seconds, for the server to start and for each answer


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    first_token: float  # seconds
    total: float  # seconds
    metrics: dict[str, float]  # the server's gauges by name, as its last step left them


@contextmanager
def serve(model: Path, backend: str) -> Iterator[str]:
    """Run `vllm serve` on a free loopback port and give its address; stop it afterwards.

    Raises RuntimeError, after printing the end of the server's log, where it does not come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"--host": "127.0.0.1", "--port": port, "--served-model-name": DEFAULT_MODEL}
    options |= {"--attention-backend": backend, "--max-model-len": CONTEXT, "--max-num-seqs": 4}
    options["--dtype"] = str(fast_dtype(torch.bfloat16)).removeprefix("torch.")
    if backend.upper() == OURS:
        options["--additional-config"] = json.dumps({"deltamem": {"memory": MEMORY}})
    vllm = Path(sys.executable).with_name("vllm")
    # Compiling takes longer than a few questions gain by it.
    command = [vllm, "serve", model, "--enforce-eager", "--no-enable-prefix-caching"]
    command += [str(word) for option in options.items() for word in option]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.NamedTemporaryFile("w", prefix="deltamem-demo-", suffix=".log") as log:
        process = subprocess.Popen(
            command, env=environment | os.environ, stdout=log, stderr=log, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, process, Path(log.name))
            yield address
        finally:
            stop(process)


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    """Wait until the server answers, showing every 5 seconds how far its log has come."""
    began, shown = time.monotonic(), ""
    while not healthy(address):
        lines = log.read_text(errors="replace").splitlines()
        waited = time.monotonic() - began
        if process.poll() is not None or waited > PATIENCE:
            print(*lines[-40:], sep="\n")
            raise RuntimeError(f"The server did not start within {waited:.0f} s: its log ends above.")
        last = lines[-1][:100] if lines else ""
        print(f"{waited:5.0f} s  {'...' if last == shown else last}", flush=True)
        shown = last
        time.sleep(5)


def healthy(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def stop(process: subprocess.Popen) -> None:
    """End the server as Ctrl-C does, and whatever of it is still there after that."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def ask(address: str, text: str, question: str) -> Answer:
    """Ask over HTTP, streaming, and read the server's metrics right afterwards.

    Raises RuntimeError with the server's message where it breaks the answer off.
    """
    body = {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": f"{text}\n\n{INSTRUCTION}\nQuestion: {question}"}],
        "temperature": 0,
        "max_tokens": 40,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    began, first, words, prompt_tokens = time.monotonic(), None, [], 0
    with urlopen(request, timeout=PATIENCE) as stream:
        for line in stream:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RuntimeError(f"The server broke the answer off: {event['error']['message']}")
            if event.get("usage"):
                prompt_tokens = event["usage"]["prompt_tokens"]
            for choice in event["choices"]:
                word = choice["delta"].get("content") or ""
                words.append(word)
                if first is None and (word or choice["finish_reason"]):
                    first = time.monotonic() - began
    total = time.monotonic() - began
    return Answer("".join(words).strip(), prompt_tokens, first, total, read_metrics(address))


def read_metrics(address: str) -> dict[str, float]:
    """The gauges that the server publishes, summed over their labels."""
    with urlopen(f"{address}/metrics", timeout=PATIENCE) as response:
        families = text_string_to_metric_families(response.read().decode())
    gauges = {}
    for family in families:
        if family.type == "gauge":
            gauges[family.name] = sum(sample.value for sample in family.samples)
    return gauges


def memory_line(answer: Answer, backend: str) -> str:
    """What the sequence held beside what full attention would have held.

    Raises RuntimeError, naming the metric, where the server has our backend and does not publish it.
    """
    if backend.upper() != OURS:
        return "a KV cache that grows with every token"
    for name in (HELD, FULL):
        if name not in answer.metrics:
            raise RuntimeError(f"The server's /metrics has no {name}: is the backend {OURS} really running?")
    held, full = (f"{answer.metrics[name] / 1e6:.1f} MB" for name in (HELD, FULL))
    return f"a memory of {MEMORY} per head holds {held}, full attention would hold {full}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a served model about a text longer than its memory.")
    parser.add_argument("--backend", default=OURS, help="the server's attention backend (%(default)s)")
    backend = parser.parse_args().backend
    print(f"Model: {MODEL}", flush=True)
    fetch_default_model(MODEL)
    print(f"Starting `vllm serve` with --attention-backend {backend.lower()}", flush=True)
    text = TEXT.read_text(encoding="utf-8").strip()
    right = 0
    with serve(MODEL, backend) as address:
        for question, expected in QUESTIONS.items():
            print(f"\nQuestion  {question}", flush=True)
            answer = ask(address, text, question)
            found = expected.lower() in answer.text.lower()
            right += found
            print(f"Answer    {answer.text}")
            print(f"Text      {expected!r}, {'as' if found else 'not'} in the answer")
            print(f"Time      {answer.first_token:.1f} s to the first token, {answer.total:.1f} s in all")
            print(f"Memory    {answer.prompt_tokens:,} tokens read; {memory_line(answer, backend)}")
        print("\nStopping the server", flush=True)
    print(f"{right} of {len(QUESTIONS)} answers say what the text says.")


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, ValueError) as error:
        sys.exit(f"demo: {error}")
