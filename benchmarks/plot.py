"""Figures from results.jsonl: score against memory for every suite, needle depth by context length, and the
first-token time of the turns of a growing conversation.

    python benchmarks/plot.py [--results FILE] [--out DIR]

Of rows that measure the same thing the last in the file counts.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.results import TITLES, last, pick, values

HERE = Path(__file__).parent
COLOURS = plt.colormaps["tab20"].colors  # a policy keeps its own in all panels of a figure


def score_against_memory(rows: list[dict], out: Path) -> None:
    """One figure per model and context, one panel per suite, one line per policy."""
    rows = [row for row in rows if row["suite"] in TITLES]
    for model in values(rows, "model"):
        for context in values(pick(rows, model=model), "context"):
            here = pick(rows, model=model, context=context)
            suites = [suite for suite in TITLES if pick(here, suite=suite)]
            columns = min(4, len(suites))
            height = -(-len(suites) // columns)
            figure, panels = plt.subplots(
                height, columns, figsize=(3.2 * columns + 1, 2.6 * height), squeeze=False, layout="constrained"
            )
            colours = dict(zip([p for p in values(here, "policy") if p != "full"], COLOURS, strict=False))
            for panel, suite in zip(panels.flat, suites, strict=False):
                draw_panel(panel, pick(here, suite=suite), colours)
                panel.set_title(TITLES[suite], fontsize=9)
            for panel in list(panels.flat)[len(suites) :]:
                panel.set_visible(False)
            lines = {
                label: line
                for panel in panels.flat
                for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
            }
            figure.legend(lines.values(), lines, loc="outside right upper", fontsize=8)
            figure.suptitle(f"{model}, context of {context:,} tokens")
            figure.supxlabel("memory, % of full attention's")
            figure.savefig(out / f"score_{model}_{context}.png", dpi=150)
            plt.close(figure)


def draw_panel(panel, rows: list[dict], colours: dict[str, tuple]) -> None:
    """Full attention as a dashed level; the bars are the paired 95% intervals, put around its score."""
    for policy in values(rows, "policy"):
        line = sorted(pick(rows, policy=policy), key=lambda row: row["reduction"])
        if policy == "full":
            panel.axhline(line[-1]["score"], color="black", linestyle="--", linewidth=1, label="full attention")
            continue
        share = [100 * (1 - row["reduction"]) for row in line]
        score = [row["score"] for row in line]
        ends = [[max(0.0, row["score"] - row["full_score"] - row["ci95"][0]) for row in line]]
        ends += [[max(0.0, row["ci95"][1] - row["score"] + row["full_score"]) for row in line]]
        panel.errorbar(
            share, score, yerr=ends, marker="o", markersize=4, capsize=2, label=policy, color=colours[policy]
        )
    panel.set_xscale("log")
    panel.set_xticks([5, 15, 50, 100], ["5", "15", "50", "100"])
    panel.minorticks_off()


def needle_depth(rows: list[dict], out: Path) -> None:
    """One figure per model, one map of depth against context for each policy and reduction."""
    rows = [row for row in rows if row["suite"].startswith("needle_depth/depth ")]
    for model in values(rows, "model"):
        here = pick(rows, model=model)
        runs = sorted({(row["reduction"], row["policy"]) for row in here})
        contexts, suites = values(here, "context"), values(here, "suite")
        figure, panels = plt.subplots(
            1, len(runs), figsize=(1.6 + 2.2 * len(runs), 4), squeeze=False, layout="constrained"
        )
        for panel, (reduction, policy) in zip(panels.flat, runs, strict=True):
            table = {(r["suite"], r["context"]): r["score"] for r in pick(here, reduction=reduction, policy=policy)}
            grid = [[table.get((suite, context), float("nan")) for context in contexts] for suite in suites]
            image = panel.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            panel.set_title(f"{policy}, -{reduction:.0%}" if reduction else policy, fontsize=10)
            panel.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
            panel.set_yticks(range(len(suites)), [suite.rsplit(" ", 1)[1] for suite in suites])
        panels[0, 0].set_ylabel("depth of the needle")
        figure.suptitle(model)
        figure.supxlabel("context, tokens")
        figure.colorbar(image, ax=panels, label="found exactly")
        figure.savefig(out / f"needle_depth_{model}.png", dpi=150)
        plt.close(figure)


def first_token_of_turns(rows: list[dict], out: Path) -> None:
    """One figure per model, of its newest run: seconds and computed tokens of every turn, against its whole prompt."""
    labels = {"ttft_s": "time to first token, s", "computed_tokens": "tokens of the prompt computed"}
    for model in values(rows, "model"):
        run = pick(rows, model=model, date=max(row["date"] for row in pick(rows, model=model)))
        lines = sorted({(row["backend"], row["reuse"], row["memory_tokens"]) for row in run}, key=str)
        longest = max(row["context"] for row in run)
        limit = min(max(row["context"] for row in pick(run, backend=backend)) for backend in values(run, "backend"))
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for panel, (metric, label) in zip(panels, labels.items(), strict=True):
            for backend, reuse, memory in lines:
                line = pick(run, metric=metric, backend=backend, reuse=reuse, memory_tokens=memory)
                line.sort(key=lambda row: row["turn"])
                name = f"{backend.lower()}, {'recomputed' if reuse == 'none' else reuse}"
                name += f", memory {memory:,}" if memory else ""
                tokens, measured = ([row[key] for row in line] for key in ("context", "value"))
                panel.plot(tokens, measured, marker=".", label=name)
            if limit < longest:
                panel.axvline(limit, color="black", linestyle=":", label="last turn within the model's limit")
            panel.set_ylabel(label)
            panel.set_ylim(bottom=0)
        figure.suptitle(f"{model}, a conversation that grows to {longest:,.0f} tokens")
        figure.supxlabel("tokens of the prompt")
        panels[0].legend(fontsize=8)
        figure.savefig(out / f"turns_{model}.png", dpi=150)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "plots")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    quality = last(args.results, "quality")
    score_against_memory(quality, args.out)
    needle_depth(quality, args.out)
    first_token_of_turns(last(args.results, "sessions"), args.out)


if __name__ == "__main__":
    main()
