"""First-token time, time per output token, throughput and memory against context length, all backends in one run.

    python benchmarks/serving.py --model DIR                                  on a CPU: stock and deltamem
    python benchmarks/serving.py --model DIR --backends FLASH_ATTN,TRITON_ATTN,DELTAMEM \\
        --contexts 1024,4096,16384,32768,65536,131072,262144,400000 --batches 1,4,16 --memory 19660 6554
    python benchmarks/serving.py --model CONFIG_DIR --load-format dummy ...   honest speed without weights
    python benchmarks/serving.py --model DIR --cache-bytes 808452096 --contexts 32511 --batches 12 --memory 4915 \\
        --output-tokens 257                                                   how many run at once in a small cache
    python benchmarks/serving.py --model DIR --cache-bytes 1610612736 --contexts 256 --max-model-len 32768 \\
        --batches 32 --output-tokens 65 --dtype float32                       the same of short prompts

Every backend (and memory size) is an engine of its own, one after the other, on the same random prompts. A
batch of B prompts of C tokens is sent at once; before that, every batch has run once with prompts of WARM_UP tokens.
Rows go to benchmarks/results.jsonl, metrics ttft_s, tpot_ms, tokens_per_s, at_once, bytes_per_sequence and
sequences_that_fit. at_once: the most sequences of the batch that had their whole prompt in the cache at one time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common
from vllm_deltamem.layers import find_attending

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 16_384  # tokens, or as many as the longest context has
ENOUGH = 30.0  # seconds of runs after which none is repeated


def integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def parse(arguments: list[str]) -> argparse.Namespace:
    import torch

    stock = "FLASH_ATTN,TRITON_ATTN" if torch.cuda.is_available() else "CPU_ATTN"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder; its name names the rows")
    parser.add_argument("--backends", type=lambda text: text.split(","), default=f"{stock},DELTAMEM".split(","))
    parser.add_argument("--contexts", type=integers, default=[1024, 4096])
    parser.add_argument("--batches", type=integers, default=[1])
    parser.add_argument("--memory", type=int, nargs="*", default=[None], help="sizes for DELTAMEM; default: its own")
    parser.add_argument("--settings", type=json.loads, default={}, help="further settings of DELTAMEM, as JSON")
    parser.add_argument("--output-tokens", type=int, default=33)
    parser.add_argument("--max-model-len", type=int, help="as of `vllm serve`; default: what the longest context takes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--most-tokens", type=int, default=1 << 20, help="of a batch's prompts; larger ones are left out"
    )
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto", help="as of `vllm serve`; a CPU may be faster at float32")
    parser.add_argument("--cache-bytes", type=int, help="of the KV cache, which is else as large as vLLM makes it")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="file that the rows are added to")
    return parser.parse_args(arguments)


def measure(plan: dict) -> list[dict]:
    """Run one engine; returns a figure per context, batch and metric. Called in a process of its own."""
    from vllm import LLM, SamplingParams

    longest = plan["max_model_len"] or max(plan["contexts"]) + plan["output_tokens"]
    own = {"additional_config": {"deltamem": plan["settings"]}} if plan["backend"] == "DELTAMEM" else {}
    llm = LLM(
        plan["model"],
        attention_backend=plan["backend"],
        max_model_len=longest,
        max_num_seqs=max(plan["batches"]),
        load_format=plan["load_format"],
        dtype=plan["dtype"],
        enable_prefix_caching=False,
        disable_log_stats=True,
        kv_cache_memory_bytes=plan["cache_bytes"],
        **own,
    )
    engine, vocabulary = llm.llm_engine, llm.llm_engine.model_config.get_vocab_size()
    params = SamplingParams(temperature=0, max_tokens=plan["output_tokens"], ignore_eos=True, detokenize=False)
    figures = memory_figures(engine, plan)

    def run(context: int, batch: int, repeat: int) -> tuple[float, float, float, int]:
        prompts = [
            [(repeat * 7919 + i * 104729 + j * j) % (vocabulary - 10) for j in range(context)] for i in range(batch)
        ]
        return time_batch(engine, prompts, params)

    for batch in plan["batches"]:
        run(min(WARM_UP, max(plan["contexts"])), batch, 0)
    for context in plan["contexts"]:
        for batch in plan["batches"]:
            if batch * context > plan["most_tokens"]:
                continue
            runs = []
            while len(runs) < plan["repeats"] and sum(total for _, _, total, _ in runs) < ENOUGH:
                runs.append(run(context, batch, len(runs) + 1))
            first, rest, total, at_once = (median(column) for column in zip(*runs, strict=True))
            sizes = {"context": context, "batch": batch, "n": len(runs)}
            tokens = batch * (context + plan["output_tokens"])
            figures += [
                sizes | {"metric": "ttft_s", "value": round(first, 4)},
                sizes | {"metric": "tpot_ms", "value": round(rest * 1e3, 3)},
                sizes | {"metric": "tokens_per_s", "value": round(tokens / total, 1)},
                sizes | {"metric": "at_once", "value": at_once},
            ]
    return figures


def time_batch(engine, prompts: list[list[int]], params) -> tuple[float, float, float, int]:
    """Seconds until the last prompt has its first token, then per output token, and in all; the most at once."""
    scheduler, at_once = engine.engine_core.engine_core.scheduler, 0
    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{begin}-{i}", {"prompt_token_ids": prompt}, params)
    started, at_first = set(), begin
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.request_id not in started and output.outputs[0].token_ids:
                started.add(output.request_id)
                at_first = time.perf_counter()
        at_once = max(at_once, sum(r.num_computed_tokens >= r.num_prompt_tokens for r in scheduler.running))
    end = time.perf_counter()
    return at_first - begin, (end - at_first) / (params.max_tokens - 1), end - begin, at_once


def memory_figures(engine, plan: dict) -> list[dict]:
    """What a sequence of each context holds, and how many of them the cache has room for."""
    config = engine.vllm_config
    model = config.model_config
    token = 2 * model.get_total_num_kv_heads() * model.get_head_size() * model.dtype.itemsize
    token *= len(find_attending(model.hf_text_config))
    room = config.cache_config.num_gpu_blocks
    figures = []
    for context in plan["contexts"]:
        if plan["backend"] == "DELTAMEM":
            from vllm_deltamem.plan import plan_memory

            memory = plan_memory(config)
            tokens = context + plan["output_tokens"] - 1
            parts = -(-tokens // memory.part.cells) if tokens <= memory.part_tokens else memory.parts
            held, fit = parts * memory.block_bytes * memory.workers, (room - 1) // parts
        else:
            block = config.cache_config.block_size
            held, fit = -(-context // block) * block * token, room * block // context
        sizes = {"context": context, "batch": 1, "n": 1}
        figures.append(sizes | {"metric": "bytes_per_sequence", "value": held})
        figures.append(sizes | {"metric": "sequences_that_fit", "value": fit})
    return figures


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--engine"]:  # vLLM owns the standard output
        Path(arguments[1]).write_text(json.dumps(measure(json.load(sys.stdin))))
        return
    args = parse(arguments)
    for backend in args.backends:
        for memory in args.memory if backend == "DELTAMEM" else [None]:
            settings = args.settings | ({"memory": memory} if memory else {})
            plan = {
                "model": str(args.model.absolute()),
                "backend": backend,
                "settings": settings,
                "most_tokens": args.most_tokens,
                "contexts": args.contexts,
                "batches": args.batches,
                "output_tokens": args.output_tokens,
                "max_model_len": args.max_model_len,
                "repeats": args.repeats,
                "load_format": args.load_format,
                "dtype": args.dtype,
                "cache_bytes": args.cache_bytes,
            }
            print(f"{backend} {memory or ''} ...", file=sys.stderr, flush=True)
            quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            environment = {"VLLM_CPU_KVCACHE_SPACE": "2"} | os.environ | quiet
            if args.cache_bytes:
                del environment["VLLM_CPU_KVCACHE_SPACE"]  # it would come first
            with tempfile.TemporaryDirectory() as folder:
                written = Path(folder, "figures.json")
                command = [sys.executable, "-m", "benchmarks.serving", "--engine", str(written)]
                subprocess.run(command, input=json.dumps(plan), text=True, cwd=ROOT, check=True, env=environment)
                figures = json.loads(written.read_text())
            here = {"model": args.model.name, "backend": backend, "memory_tokens": memory}
            if args.cache_bytes:
                here["cache_bytes"] = args.cache_bytes
            if args.max_model_len:
                here["max_model_len"] = args.max_model_len
            if args.dtype != "auto":
                here["dtype"] = args.dtype
            if backend == "DELTAMEM":
                here["settings"] = settings
            rows = [here | figure for figure in figures]
            common.append(rows, "serving", args.results)
            for row in rows:
                print(
                    f"{row['backend']:12} memory {row['memory_tokens'] or '-':>6} context {row['context']:7} "
                    f"batch {row['batch']:3}  {row['metric']:20} {row['value']:>14,}",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:])
