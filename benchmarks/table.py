"""The quality of a model at one context and reduction as a Markdown table, from the last rows of results.jsonl.

    python benchmarks/table.py --model SmolLM2-135M-Instruct --context 2048 --reduction .85
    python benchmarks/table.py --model SmolLM2-135M-Instruct --context 2048 --reduction .85 --policies deltamem,no_pins

In brackets the 95% interval of the difference to full attention on the same prompts. The last line is the mean,
over suites where full attention scores above 0.30, of the share of its score that is kept; language, pinned facts
and parts of a suite are left out of it.
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common
from benchmarks.results import TITLES, last, pick, values

COUNTED = 0.3  # a suite counts where full attention scores more
ASIDE = ("pins", "airline/name", "language/perplexity", "language/kl", "language/top1")


def cell(row: dict | None) -> str:
    if row is None:
        return ""
    low, high = row["ci95"]
    return f"{row['score']:.3g} ({low:+.2g} to {high:+.2g})"


def kept(rows: list[dict]) -> str:
    """Mean share of full attention's score."""
    counted = [row for row in rows if row["suite"] not in ASIDE and row["full_score"] > COUNTED]
    return f"{fmean(row['score'] / row['full_score'] for row in counted):.0%} ({len(counted)})" if counted else ""


def table(rows: list[dict], policies: list[str]) -> list[str]:
    """Lines of Markdown for rows of one model, context and reduction.

    The first policy's rows say which prompts count: rows of other prompts, or of fewer, are left out.
    """
    shown = {policy: [] for policy in policies}
    lines = [f"| | n | full attention | {' | '.join(policies)} |", "| --- " * (len(policies) + 3) + "|"]
    for suite, title in TITLES.items():
        here = pick(rows, suite=suite)
        first = next(iter(pick(here, policy=policies[0])), None)
        if first is None:
            continue
        same = pick(here, n=first["n"], seed=first["seed"])
        found = {row["policy"]: row for row in same}
        for policy in policies:
            shown[policy] += [found[policy]] if policy in found else []
        cells = [cell(found.get(policy)) for policy in policies]
        lines.append(f"| {title} | {first['n']} | {first['full_score']:.3g} | {' | '.join(cells)} |")
    largest = [f"{max(row['bytes_per_sequence'] for row in here):,}" if here else "" for here in shown.values()]
    lines.append(f"| bytes of a sequence | | | {' | '.join(largest)} |")
    lines.append(f"| **share of full attention kept** (suites) | | | {' | '.join(map(kept, shown.values()))} |")
    return lines


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--model", required=True, help="name of the model folder")
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--reduction", type=float, required=True)
    parser.add_argument("--policies", help="columns, the first decides which prompts; default: deltamem and all others")
    args = parser.parse_args(arguments)
    fields = {"model": args.model, "context": args.context, "reduction": args.reduction}
    rows = pick(last(args.results, "quality"), **fields)
    if not rows:
        parser.error(f"no rows of {args.model} at {args.context} tokens and a reduction of {args.reduction:.0%}")
    policies = sorted(values(rows, "policy"), key=lambda name: (name != "deltamem", name))
    print("\n".join(table(rows, args.policies.split(",") if args.policies else policies)))


if __name__ == "__main__":
    main(sys.argv[1:])
