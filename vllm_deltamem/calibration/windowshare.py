"""The share of a small memory that its window takes: recall wants entries, text the most recent tokens."""

import dataclasses

from tqdm import tqdm

from vllm_deltamem.calibration.frozen import FrozenModel
from vllm_deltamem.calibration.prompts import Prompt
from vllm_deltamem.calibration.simulate import total_loss
from vllm_deltamem.memory import WINDOW_SHARE
from vllm_deltamem.profile import Profile

CANDIDATES = (WINDOW_SHARE, WINDOW_SHARE / 2)


def choose(model: FrozenModel, profile: Profile, prompts: list[Prompt]) -> Profile:
    """The profile with the share that loses least over prompts."""
    candidates = [dataclasses.replace(profile, window_share=share) for share in CANDIDATES]
    return min(tqdm(candidates, "windows compared"), key=lambda candidate: total_loss(model, candidate, prompts))
