"""Budgets: how many entries every head gets, so that what all heads together lose is least."""

from itertools import pairwise

import torch

from vllm_deltamem.calibration.importance import Weights, scores
from vllm_deltamem.calibration.influence import Observation
from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.kernels.slot import FIDELITIES
from vllm_deltamem.memory import DEFAULT_FIDELITY, Layout, Shape, coarse_entry_bytes, plan_layout

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


def allocate(loss: torch.Tensor, shape: Shape, fidelity: tuple[str, ...], size: float) -> torch.Tensor:
    """Budgets [L, G], mean 1, for a memory of `size` of the context; L layers with full attention, as in the losses.

    Entries go one grid step at a time to the head whose loss falls most per byte, along the convex
    hulls of the loss curves: the optimum of a separable convex problem. fidelity: of every layer of the model.
    """
    cost = torch.tensor([entry_cost(shape, fidelity[i]) for i in shape.full_layers]).repeat_interleave(shape.kv_heads)
    steps = []
    for head, curve in enumerate(loss.flatten(0, 1).tolist()):
        for a, b in pairwise(_hull(GRID.tolist(), curve)):
            steps.append(((curve[a] - curve[b]) / ((GRID[b] - GRID[a]) * cost[head]).item(), head, b))
    held, left = torch.zeros(len(cost)), len(cost) * room(shape, size)
    for _, head, corner in sorted(steps, key=lambda step: (-step[0], step[1])):
        more = min(CONTEXT * GRID[corner].item() - held[head].item(), left / cost[head].item())
        held[head] += more
        left -= more * cost[head].item()
    if left > 0:
        return torch.ones(loss.shape[:2])  # everything fits
    memory, layout = _memory(shape, size)
    exact = layout.sinks + layout.pinned
    share = (layout.ring + exact + cost * (held - exact).clamp_min(0)) / memory
    share = (1 - EQUAL) * share / share.mean() + EQUAL
    return (share / share.mean()).view(loss.shape[:2])


def room(shape: Shape, size: float) -> float:
    """Tokens' worth of bytes for the entries of a head in a memory of `size` of the context, on average.

    Exact entries count like coarse ones, as they hold as much.
    """
    memory, layout = _memory(shape, size)
    return memory - layout.ring - (layout.sinks + layout.pinned) * (1 - entry_cost(shape, DEFAULT_FIDELITY))


def entry_cost(shape: Shape, fidelity: str) -> float:
    """Tokens' worth of bytes that a coarse entry takes."""
    return coarse_entry_bytes(shape, FIDELITIES[fidelity]) / shape.token_bytes


def _memory(shape: Shape, size: float) -> tuple[int, Layout]:
    """Tokens of a memory of `size` of the context, and its layout with equal heads."""
    memory = round(size * CONTEXT)
    return memory, plan_layout(shape, DeltaMemConfig(memory=memory))


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
