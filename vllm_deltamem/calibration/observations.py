"""Observations of training prompts, each written to a folder once it is made: calibration can go on there."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from tqdm import tqdm

from vllm_deltamem.calibration.frozen import FrozenModel
from vllm_deltamem.calibration.influence import Observation, observe
from vllm_deltamem.calibration.prompts import Prompt


def observed(model: FrozenModel, prompts: list[Prompt], folder: Path, name: str) -> list[Observation]:
    """Observe every prompt. What lies in `folder` under `name` is not done again."""
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for i, prompt in enumerate(tqdm(prompts, "prompts observed")):
        path = folder / f"{name}-{i:03}-exposed.safetensors"
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            save_file(observe(model, prompt, seed=i)._asdict(), unfinished)
            unfinished.rename(path)
        done.append(Observation(**load_file(path)))
    return done
