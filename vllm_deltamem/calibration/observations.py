"""Observations of training prompts, each written to a folder once it is made: calibration can go on there."""

import json
from hashlib import blake2b
from pathlib import Path

from safetensors.torch import load_file, save_file
from tqdm import tqdm

from vllm_deltamem.calibration.frozen import FrozenModel
from vllm_deltamem.calibration.influence import Observation, observe
from vllm_deltamem.calibration.prompts import Prompt


def observed(model: FrozenModel, prompts: list[Prompt], folder: Path) -> list[Observation]:
    """Observe every prompt. What lies in `folder` of the same model and prompt is not done again."""
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for i, prompt in enumerate(tqdm(prompts, "prompts observed")):
        path = folder / f"{i:03}-{_name(model, prompt)}.safetensors"
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            save_file(observe(model, prompt, seed=i)._asdict(), unfinished)
            unfinished.rename(path)
        done.append(Observation(**load_file(path)))
    return done


def _name(model: FrozenModel, prompt: Prompt) -> str:
    known = json.dumps([model.model.name_or_path, model.fingerprint]).encode()
    return blake2b(known + prompt.ids.numpy().tobytes(), digest_size=8).hexdigest()
