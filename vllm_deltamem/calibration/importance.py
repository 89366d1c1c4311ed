"""Importance heads: from a token's own key and value to how much later queries will need it."""

import torch
from tqdm import tqdm

from vllm_deltamem.calibration.influence import Observation
from vllm_deltamem.kernels.reference import importance
from vllm_deltamem.kernels.slot import KEYDIFF_NATS

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
BATCH = 768  # tokens of every head per step
EPOCHS = 16
SPREAD = 8.0  # standard deviations that are one unit of a standardised feature


def fit(
    observations: list[Observation], seed: int, units: int = 32, steps: int | None = None, device: str = "cpu"
) -> Weights:
    """Fit w1 [L, G, 2D, U], b1 and w2 [L, G, U], b2 [L, G]: exp(score) is the influence expected at an exposure of 1.

    The loss is Poisson's, whose minimum is the conditional mean however heavy the tail: keeping the tokens of
    highest expected influence loses the least. Tokens late in a prompt have fewer questions after them, and heads can
    tell how late it is: without the exposure they learn that what comes late is worth less. Heads start as KeyDiff with
    a fixed mean key. Features are standardised while fitting, as key biases hide what differs, and the weights turned
    back at the end.
    """
    layers, heads = observations[0].key.shape[:2]
    features = torch.cat([torch.cat([o.key, o.value], -1) for o in observations], 2).flatten(0, 1).to(device)
    target = torch.cat([o.influence.abs() for o in observations], 2).flatten(0, 1).to(device)
    exposure = torch.cat([o.exposure for o in observations]).to(device)
    target = target * (exposure.mean() / target.mean(1, keepdim=True).clamp_min(1e-12))
    centre = torch.stack([x.float().mean(0) for x in features])  # [H, 2D]
    spread = SPREAD * torch.stack([x.float().std(0) for x in features]).clamp_min(1e-3)
    steps = steps or EPOCHS * features.shape[1] // BATCH
    torch.manual_seed(seed)
    weights = [w.to(device).requires_grad_() for w in _start(centre.cpu(), spread.cpu(), units)]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in tqdm(range(steps), "importance heads fitted"):
        batch = torch.randint(0, features.shape[1], (BATCH,)).to(device)
        standard = (features[:, batch].float() - centre[:, None]) / spread[:, None]
        score = _score(standard, weights).clamp(max=8)
        loss = (exposure[batch] * score.exp() - target[:, batch] * score).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 10.0)
        optimizer.step()
        schedule.step()
    w1, b1, w2, b2 = (w.detach() for w in weights)
    w1 = w1 / spread[..., None]
    b1 = b1 - torch.bmm(centre[:, None], w1)[:, 0]
    return tuple(w.cpu().unflatten(0, (layers, heads)) for w in (w1, b1, w2, b2))


def scores(observation: Observation, weights: Weights | None) -> torch.Tensor:
    """Scores [L, G, T] as the kernels give them; without weights those of KeyDiff."""
    if weights is None:
        return observation.keydiff
    key, value = observation.key.flatten(0, 1).float(), observation.value.flatten(0, 1).float()
    flat = tuple(w.flatten(0, 1).float() for w in weights)
    return importance(key, value, None, flat).unflatten(0, observation.key.shape[:2])


def _start(centre: torch.Tensor, spread: torch.Tensor, units: int) -> list[torch.Tensor]:
    """Weights on standardised features that score as KeyDiff against the mean key: gelu(x) - gelu(-x) = x.

    centre and spread [H, 2D]: a feature is centre + spread times its standardised value.
    """
    count, size = centre.shape[0], centre.shape[1] // 2
    mean = torch.nn.functional.normalize(centre[:, :size], dim=-1)
    w1, b1, w2 = torch.randn(count, 2 * size, units) / size**0.5, torch.zeros(count, units), torch.zeros(count, units)
    w1[:, size:, :2] = 0
    w1[:, :size, 0], b1[:, 0] = -mean * spread[:, :size], -(mean * centre[:, :size]).sum(-1)
    w1[:, :size, 1], b1[:, 1] = -w1[:, :size, 0], -b1[:, 0]
    w2[:, 0], w2[:, 1] = KEYDIFF_NATS, -KEYDIFF_NATS  # its scores then spread over about as much as the target
    return [w1, b1, w2, torch.zeros(count)]


def _score(features, weights):
    w1, b1, w2, b2 = weights
    hidden = torch.nn.functional.gelu(torch.bmm(features, w1) + b1[:, None], approximate="tanh")
    return (hidden * w2[:, None]).sum(-1) + b2[:, None]
