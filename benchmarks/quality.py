"""How much of full attention's quality a memory of fixed size keeps, on the same prompts, inside vLLM.

    python benchmarks/quality.py --model DIR --data DIR --small
    python benchmarks/quality.py --model DIR --data DIR --suites needle1,agent30 --context 8192 --n 40

Full attention runs first, by vLLM's own backend, then every policy at every reduction, each engine in a
process of its own. Reduction r at a context of L tokens is a memory of round((1 - r) L) tokens per head.
Raw outputs stay in benchmarks/raw/ (a rerun goes on where it stopped); rows go to benchmarks/results.jsonl.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common
from benchmarks import outputs as store
from benchmarks.policies import POLICIES
from benchmarks.suites import SUITES, draw
from benchmarks.suites.source import SPLIT_STARTS, Source

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--suites", "needle1,needle4,language", "--n", "6"]


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def shares(text: str) -> list[float]:
    return [float(word) for word in words(text)]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder; its name names the rows")
    parser.add_argument("--data", type=Path, required=True, help="data folder, see suites/source.py")
    parser.add_argument("--suites", type=words, default=list(SUITES), help=",".join(SUITES))
    parser.add_argument("--policies", type=words, default=["deltamem"], help=",".join(POLICIES))
    parser.add_argument("--context", type=int, default=4096, help="tokens of prompt and answer")
    parser.add_argument("--reductions", type=shares, default=[0.5, 0.85, 0.95])
    parser.add_argument("--n", type=int, default=20, help="samples per suite")
    parser.add_argument("--seed", type=int, default=SPLIT_STARTS["reported"], help="seed of the first sample")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="file that the rows are added to")
    parser.add_argument("--small", action="store_true", help="15 minutes on a CPU: " + " ".join(SMALL))
    args = parser.parse_args(SMALL + arguments if "--small" in arguments else arguments)
    for name, table in (("suites", SUITES), ("policies", POLICIES)):
        for value in getattr(args, name):
            if value not in table:
                parser.error(f"unknown {name[:-1]} {value!r}; known: {', '.join(table)}")
    return args


def run(args: argparse.Namespace, policy: str, memory: int | None) -> Path:
    """Run one engine over all suites, in its own process; returns the folder of its outputs."""
    settings = None if memory is None else {"memory": memory, **POLICIES[policy]}
    code = [ROOT / name for name in ("vllm_deltamem", "kernels", "patches")] if settings else []
    known = [settings, common.versions(), common.device(), *code]
    name = f"{policy}-{memory or args.context}-of-{args.context}"
    plan = {
        "model": str(args.model.absolute()),
        "data": str(args.data.absolute()),
        "context": args.context,
        "suites": args.suites,
        "seed": args.seed,
        "n": args.n,
        "settings": settings,
        "outputs": str(store.folder(args.model.name, f"{name}-{store.fingerprint(*known)}")),
    }
    command = [sys.executable, "-m", "benchmarks.engine"]
    subprocess.run(command, input=json.dumps(plan), text=True, cwd=ROOT, check=True)
    return Path(plan["outputs"])


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
    longest = [max(map(len, store.prompts(s, outputs[s.seed]))) for s in samples]
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
    from transformers import AutoTokenizer

    source = Source(AutoTokenizer.from_pretrained(args.model), args.data, args.context)
    samples = {suite: draw(suite, source, args.seed, args.n) for suite in args.suites}
    runs = [("full", 0.0, None)]
    runs += [(p, r, round((1 - r) * args.context)) for p in args.policies for r in args.reductions]
    folders = [run(args, policy, memory) for policy, _, memory in runs]
    found = []
    for (policy, reduction, memory), folder in zip(runs, folders, strict=True):
        for suite in args.suites:
            full, outputs = (store.kept(f / f"{suite}.jsonl", samples[suite]) for f in (folders[0], folder))
            here = {
                "model": args.model.name,
                "context": args.context,
                "reduction": reduction,
                "policy": policy,
                "memory_tokens": memory,
                "seed": args.seed,
            }
            found += [here | row for row in rows(suite, samples[suite], full, outputs)]
    common.append(found, "quality", args.results)
    print(f"{'suite':30} {'policy':14} {'reduction':>9} {'score':>8} {'full':>8}  95% of difference")
    for row in found:
        low, high = row["ci95"]
        print(
            f"{row['suite']:30} {row['policy']:14} {row['reduction']:9.0%} {row['score']:8.3f} "
            f"{row['full_score']:8.3f}  {low:+.3f} to {high:+.3f}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
