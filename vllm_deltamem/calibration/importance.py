"""Importance heads: from a token's own key and value to how much later queries will need it."""

import torch
from tqdm import tqdm

from vllm_deltamem.calibration.influence import Observation
from vllm_deltamem.kernels.reference import importance

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
BATCH = 1024  # tokens of every head per step
KEYDIFF_SCALE = 4.0  # of the starting point; its scores then spread over about as many nats as the target


def fit(observations: list[Observation], seed: int, units: int = 16, steps: int = 200, device: str = "cpu") -> Weights:
    """Fit w1 [L, G, 2D, U], b1 and w2 [L, G, U], b2 [L, G]: exp(score) is the expected influence.

    The loss is Poisson's, whose minimum is the conditional mean however heavy the tail: keeping the tokens of
    highest expected influence loses the least. Heads start as KeyDiff with a fixed mean key.
    """
    layers, heads, _, size = observations[0].key.shape
    features = torch.cat([torch.cat([o.key, o.value], -1) for o in observations], 2).flatten(0, 1).to(device)
    target = torch.cat([o.influence.abs() for o in observations], 2).flatten(0, 1).to(device)
    target = target / target.mean(1, keepdim=True).clamp_min(1e-12)
    torch.manual_seed(seed)
    mean = torch.nn.functional.normalize(features[..., :size].float().mean(1), dim=-1)
    weights = _start(mean, units)
    for w in weights:
        w.requires_grad_()
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in tqdm(range(steps), "importance heads fitted"):
        batch = torch.randint(0, features.shape[1], (BATCH,)).to(device)
        score = _score(features[:, batch], weights).clamp(max=8)
        loss = (score.exp() - target[:, batch] * score).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 10.0)
        optimizer.step()
        schedule.step()
    return tuple(w.detach().cpu().unflatten(0, (layers, heads)) for w in weights)


def scores(observation: Observation, weights: Weights | None) -> torch.Tensor:
    """Scores [L, G, T] as the kernels give them; without weights those of KeyDiff."""
    if weights is None:
        return observation.keydiff
    key, value = observation.key.flatten(0, 1).float(), observation.value.flatten(0, 1).float()
    flat = tuple(w.flatten(0, 1).float() for w in weights)
    return importance(key, value, None, flat).unflatten(0, observation.key.shape[:2])


def _start(mean: torch.Tensor, units: int) -> list[torch.Tensor]:
    """Weights that score as KeyDiff against the mean key [H, D]: gelu(x) - gelu(-x) = x."""
    count, size = mean.shape
    w1 = torch.randn(count, 2 * size, units, device=mean.device) / size**0.5
    w1[:, :size, 0], w1[:, :size, 1] = -mean, mean
    w1[:, size:, :2] = 0
    w2 = torch.zeros(count, units, device=mean.device)
    w2[:, 0], w2[:, 1] = KEYDIFF_SCALE, -KEYDIFF_SCALE
    return [w1, torch.zeros(count, units, device=mean.device), w2, torch.zeros(count, device=mean.device)]


def _score(features, weights):
    w1, b1, w2, b2 = weights
    hidden = torch.nn.functional.gelu(torch.bmm(features.float(), w1) + b1[:, None], approximate="tanh")
    return (hidden * w2[:, None]).sum(-1) + b2[:, None]
