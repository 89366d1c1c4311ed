"""Figures from rows: every kind is drawn, of the last rows."""

import json

from benchmarks import plot
from benchmarks.results import last


def quality_row(suite, policy, reduction, context, score):
    ends = {"score": score, "full_score": 1.0, "ci95": [score - 1.1, score - 0.9]}
    where = {"benchmark": "quality", "model": "toy", "suite": suite, "context": context}
    return where | {"policy": policy, "reduction": reduction} | ends


def test_quality_is_drawn_by_memory_and_by_depth(tmp_path, monkeypatch):
    rows = []
    for context in (2048, 4096):
        for policy, reduction in (("full", 0.0), ("deltamem", 0.5), ("deltamem", 0.85), ("keydiff", 0.85)):
            rows += [quality_row(f"needle_depth/depth {d}", policy, reduction, context, 0.5) for d in (0.0, 1.0)]
            rows += [quality_row(suite, policy, reduction, context, 0.5) for suite in ("needle1", "babi", "babi/qa1")]
    rows.append(quality_row("needle1", "deltamem", 0.5, 4096, 0.75))
    results = tmp_path / "results.jsonl"
    results.write_text("\n".join(map(json.dumps, rows)))
    found = {(r["suite"], r["policy"], r["reduction"], r["context"]): r["score"] for r in last(results, "quality")}
    assert len(found) == len(rows) - 1 and found["needle1", "deltamem", 0.5, 4096] == 0.75
    monkeypatch.setattr("sys.argv", ["plot.py", "--results", str(results), "--out", str(tmp_path / "out")])
    plot.main()
    drawn = {path.name for path in (tmp_path / "out").iterdir()}
    assert drawn == {"score_toy_2048.png", "score_toy_4096.png", "needle_depth_toy.png"}
