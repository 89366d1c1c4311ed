"""Observations of training prompts, each written to a folder once it is made: calibration can go on there."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from vllm_deltamem.calibration import depth
from vllm_deltamem.calibration.frozen import FrozenModel
from vllm_deltamem.calibration.influence import Observation, observe
from vllm_deltamem.calibration.prompts import Prompt

ROW = 5  # prompts that are read one after another


def observed(model: FrozenModel, prompts: list[Prompt], folder: Path, name: str) -> list[Observation]:
    """Observe every prompt. What lies in `folder` under `name` is not done again."""
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for i, prompt in enumerate(tqdm(prompts, "prompts observed")):
        path = folder / f"{name}-{i:03}-alone.safetensors"
        if not path.exists():
            _keep(observe(model, prompt, seed=i)._asdict(), path)
        done.append(Observation(**load_file(path)))
    return done


def deepened(
    model: FrozenModel, seen: list[Observation], prompts: list[Prompt], folder: Path, name: str
) -> list[Observation]:
    """The same observations, with keys and values as they are when ROW of the prompts are read one after another.

    A row is no longer than the model was trained for; none where only one prompt would fit. What lies in
    `folder` under `name` is not done again.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    row = min(ROW, getattr(model.config, "max_position_embeddings", ROW * longest) // longest)
    if row < 2:
        return []
    found = []
    for begin in tqdm(range(0, len(prompts), row), "prompts read in rows"):
        members = range(begin, min(begin + row, len(prompts)))
        paths = [folder / f"{name}-{i:03}-in-row.safetensors" for i in members]
        if not all(path.exists() for path in paths):
            readings = depth.read(model, [prompts[i] for i in members])
            for reading, path in zip(readings, paths, strict=True):
                _keep(reading, path)
        found += [depth.deepened(seen[i], load_file(path)) for i, path in zip(members, paths, strict=True)]
    return found


def _keep(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished)
    unfinished.rename(path)
