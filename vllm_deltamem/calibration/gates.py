"""Merge gates: how far losers join their nearest entry. Fitted to trial merges, then chosen by prediction."""

import dataclasses

import torch
from tqdm import tqdm

from vllm_deltamem.calibration.frozen import FrozenModel
from vllm_deltamem.calibration.influence import Observation
from vllm_deltamem.calibration.prompts import Prompt
from vllm_deltamem.calibration.simulate import total_loss
from vllm_deltamem.profile import CLOSED_GATE, Profile

CANDIDATES = {
    "drop": CLOSED_GATE,
    "mean": (24.0, 0.0, 0.0),
    "cosine above 0.6": (-24.0, 40.0, 0.0),
    "cosine above 0.8": (-32.0, 40.0, 0.0),
    "cosine above 0.6, light entries first": (-24.0, 40.0, -1.0),
}
SPARED = 0.8  # of the squared influence on answers is in the heads that are called those that recall


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


def recalling(observations: list[Observation]) -> torch.Tensor:
    """The fewest heads [L, G] that carry SPARED of the squared influence of these prompts on their answers."""
    carried = torch.stack([o.influence.square().sum(-1) for o in observations]).mean(0)
    ordered, head = carried.flatten().sort(descending=True)
    before = ordered.cumsum(0) - ordered
    chosen = torch.zeros(carried.numel(), dtype=torch.bool)
    chosen[head[before < SPARED * carried.sum()]] = True
    return chosen.view_as(carried)


def choose(
    model: FrozenModel, profile: Profile, fitted: torch.Tensor, recall: torch.Tensor, prompts: list[Prompt]
) -> tuple[str, Profile]:
    """The gate that loses least over prompts: its name, and the profile with it.

    fitted: gates [L, G, 3]. recall: heads [L, G] in which every gate is tried with nothing merged, too: a merge
    pulls at a key that queries look for, which costs them more than the tokens merged are worth to other heads.
    """
    losses = {}
    candidates = {name: torch.tensor(gate).expand_as(fitted) for name, gate in CANDIDATES.items()} | {"fitted": fitted}
    for name, gate in list(candidates.items()):
        if name != "drop":
            candidates[f"{name}; none in heads that recall"] = torch.where(
                recall[..., None], torch.tensor(CLOSED_GATE), gate
            )
    for name, gate in tqdm(candidates.items(), "gates compared"):
        losses[name] = total_loss(model, dataclasses.replace(profile, gate=gate.clone()), prompts)
    best = min(losses, key=losses.get)
    return best, dataclasses.replace(profile, gate=candidates[best].clone())
