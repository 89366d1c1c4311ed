"""Time to the first token of questions on one document, on real servers.

    python -m benchmarks.questions --model DIR

deltamem reads the document once and keeps its memory as a session, from which every question starts; beside it
unnamed requests ('slots': they go on in slots that others have left, or in copies), the same with
--no-enable-prefix-caching, and vLLM's own backend with its prefix caching on and off. The memory is 15% of --context.
Metric ttft_s: of the document by itself (question 0), then of each question.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from vllm_deltamem.memory import DEFAULT_SHARE

from . import common
from .server import VllmServer
from .sessions import OURS, TEXT, stream

ANSWER = 16  # tokens


def first_token(server: VllmServer, prompt: list[int], count: int, **session: str) -> float:
    """Seconds; ends with the answer."""
    began, first = time.monotonic(), None
    for event in stream(server, prompt, count, **session):
        if event["choices"]:
            first = first or time.monotonic() - began
    return first


def measure(args: argparse.Namespace) -> list[dict]:
    import torch
    from transformers import AutoConfig, AutoTokenizer

    context = args.context or AutoConfig.from_pretrained(args.model).max_position_embeddings
    memory = round(DEFAULT_SHARE * context)
    text = AutoTokenizer.from_pretrained(args.model)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    text *= -(-(context + args.questions * args.question) // len(text))
    document = text[: context - args.question - ANSWER]
    tails = [text[len(document) + i * args.question :][: args.question] for i in range(args.questions)]
    stock = "FLASH_ATTN" if torch.cuda.is_available() else "CPU_ATTN"
    settings = ["--additional-config", json.dumps({"deltamem": {"memory": memory}})]
    servers = [(OURS, settings, "session"), (OURS, settings, "slots")]
    servers += [(OURS, [*settings, "--no-enable-prefix-caching"], "none")]
    servers += [(stock, ["--enable-prefix-caching"], "prefix caching"), (stock, ["--no-enable-prefix-caching"], "none")]
    rows = []
    for backend, options, reuse in servers:
        options = [*options, "--attention-backend", backend, "--max-num-seqs", "2", "--max-model-len", str(context)]
        options += [] if torch.cuda.is_available() else ["--enforce-eager"]
        kept, asked = ({"session": "document"}, {"source": "document"}) if reuse == "session" else ({}, {})
        with (
            tempfile.TemporaryDirectory() as folder,
            VllmServer(args.model, options, Path(folder, "log")) as server,
        ):
            first_token(server, text[-200:], ANSWER)  # what a first request takes besides
            times = [first_token(server, document, 1, **kept)]
            times += [first_token(server, document + tail, ANSWER, **asked) for tail in tails]
        for question, seconds in enumerate(times):
            shape = {"model": args.model.name, "backend": backend, "reuse": reuse, "context": len(document)}
            shape |= {"memory_tokens": memory if backend == OURS else None, "question": question, "batch": 1, "n": 1}
            rows.append(shape | {"metric": "ttft_s", "value": round(seconds, 4)})
        print(f"{backend:10} {reuse:16}", *(f"{seconds:8.2f} s" for seconds in times), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder; its name names the rows")
    parser.add_argument(
        "--context", type=int, help="tokens of document, question and answer; default: the model's limit"
    )
    parser.add_argument("--questions", type=int, default=3)
    parser.add_argument("--question", type=int, default=40, help="tokens of a question")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="file that the rows are added to")
    args = parser.parse_args()
    common.append(measure(args), "questions", args.results)


if __name__ == "__main__":
    main()
