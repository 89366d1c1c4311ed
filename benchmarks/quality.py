"""How much of full attention's quality a memory of fixed size keeps, on the same prompts, inside vLLM.

    python benchmarks/quality.py --model DIR --data DIR --small
    python benchmarks/quality.py --model DIR --data DIR --suites needle1,agent30 --context 8192 --n 40
    python benchmarks/quality.py --model DIR --data DIR --policies deltamem,streaming,keydiff --reductions .85
    python benchmarks/quality.py --model DIR --data DIR --jobs 4                  four engines at a time

Full attention, by vLLM's own backend, and every policy at every reduction run in engines of their own, each in
its process. Reduction r at a context of L tokens is a memory of round((1 - r) L) tokens per head.
Alternatives (benchmarks/alternatives/) run in transformers; they and deltamem without one of its parts
(benchmarks/policies.py) get as many bytes as deltamem's slot then takes: `bytes_allowed` of a row.
Raw outputs stay in benchmarks/raw/ (a rerun goes on where it stopped); rows go to benchmarks/results.jsonl as
soon as a policy is through.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from typing import NamedTuple

import torch

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, size
from benchmarks import outputs as store
from benchmarks.alternatives import ALTERNATIVES
from benchmarks.plan import Plan
from benchmarks.policies import POLICIES, strip, within
from benchmarks.suites import SUITES, Sample
from benchmarks.suites.source import SPLIT_STARTS

ROOT = Path(__file__).resolve().parents[1]
KNOWN = [*POLICIES, *ALTERNATIVES]
SMALL = ["--suites", "needle1,needle4,language", "--context", "2048", "--n", "6"]


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def shares(text: str) -> list[float]:
    return [float(word) for word in words(text)]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder; its name names the rows")
    parser.add_argument("--data", type=Path, required=True, help="data folder, see suites/source.py")
    parser.add_argument("--suites", type=words, default=list(SUITES), help=",".join(SUITES))
    parser.add_argument("--policies", type=words, default=["deltamem"], help=",".join(KNOWN))
    parser.add_argument("--context", type=int, default=4096, help="tokens of prompt and answer")
    parser.add_argument("--reductions", type=shares, default=[0.5, 0.85, 0.95])
    parser.add_argument("--n", type=int, default=20, help="samples per suite")
    parser.add_argument("--seed", type=int, default=SPLIT_STARTS["reported"], help="seed of the first sample")
    parser.add_argument("--jobs", type=int, default=1, help="engines at a time, which share the GPU or the cores")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="file that the rows are added to")
    parser.add_argument("--small", action="store_true", help="15 minutes on a CPU: " + " ".join(SMALL))
    args = parser.parse_args(SMALL + arguments if "--small" in arguments else arguments)
    for name, table in (("suites", SUITES), ("policies", KNOWN)):
        for value in getattr(args, name):
            if value not in table:
                parser.error(f"--{name}: unknown {value!r}; known: {', '.join(table)}")
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model} is no model folder: it has no config.json.")
    return args


class Run(NamedTuple):
    """One policy at one size, over all suites."""

    policy: str
    reduction: float
    memory: int | None  # tokens per head
    allowed: int | None  # bytes of deltamem's slot of that size
    plan: Plan

    def held(self, samples: list, outputs: dict) -> int:
        """Bytes of the longest of these sequences."""
        if self.plan.alternative:
            return max(output["bytes"] for seed in outputs for output in outputs[seed])
        model = Path(self.plan.model)
        if self.plan.settings is None:
            longest = max(longest_prompt(sample, outputs[sample.seed]) for sample in samples)
            return size.shape_of(model, longest).full_attention_bytes(longest)
        return size.layout_of(model, self.plan.context, self.plan.settings).slot_bytes


def longest_prompt(sample: Sample, outputs: list[dict]) -> int:
    return max(map(len, store.prompts(sample, outputs)))


def prepare(base: Plan, policy: str, reduction: float) -> Run:
    """Raises ValueError where the memory is too small for deltamem, or the model has no profile to take a part from."""
    memory, allowed, own, code = None, None, {}, []
    missing = POLICIES[policy].missing if policy in POLICIES else None
    if policy != "full":
        memory = round((1 - reduction) * base.context)
        slot = size.layout_of(Path(base.model), base.context, {"memory": memory})
        allowed = slot.slot_bytes
        if policy in ALTERNATIVES:
            own = {"alternative": policy, "room": allowed, "segment": slot.segment}
            code = [ROOT / "benchmarks" / "alternatives"]
        else:
            own = {"settings": {"memory": memory} if policy == "deltamem" else within(slot, POLICIES[policy])}
            code = [ROOT / name for name in ("vllm_deltamem", "kernels", "patches")]
    name = f"{policy}-{memory or base.context}-of-{base.context}"
    name += "-" + store.fingerprint(own, missing, common.versions(), common.device(), *code)
    folder = store.folder(Path(base.model).name, name)
    if missing:
        strip(Path(base.model), missing, folder / "profile.safetensors")
        own["settings"]["profile"] = str(folder / "profile.safetensors")
    return Run(policy, reduction, memory, allowed, replace(base, outputs=str(folder), **own))


def execute(run: Run, engines: set[subprocess.Popen]) -> None:
    """Keeps its engine among `engines` while that runs. Raises ChildProcessError where it fails."""
    module = "benchmarks.alternatives.runner" if run.plan.alternative else "benchmarks.engine"
    engine = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, text=True, cwd=ROOT)
    engines.add(engine)
    engine.communicate(run.plan.written())
    engines.remove(engine)
    if engine.returncode:
        end = f"signal {-engine.returncode}" if engine.returncode < 0 else f"status {engine.returncode}"
        what = f"{run.policy} at {run.reduction:.0%}"
        raise ChildProcessError(f"The engine of {what} ended with {end}; the same command goes on where it stopped.")


def cache_bytes(jobs: int) -> int | None:
    """Of the KV cache of each of the engines at a time: an eighth of the machine's memory goes to caches, or half of
    the GPU's; None: what vLLM finds free there."""
    if not torch.cuda.is_available():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8 // jobs
    return torch.cuda.get_device_properties(0).total_memory // 2 // jobs if jobs > 1 else None


