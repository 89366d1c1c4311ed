"""An associative matrix beside a window: Infini-attention (Munkhdalai et al., 2024, arXiv 2404.07143)."""

import torch

from .entries import SINKS, Entries, besides, tokens_in
from .segment import LayerShape, Segment, products, turn

GATE = 0.01  # the best of .5, .1, .03 and .01 on text that is not reported


class Infini:
    """Tokens that leave the window are written into M [G, D, D] and z [G, D] by the delta rule (eq. 5 and 4),

        M += s(K)' (V - s(K) M / s(K) z),   z += sum of s(K),   s = ELU + 1,

    from keys before RoPE. A query reads s(q) M / s(q) z (eq. 3), joined with attention over sinks and window as
    gate * memory + (1 - gate) * local (eq. 6). The paper trains the gate of every head together with the model.
    This model was not trained, so the gate is one constant.
    """

    unbounded = True

    def __init__(self, shape: LayerShape, room: int):
        g, d = shape.kv_heads, shape.head_size
        self.matrix, self.norm = torch.zeros(g, d, d, device=shape.device), torch.zeros(g, d, device=shape.device)
        self.tokens = tokens_in(room - self.state_bytes, shape)
        self.entries = Entries(shape)

    @property
    def state_bytes(self) -> int:
        return self.matrix.nbytes + self.norm.nbytes

    @property
    def bytes(self) -> int:
        return self.entries.bytes + self.state_bytes

    def read(self, segment: Segment) -> torch.Tensor:
        leaving = len(self.entries) - besides(segment, self.tokens)
        if leaving > 0:
            first = segment.first - len(self.entries) + SINKS
            k, v = self.entries.shift(leaving)
            positions = torch.arange(first, first + leaving, device=k.device)
            self.write(turn(k, positions, segment.rope, inverse=True), v.float())
        self.entries.append(segment)
        local = self.entries.read(segment)
        if not self.norm.any():
            return local
        s = feature(turn(segment.q, segment.positions, segment.rope, inverse=True))
        found = products(s, self.matrix.mT) / products(s, self.norm[:, None])
        return (GATE * found + (1 - GATE) * local).to(local.dtype)

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keys before RoPE and values [G, T, D] fp32."""
        s = feature(k)
        known = s @ self.matrix / (s @ self.norm[..., None]).clamp(min=1e-6)
        self.matrix += s.mT @ (v - known)
        self.norm += s.sum(1)


def feature(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.elu(x) + 1
