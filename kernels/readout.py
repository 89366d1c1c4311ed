"""The memory of one slot in one layer as attention and merging read it, dequantised, for the CPU path."""

import torch

from .slot import EMPTY, LayerSlots, Rope, decode, encode_and_read, key_position, rank_position, rotate

KEY_BLOCK = 64  # columns are a multiple: from 32 keys on a row rounds alike however many rows there are
MASKED = -1e30  # finite, so that a row whose memory is empty yields weight 0 instead of NaN
TAKEN = torch.iinfo(torch.int64).max  # order of a column that no token may take: nothing outranks it


class Readout:
    """Entries of all heads side by side: entry e of head g is column e of row g, exact ones first.

    What is read of a head is a number of whole key blocks that position alone decides, whatever the width.
    A sequence keeps its readout from step to step; whoever changes an entry of the slot does so through
    replace_exact and store, which change both. What only merging reads is made by its first merge.

    k, v [G, E, D] model dtype; bias [G, E] fp32, the log of the mass, MASKED where there is no entry.
    """

    def __init__(self, slots: LayerSlots, slot: int, gone: int):
        self.slots, self.slot = slots, slot
        self.exact_count, self.coarse_count = slots.exact_start.diff(), slots.coarse_start.diff()
        self.capacities = (self.exact_count + self.coarse_count).tolist()
        self.width = max(self.widths(gone))
        (kv_heads, _, size), dtype = slots.ring_k.shape[1:], slots.ring_k.dtype
        self.k = torch.zeros(kv_heads, self.width, size, dtype=dtype)
        self.v = torch.zeros(kv_heads, self.width, size, dtype=dtype)
        self.mass = torch.zeros(kv_heads, self.width)  # of coarse entries
        self.rank = torch.zeros(kv_heads, self.width, dtype=torch.int64)
        self._read()
        self.bias = torch.where(self.mass > 0, self.mass.log(), 0.0).masked_fill_(self.rank == EMPTY, MASKED)
        self.plain: torch.Tensor | None = None
        self._far = 0, self.rank == EMPTY  # the limit that far() last answered for, and the answer
        self._heads: tuple[int, list] = 0, []  # likewise of heads()

    @property
    def nbytes(self) -> int:
        """With what merging needs."""
        return self.k.numel() * (2 * self.k.element_size() + 4) + self.mass.numel() * 36

    def widths(self, gone: int) -> list[int]:
        """Columns of each head that may hold something once the memory has seen `gone` tokens."""
        return [blocks(min(capacity, gone)) for capacity in self.capacities]

    def heads(self, gone: int, unseen: torch.Tensor | None = None) -> list[tuple[torch.Tensor, ...]]:
        """(k, v [1, 1, E, D], bias [1, 1, 1, E]) of each head as its queries see it: views, one by one since a head
        may hold eight times the mean. Columns `unseen` [G, E] are masked.
        """
        if unseen is not None:
            return self._cut(gone, self.bias.masked_fill(unseen, MASKED))
        if self._heads[0] != gone:
            self._heads = gone, self._cut(gone, self.bias)
        return self._heads[1]

    def _cut(self, gone, bias):
        rows = zip(self.k, self.v, bias, self.widths(gone), strict=True)
        return [(k[None, None, :n], v[None, None, :n], mask[None, None, None, :n]) for k, v, mask, n in rows]

    def far(self, limit: int) -> torch.Tensor:
        """Columns [G, E] that hold far entries, see reference.far_limit: merges, which change them, raise it."""
        if self._far[0] != limit:
            self._far = limit, (self.rank != EMPTY) & (rank_position(self.rank) < limit)
        return self._far[1]

    def prepare_merge(self, rope: Rope | None) -> None:
        """Turn keys that become far, and make what only merging needs: plain keys, and how entries give way.

        plain [G, E, D] fp32; exact_order and coarse_order [G, E] int64, the
        rank of each entry of that tier, below 0 for empty ones, the first the lowest, TAKEN for other columns.
        """
        self.rope = rope
        if rope is not None and rope.limit:
            self._turn_far()
        if self.plain is not None:
            return
        self.plain = rotate(self.k.float(), key_position(self.rank, rope), rope, inverse=True)
        column = torch.arange(self.width)
        order = torch.where(self.rank == EMPTY, column - self.width, self.rank)
        is_exact = column < self.exact_count[:, None]
        inside = column < (self.exact_count + self.coarse_count)[:, None]
        widest = min(int(self.exact_count.max()), self.width)
        self.exact_order = torch.where(is_exact, order, TAKEN)[:, :widest].contiguous()
        self.coarse_order = torch.where(~is_exact & inside, order, TAKEN)

    def replace_exact(self, head, column, k, v, plain, rank) -> tuple[torch.Tensor, ...]:
        """Put tokens [W] into exact entries of heads [W]; returns k, v, plain and rank of what was there."""
        place, entry = head * self.width + column, self.slots.exact_start[head] + column
        flat = self.k.flatten(0, 1), self.v.flatten(0, 1), self.plain.flatten(0, 1), self.rank.flatten()
        given_up = tuple(field.index_select(0, place) for field in flat)
        for field, new in zip(flat, (k, v, plain, rank), strict=True):
            field.index_copy_(0, place, new)
        slots, slot = self.slots, self.slot
        for field, new in ((slots.exact_k, k), (slots.exact_v, v), (slots.exact_rank, rank)):
            field[slot].index_copy_(0, entry, new)
        self.exact_order.view(-1).index_copy_(0, head * self.exact_order.shape[1] + column, rank)
        self.bias.view(-1).index_fill_(0, place, 0.0)
        return given_up

    def store(self, place, k, v, mass, rank) -> None:
        """Write coarse entries: k, v [W, D] fp32, mass [W] fp32, rank [W]; place [W] = head * width + column."""
        slots, slot, dtype = self.slots, self.slot, self.slots.ring_k.dtype
        head = place // self.width
        column = place - head * self.width
        entry = (slots.coarse_start[:-1] - self.exact_count).index_select(0, head) + column
        key_bits, value_bits = slots.codec
        if key_bits == value_bits:
            both = encode_and_read(torch.stack((k, v)), key_bits, dtype)
            coded = zip(*(part.unbind() for part in both), strict=True)
        else:
            coded = encode_and_read(k, key_bits, dtype), encode_and_read(v, value_bits, dtype)
        as_read = []
        for (code, scales, read), (field, bits, codes, affine) in zip(coded, self._coded(), strict=True):
            codes.index_copy_(0, entry, code)
            if bits < 16:
                affine.index_copy_(0, entry, scales)
            field.flatten(0, 1).index_copy_(0, place, read)
            as_read.append(read)
        slots.coarse_mass[slot].index_copy_(0, entry, mass)
        slots.coarse_rank[slot].index_copy_(0, entry, rank)
        plain = rotate(as_read[0].float(), key_position(rank, self.rope), self.rope, inverse=True)
        self.plain.flatten(0, 1).index_copy_(0, place, plain)
        for field, new in (
            (self.mass, mass),
            (self.bias, mass.log()),
            (self.rank, rank),
            (self.coarse_order, rank),
        ):
            field.view(-1).index_copy_(0, place, new)

    def _turn_far(self):
        """See reference._turn_far, over all heads."""
        slots, slot, rope = self.slots, self.slot, self.rope
        position = rank_position(self.rank)
        due = (self.rank != EMPTY) & (position < rope.limit) & (position >= rope.limit - slots.segment)
        head, column = due.nonzero(as_tuple=True)
        turned = rotate(self.k[head, column].float(), position[head, column], rope, inverse=True)
        keys, exact = turned.to(self.k.dtype), column < self.exact_count[head]
        slots.exact_k[slot, (slots.exact_start[head] + column)[exact]] = keys[exact]
        entry = (slots.coarse_start[head] + column - self.exact_count[head])[~exact]
        _, bits, codes, affine = self._coded()[0]
        codes[entry], affine[entry], keys[~exact] = encode_and_read(turned[~exact], bits, keys.dtype)
        self.k[head, column] = keys
        if self.plain is not None:
            self.plain[head, column] = rotate(keys.float(), torch.zeros_like(column), rope, inverse=True)

    def _read(self):
        slots, slot = self.slots, self.slot
        first = slots.exact_start.tolist()
        for g, count in enumerate(self.exact_count.tolist()):
            rows = slice(first[g], first[g] + min(count, self.width))
            for field, source in ((self.k, slots.exact_k), (self.v, slots.exact_v), (self.rank, slots.exact_rank)):
                field[g, : rows.stop - rows.start] = source[slot, rows]
        first, exact = slots.coarse_start.tolist(), self.exact_count.tolist()
        for g, count in enumerate(self.coarse_count.tolist()):
            count = min(count, self.width - exact[g])
            if count > 0:
                rows, columns = slice(first[g], first[g] + count), slice(exact[g], exact[g] + count)
                for field, bits, codes, affine in self._coded():
                    field[g, columns] = decode(codes[rows], affine[rows], bits, field.dtype)
                self.mass[g, columns] = slots.coarse_mass[slot, rows]
                self.rank[g, columns] = slots.coarse_rank[slot, rows]

    def _coded(self):
        """(readout, bits, codes, affine) of the coarse keys and values."""
        slots, slot = self.slots, self.slot
        return (
            (self.k, slots.codec.key_bits, slots.coarse_k[slot], slots.coarse_k_affine[slot]),
            (self.v, slots.codec.value_bits, slots.coarse_v[slot], slots.coarse_v_affine[slot]),
        )


def blocks(count: int) -> int:
    """Round up to whole key blocks, at least one."""
    return -(-max(count, 1) // KEY_BLOCK) * KEY_BLOCK
