"""Merge gates: which losers join their nearest entry, chosen by what the model then predicts."""

import dataclasses

import torch
from tqdm import tqdm

from vllm_deltamem.calibration.frozen import FrozenModel
from vllm_deltamem.calibration.prompts import Prompt
from vllm_deltamem.calibration.simulate import memory_attention, score
from vllm_deltamem.profile import Profile

SHARES = (0.15, 0.05)  # memory sizes to choose for
CANDIDATES = {
    "drop": (-24.0, 0.0, 0.0),
    "mean": (24.0, 0.0, 0.0),
    "cosine above 0.4": (-16.0, 40.0, 0.0),
    "cosine above 0.6": (-24.0, 40.0, 0.0),
    "cosine above 0.8": (-32.0, 40.0, 0.0),
    "cosine above 0.6, light entries first": (-24.0, 40.0, -1.0),
}


def choose(model: FrozenModel, profile: Profile, prompts: list[Prompt]) -> tuple[str, Profile]:
    """The candidate with the least loss over prompts and SHARES, and the profile with it in every head."""
    losses = {}
    for name, gate in tqdm(CANDIDATES.items(), "gates compared"):
        candidate = with_gate(profile, gate)
        losses[name] = sum(
            score(model, [prompt], memory_attention(model, candidate, len(prompt.ids), share)).loss
            for prompt in prompts
            for share in SHARES
        )
    best = min(losses, key=losses.get)
    return best, with_gate(profile, CANDIDATES[best])


def with_gate(profile: Profile, gate: tuple[float, float, float]) -> Profile:
    return dataclasses.replace(profile, gate=torch.tensor(gate).expand_as(profile.gate).clone())
