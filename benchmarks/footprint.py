"""What `vllm serve` holds of one sequence at several lengths, as its /metrics say.

    python benchmarks/footprint.py --model DIR --contexts 1000,30000

Rows go to benchmarks/results.jsonl, metrics bytes_per_sequence and full_attention_bytes, which vLLM's own backends
would hold of the same tokens.
"""

import argparse
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from benchmarks import common
from benchmarks.server import VllmServer
from benchmarks.sessions import TEXT, body_of

ANSWER = 4  # tokens


def measure(model: Path, contexts: list[int]) -> list[dict]:
    """One request of each length, its answer included, to a server that has room for the longest."""
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(model)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    text *= -(-max(contexts) // len(text))
    options = ["--attention-backend", "deltamem", "--max-model-len", str(max(contexts)), "--max-num-seqs", "1"]
    rows = []
    with tempfile.TemporaryDirectory() as folder, VllmServer(model, options, Path(folder, "log")) as server:
        for context in tqdm(contexts, unit="request"):
            body = body_of(text[: context - ANSWER], ANSWER, None)
            server.call("POST", "/v1/completions", patience=3600, json=body).raise_for_status()
            seen = server.metrics()
            shape = {"model": model.name, "backend": "DELTAMEM", "context": context, "batch": 1, "n": 1}
            shape["tokens_seen"] = int(seen["longest_sequence_tokens"])
            for metric in ("bytes_per_sequence", "full_attention_bytes"):
                rows.append(shape | {"metric": metric, "value": int(seen[metric])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder; its name names the rows")
    parser.add_argument("--contexts", type=lambda text: [int(word) for word in text.split(",")], default=[1000, 30000])
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="file that the rows are added to")
    args = parser.parse_args()
    rows = measure(args.model.resolve(), args.contexts)
    for row in rows:
        print(f"{row['context']:8,} tokens  {row['metric']:24} {row['value']:14,}")
    common.append(rows, "footprint", args.results)


if __name__ == "__main__":
    main()
