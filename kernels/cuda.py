"""The GPU's serving path: the functions of reference.py as Triton kernels."""

import torch

from .attend import attend, reserve_attention
from .launch import least_rows
from .merge import merge, reserve_merging
from .slot import LayerSlots
from .write import reset, write

__all__ = ["attend", "least_rows", "merge", "reserve", "reset", "write"]


def reserve(layers: list[LayerSlots], attending: int, merging: int, device: torch.device) -> None:
    """Take the scratch of calls of attend() and merge() with up to so many rows, so that none has to grow later.

    layers: slots like those that the calls will have, on any device, one without data among them.
    """
    reserve_attention(layers, attending, device)
    reserve_merging(layers, merging, device)
