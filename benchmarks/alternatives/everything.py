"""Full attention under the same runner: the control that says what the engine itself changes."""

import torch

from .entries import Entries
from .segment import LayerShape, Segment


class Everything:
    """Holds every token. It is not at equal bytes."""

    unbounded = False

    def __init__(self, shape: LayerShape, room: int):
        self.entries = Entries(shape)

    @property
    def bytes(self) -> int:
        return self.entries.bytes

    def read(self, segment: Segment) -> torch.Tensor:
        self.entries.append(segment)
        return self.entries.read(segment)
