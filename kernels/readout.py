"""The memory of some slots in one layer as attention reads it, dequantised, for the CPU path."""

import torch

from .slot import EMPTY, LayerSlots, Rope, decode, rank_position, rotate

KEY_BLOCK = 512  # keys per block of PyTorch's CPU flash attention: sums are split at its multiples
MASKED = -1e30  # finite, so that a row whose memory is empty yields weight 0 instead of NaN


class Readout:
    """Keys, values and logit bias of slots [n], heads padded to the same width.

    Entry e of head g sits in column e, exact ones first; the width is a whole number of key blocks, so that
    trailing empty columns never change how sums round. A sequence keeps its readout from step to step and
    refreshes only what a merge wrote.
    """

    def __init__(self, slots: LayerSlots, slot: torch.Tensor, gone: int):
        self.slots, self.slot = slots, slot
        self.exact, self.coarse = slots.exact_start.tolist(), slots.coarse_start.tolist()
        exact, coarse = torch.tensor(self.exact), torch.tensor(self.coarse)
        self.exact_count, self.coarse_count = exact.diff(), coarse.diff()
        self.capacity = self.exact_count + self.coarse_count
        self.width = blocks(min(int(self.capacity.max()), gone))
        n, (kv_heads, _, size), dtype = len(slot), slots.ring_k.shape[1:], slots.ring_k.dtype
        self.k = torch.zeros(n, kv_heads, self.width, size, dtype=dtype)
        self.v = torch.zeros(n, kv_heads, self.width, size, dtype=dtype)
        self.bias = torch.zeros(n, kv_heads, self.width)
        rows = slice(int(slot), int(slot) + 1) if n == 1 else slot
        self._copy_exact(rows)
        if bool((gone > self.exact_count).any()):
            self._copy_coarse(rows)
        self.plain: torch.Tensor | None = None  # [G, Y, D] fp32, see plain_keys

    def part(self, gone: torch.Tensor):
        """k, v [n, G, E, D] and bias [n, G, E] for memories that have seen gone [n] tokens."""
        width = blocks(min(int(self.capacity.max()), int(gone.max())))
        empty = torch.arange(width) >= torch.minimum(gone[:, None], self.capacity)[..., None]
        return self.k[:, :, :width], self.v[:, :, :width], self.bias[..., :width].masked_fill(empty, MASKED)

    def plain_keys(self, table: torch.Tensor, rank: torch.Tensor, rope: Rope | None):
        """Coarse keys [G, Y, D] fp32 before RoPE and their squared norms [G, Y], kept between merges.

        table: padded table [G, Y] of flat entries; rank: theirs.
        """
        if self.plain is None:
            keys = decode_keys(self.slots, int(self.slot), slice(None))[table]
            self.plain = rotate(keys, known_position(rank, rope), rope, inverse=True)
            self.square = self.plain.square().sum(-1)
        return self.plain, self.square

    def refresh_exact(self, head: torch.Tensor, entry: torch.Tensor) -> None:
        """Read exact entries again: flat indices entry [W] of heads [W]."""
        column = entry - self.slots.exact_start[head]
        slot = int(self.slot)
        self.k[0, head, column] = self.slots.exact_k[slot, entry]
        self.v[0, head, column] = self.slots.exact_v[slot, entry]

    def refresh_coarse(self, head: torch.Tensor, entry: torch.Tensor, rope: Rope | None) -> None:
        """Read coarse entries again."""
        row, slot = entry - self.slots.coarse_start[head], int(self.slot)
        column = row + self.exact_count[head]
        keys = decode_keys(self.slots, slot, entry)
        self.k[0, head, column] = keys.to(self.k.dtype)
        self.v[0, head, column] = decode_values(self.slots, slot, entry).to(self.v.dtype)
        self.bias[0, head, column] = self.slots.coarse_mass[slot, entry].log()
        if self.plain is not None:
            position = known_position(self.slots.coarse_rank[slot, entry], rope)
            plain = rotate(keys, position, rope, inverse=True)
            self.plain[head, row] = plain
            self.square[head, row] = plain.square().sum(-1)

    def _copy_exact(self, rows):
        for g in range(len(self.exact) - 1):
            begin, count = self.exact[g], min(self.exact[g + 1] - self.exact[g], self.width)
            self.k[:, g, :count] = self.slots.exact_k[rows, begin : begin + count]
            self.v[:, g, :count] = self.slots.exact_v[rows, begin : begin + count]

    def _copy_coarse(self, rows):
        keys, values = decode_keys(self.slots, rows, slice(None)), decode_values(self.slots, rows, slice(None))
        bias = self.slots.coarse_mass[rows].log()
        for g in range(len(self.coarse) - 1):
            first = int(self.exact_count[g])
            count = min(self.coarse[g + 1] - self.coarse[g], self.width - first)
            if count > 0:
                source = slice(self.coarse[g], self.coarse[g] + count)
                self.k[:, g, first : first + count] = keys[:, source]
                self.v[:, g, first : first + count] = values[:, source]
                self.bias[:, g, first : first + count] = bias[:, source]


def blocks(count: int) -> int:
    """Round up to whole key blocks, at least one."""
    return -(-max(count, 1) // KEY_BLOCK) * KEY_BLOCK


def decode_keys(slots: LayerSlots, slot, entries) -> torch.Tensor:
    """Coarse keys fp32, as attention reads them: rounded to the model's dtype."""
    codes, affine = slots.coarse_k[slot, entries], slots.coarse_k_affine[slot, entries]
    return decode(codes, affine, slots.codec.key_bits, slots.ring_k.dtype).float()


def decode_values(slots: LayerSlots, slot, entries) -> torch.Tensor:
    """Coarse values fp32, likewise."""
    codes, affine = slots.coarse_v[slot, entries], slots.coarse_v_affine[slot, entries]
    return decode(codes, affine, slots.codec.value_bits, slots.ring_v.dtype).float()


def known_position(rank: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """Positions of entries, 0 for empty ones, which have none."""
    return torch.where(rank == EMPTY, 0, rank_position(rank))
