"""Budgets: how many entries every head gets, so that what all heads together lose is least."""

from itertools import pairwise

import torch

from vllm_deltamem.calibration.importance import Weights, scores
from vllm_deltamem.calibration.influence import Observation
from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.memory import Shape, plan_layout

SIZES = (0.02, 0.05, 0.1, 0.15, 0.25, 0.5)  # memories, as a fraction of the context
CONTEXT = 8192  # tokens at which the layout's fixed parts are taken into account
GRID = torch.linspace(0, 1, 65) ** 2  # fractions of the context that a head may hold: finer where memory is small
EQUAL = 0.1  # share of the memory that is dealt out equally, against what the training prompts did not show


def losses(observations: list[Observation], weights: list[Weights | None]) -> torch.Tensor:
    """Squared influence [L, G, 65] that is lost when a head keeps its best-scored GRID of the context.

    weights: of each observation, the importance heads that score it; they should not have been fitted to it,
    or heads look less needy than they are. Squares add up over tokens and heads as independent errors do.
    Averaged over prompts; all heads' losses at 0 entries sum to 1.
    """
    total = 0
    for observation, fitted in zip(observations, weights, strict=True):
        order = scores(observation, fitted).argsort(-1, descending=True)
        gained = observation.influence.square().gather(-1, order).cumsum(-1)
        gained = torch.nn.functional.pad(gained, (1, 0))
        kept = (GRID * order.shape[-1]).round().long()
        total = total + gained[..., -1:] - gained[..., kept]
    return total / len(observations)


def allocate(loss: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Budgets [sizes, L, G], mean 1, for the memory sizes of SIZES; L layers with full attention, as in the losses.

    Entries go one grid step at a time to the head whose loss falls most per entry, along the convex
    hulls of the loss curves: the optimum of a separable convex problem.
    """
    steps = []
    flat = loss.flatten(0, 1)
    for head, curve in enumerate(flat.tolist()):
        corners = _hull(GRID.tolist(), curve)
        steps += [((curve[a] - curve[b]) / (GRID[b] - GRID[a]).item(), head, b) for a, b in pairwise(corners)]
    steps.sort(key=lambda step: (-step[0], step[1]))
    return torch.stack([_shares(steps, len(flat), shape, size) for size in SIZES]).unflatten(1, loss.shape[:2])


def _shares(steps, heads: int, shape: Shape, size: float) -> torch.Tensor:
    """Walk down the steps until the entries of one memory size are spent. Shares [heads] of its bytes."""
    memory = round(size * CONTEXT)
    layout = plan_layout(shape, DeltaMemConfig(memory=memory))
    exact, coarse = (counts[shape.full_layers[0]][0] for counts in (layout.exact, layout.coarse))
    if exact + coarse >= CONTEXT - layout.window:
        return torch.ones(heads)  # everything fits
    cost = (memory - layout.ring - exact) / coarse  # tokens' worth of bytes that a coarse entry takes
    held, left = torch.zeros(heads), heads * (exact + coarse) / CONTEXT
    for _, head, corner in steps:
        more = min(GRID[corner].item() - held[head].item(), left)
        held[head] += more
        left -= more
    entries = (held + left / heads) * CONTEXT
    share = (layout.ring + exact + cost * (entries - exact).clamp_min(0)) / memory
    share = (1 - EQUAL) * share / share.mean() + EQUAL
    return share / share.mean()


def _hull(x: list[float], y: list[float]) -> list[int]:
    """Indices of the lower convex hull of a falling curve."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
