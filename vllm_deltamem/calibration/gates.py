"""Merge gates: how far losers join their nearest entry. Fitted to trial merges, then chosen by prediction."""

import dataclasses

import torch
from tqdm import tqdm

from vllm_deltamem.calibration.frozen import FrozenModel
from vllm_deltamem.calibration.influence import Observation
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


def fit(observations: list[Observation], steps: int = 400) -> torch.Tensor:
    """Gates [L, G, 3] that leave the least error in trial merges; none of them looks at the entry's mass."""
    cosine, given_back, size = (
        torch.cat([getattr(o, name) for o in observations], -1) for name in ("cosine", "given_back", "size")
    )
    weights = torch.tensor([-4.0, 8.0]).repeat(*cosine.shape[:2], 1).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.1)
    for _ in range(steps):
        opened = torch.sigmoid(weights[..., :1] + weights[..., 1:] * cosine)
        error = (opened.square() * size - 2 * opened * given_back).sum() / len(observations)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return torch.nn.functional.pad(weights.detach(), (0, 1))


def choose(model: FrozenModel, profile: Profile, fitted: torch.Tensor, prompts: list[Prompt]) -> tuple[str, Profile]:
    """The gate with the least loss over prompts and SHARES: its name, and the profile with it."""
    losses = {}
    candidates = {name: torch.tensor(gate).expand_as(fitted).clone() for name, gate in CANDIDATES.items()}
    candidates["fitted"] = fitted
    for name, gate in tqdm(candidates.items(), "gates compared"):
        candidate = dataclasses.replace(profile, gate=gate)
        losses[name] = sum(
            score(model, [prompt], memory_attention(model, candidate, len(prompt.ids), share)).loss
            for prompt in prompts
            for share in SHARES
        )
    best = min(losses, key=losses.get)
    return best, dataclasses.replace(profile, gate=candidates[best])