def executed(runs: list[Run], jobs: int) -> Iterator[Run]:
    """The runs in their order, each once it is done; `jobs` at a time, on cores of their own.

    Whoever stops iterating, by an exception or a signal, stops the engines.
    """
    engines: set[subprocess.Popen] = set()
    cores = sorted(os.sched_getaffinity(0))
    shares = SimpleQueue()
    for i in range(jobs):
        shares.put(cores[i::jobs] or cores)
    with ThreadPoolExecutor(jobs, initializer=lambda: os.sched_setaffinity(0, shares.get())) as pool:
        done = pool.map(execute, runs, [engines] * len(runs))
        try:
            yield from (run for run, _ in zip(runs, done, strict=True))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for engine in list(engines):
                engine.terminate()


def summary(part: str):
    """How the scores of a part's samples become one: the mean, but perplexity is exp(mean nll)."""
    return (lambda values: math.exp(fmean(values))) if part == "perplexity" else fmean


def rows(suite: str, samples: list, full: dict, outputs: dict) -> list[dict]:
    """One row for the suite and one, named suite/part, for each of its parts."""
    parts: dict[str, list[tuple[float, float]]] = {}
    for sample in samples:
        scores = sample.score(outputs[sample.seed], full[sample.seed])
        reference = sample.score(full[sample.seed], full[sample.seed])
        for part, score in scores.items():
            parts.setdefault(part, []).append((score, reference[part]))
    longest = [longest_prompt(sample, outputs[sample.seed]) for sample in samples]
    found = []
    for part, pairs in sorted(parts.items()):
        ours, theirs = (list(column) for column in zip(*pairs, strict=True))
        found.append(
            {
                "n": len(pairs),
                "suite": f"{suite}/{part}" if part else suite,
                "score": round(summary(part)(ours), 6),
                "full_score": round(summary(part)(theirs), 6),
                "ci95": common.paired_interval(ours, theirs, summary(part)),
                "prompt_tokens": round(fmean(longest)),
            }
        )
    return found


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated; the same command goes on where it stopped."))
    model, data = (str(folder.absolute()) for folder in (args.model, args.data))
    base = Plan(model, data, args.context, args.suites, args.seed, args.n, cache=cache_bytes(args.jobs))
    runs = [prepare(base, "full", 0.0)]
    runs += [prepare(base, policy, reduction) for policy in args.policies for reduction in args.reductions]
    print(f"{'suite':30} {'policy':14} {'reduction':>9} {'score':>8} {'full':>8}  95% of difference")
    for run in executed(runs, args.jobs):
        found = []
        for suite, samples in base.samples.items():
            full, outputs = (store.kept(r.plan.path(suite), samples) for r in (runs[0], run))
            here = {
                "model": args.model.name,
                "context": args.context,
                "reduction": run.reduction,
                "policy": run.policy,
                "memory_tokens": run.memory,
                "bytes_per_sequence": run.held(samples, outputs),
                "bytes_allowed": run.allowed,
                "seed": args.seed,
            }
            found += [here | row for row in rows(suite, samples, full, outputs)]
        common.append(found, "quality", args.results)
        for row in found:
            low, high = row["ci95"]
            print(
                f"{row['suite']:30} {row['policy']:14} {row['reduction']:9.0%} {row['score']:8.3f} "
                f"{row['full_score']:8.3f}  {low:+.3f} to {high:+.3f}",
                flush=True,
            )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, ChildProcessError) as error:
        sys.exit(f"quality: {error}")
