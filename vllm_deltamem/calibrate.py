"""`deltamem calibrate MODEL -o PROFILE`: learn what a frozen model needs of its context, and write it down.

A prompt at a time it records how much every token matters in every head (calibration/influence.py), then fits the
importance heads to that, derives the budgets from it, and prints what the profile gains on held-out prompts.
"""

import random
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from vllm_deltamem.calibration.frozen import FrozenModel
from vllm_deltamem.calibration.influence import Observation, observe
from vllm_deltamem.calibration.prompts import Prompt, default_text, recall_prompt, text_prompt


def observations(
    model: FrozenModel, texts: list[str], folder: Path, seed: int, prompts: int, length: int
) -> list[Observation]:
    """Observe training prompts, every fourth one plain text. What lies in `folder` already is not done again."""
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for i in tqdm(range(prompts), "prompts observed", file=sys.stderr):
        path = folder / f"{i:03}.safetensors"
        if not path.exists():
            prompt = draw(model, texts, length, random.Random(f"{seed}-{i}"), recall=i % 4 != 3)
            unfinished = path.with_suffix(".unfinished")
            save_file(observe(model, prompt, seed=i)._asdict(), unfinished)
            unfinished.rename(path)
        done.append(Observation(**load_file(path)))
    return done


def draw(model: FrozenModel, texts: list[str], length: int, rng: random.Random, recall: bool) -> Prompt:
    return (recall_prompt if recall else text_prompt)(model.tokenizer, rng.choice(texts), length, rng)
