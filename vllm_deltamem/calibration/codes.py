"""Fidelity: in which codes a layer's entries lose least for the bytes they take.

The influence of a token is the derivative by the logarithm of its weight. So an error of e nats in its logit costs as
dropping it does, times e and a factor below 1: errors have either sign, and what is dropped is gone together with what
stood for the same. What is lost by coding adds up with what is lost by having fewer entries.
"""

import torch

from vllm_deltamem.calibration import budgets
from vllm_deltamem.calibration.influence import Observation
from vllm_deltamem.memory import DEFAULT_FIDELITY, Shape

CHOICES = (
    "k3v4",
    "k5v4",
    "k8v4",
    "bf16",
)  # by the keys' codes; values stand four bits everywhere (benchmarks/NOTES.md)
SIGNED = 0.25  # of the square of what is lost: benchmarks/NOTES.md, "Keys where queries look"
HALVINGS = 40  # of the interval, in powers of two, that the price of bytes is searched in
DEAREST = 20.0


def choose(
    observations: list[Observation], lost: torch.Tensor, shape: Shape, size: float
) -> tuple[tuple[str, ...], torch.Tensor]:
    """The fidelity of every layer of the model, and what is lost [F, G, 65] once coding is counted, too.

    lost: of F layers with full attention, see budgets.losses. At one price of bytes every layer takes the codes and
    every head the entries that come cheapest; the price is that at which they fill a memory of `size` of the context.
    """
    squares = torch.stack([o.logit_error.square() for o in observations]).mean(0)  # [F, G, CODED], in order of CHOICES
    squares = torch.nn.functional.pad(SIGNED * squares, (0, 1)).clamp(max=1)
    with_codes = lost[..., None] + squares[:, :, None] * (lost[..., :1] - lost)[..., None]  # [F, G, 65, CHOICES]
    bytes_ = budgets.GRID[:, None] * torch.tensor([budgets.entry_cost(shape, name) for name in CHOICES])
    room = budgets.room(shape, size) / budgets.CONTEXT
    low, high = -DEAREST, DEAREST
    for _ in range(HALVINGS):
        best, spent = _at_price(with_codes, bytes_, 2 ** ((low + high) / 2))
        low, high = (low, (low + high) / 2) if spent <= room else ((low + high) / 2, high)
    best, _ = _at_price(with_codes, bytes_, 2**high)
    fidelity = [DEFAULT_FIDELITY] * shape.layers
    for layer, choice in zip(shape.full_layers, best.tolist(), strict=True):
        fidelity[layer] = CHOICES[choice]
    return tuple(fidelity), with_codes.gather(-1, best[:, None, None, None].expand(*lost.shape, 1))[..., 0]


def _at_price(lost: torch.Tensor, bytes_: torch.Tensor, price: float) -> tuple[torch.Tensor, float]:
    """The cheapest choice [F] of every layer, and the mean of the bytes that heads then take.

    lost: [F, G, 65, CHOICES]. bytes_: [65, CHOICES], as a fraction of the context at full precision.
    """
    least, entries = (lost + price * bytes_).min(2)  # [F, G, CHOICES]
    best = least.sum(1).argmin(-1)
    taken = bytes_.expand_as(lost).gather(2, entries[:, :, None])[:, :, 0]
    return best, taken.gather(-1, best[:, None, None].expand(*taken.shape[:2], 1)).mean().item()
