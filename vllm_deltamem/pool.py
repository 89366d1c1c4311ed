"""All slots of a worker: vLLM's cache seen as slabs."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import ClassVar, NamedTuple

import torch
from vllm.logger import init_logger

from vllm_deltamem.blocks import Moves, Slot
from vllm_deltamem.kernels.slot import Policy, Rope
from vllm_deltamem.plan import MemoryPlan
from vllm_deltamem.slab import ON_CPU, Slab
from vllm_deltamem.transfers import Branch

logger = init_logger(__name__)
USUAL_ROWS = 256  # of a step
if ON_CPU:
    from vllm_deltamem.kernels import cpu as kernels
else:
    from vllm_deltamem.kernels import cuda as kernels


class Rows(NamedTuple):
    """The sequences of a call, see kernels/reference.py."""

    slot_indices: torch.Tensor  # [N] or [N, parts] int32, rows of a slab, -1 for those that sit the call out
    cu_seqlens: torch.Tensor  # [N + 1] int32
    seq_lens: torch.Tensor  # [N] int32, tokens of the sequence up to the end of the call


class Due(NamedTuple):
    """Sequences that complete a segment with a step, which makes another leave the window."""

    rows: Rows  # of one token each, of whole slots
    longest: int  # tokens of the longest


@dataclass
class SlotPool:
    """The slots of one worker, and what of a step concerns them."""

    slabs: list[Slab]  # whole slots, and their parts where there are any: of the same bytes
    policies: list[Policy]
    ropes: list[Rope | None]
    parts: int  # of a slot
    places: torch.Tensor  # [blocks] int32, the part that is a block of vLLM's; the null block is none: -1
    branches: list[Branch] = field(default_factory=list)  # of the step under way
    pins: dict[int, list[list[int]]] = field(default_factory=dict)  # of the same, by whole slot: see pin()
    kinds: tuple[bool, bool] = (True, True)  # whether rows of it have whole slots, and parts; a captured graph's may
    due: list[Due] = field(default_factory=list)  # what merge_due() has to do after the forward pass
    # of the model that this process loaded last; vLLM makes and drops a small cache before the real one
    _holder: ClassVar[weakref.ref | None] = None

    @classmethod
    def held_by(cls, builder) -> None:
        """Let serving() answer the `pool` of this metadata builder, as long as it lives."""
        cls._holder = weakref.ref(builder)

    @classmethod
    def serving(cls) -> "SlotPool | None":
        """The pool of the model that this process loaded last, while its metadata builder lives."""
        builder = cls._holder and cls._holder()
        return builder.pool if builder is not None else None

    @property
    def whole(self) -> Slab:
        """Whole slots: those in which anything is merged."""
        return self.slabs[0]

    def busy(self, rows: list[Rows]) -> Iterator[tuple[Slab, Rows]]:
        """Slabs that rows of the step may be in, with what is theirs of the rows of every slab."""
        return ((slab, own) for slab, own, busy in zip(self.slabs, rows, self.kinds, strict=False) if busy)

    def memory(self, slot: Slot) -> list[torch.Tensor]:
        """The bytes of a whole slot, or of every part, uint8."""
        return [self._slab(slot).rows[row] for row in slot.rows]

    def merge(self, layer: int, due: list[Due]) -> None:
        """Merge in one layer, unless the step has no whole slots: `due` has sequences in parts, too."""
        for rows, longest in due if self.kinds[0] else ():
            known = {"readouts": self.whole.readouts[layer]} if ON_CPU else {"max_seq_len": longest}
            kernels.merge(self.whole.layers[layer], *rows, self.ropes[layer], self.policies[layer], **known)

    @torch.inference_mode()
    def merge_due(self) -> None:
        """Merge in all layers what the last decoding step left, once."""
        due, self.due = self.due, []
        if due:
            for layer in range(len(self.policies)):
                self.merge(layer, due)

    @torch.inference_mode()
    def warm_up(self, queries: list[tuple[int, torch.Tensor | None]], most_rows: int, longest: int) -> None:
        """Compile, on a GPU, what steps of up to so many rows launch, and look it up: no request should wait for it.

        Rows without a slot do that. queries: of every layer, heads and sink logits; longest: tokens of the longest
        sequence. What more than USUAL_ROWS take, compiled anew for every few hundred, is left until such a step comes,
        but for clearing, which no captured graph has done.
        """
        tokens = 2
        for count in kernels.least_rows(most_rows):
            ends, lens = self.upload([0] + [tokens] * count), self.upload([tokens] * count)
            rows = [Rows(lens.new_full((count, *slab.held), -1), ends, lens) for slab in self.slabs]
            self.reset(rows)
            if count > USUAL_ROWS:
                continue
            for slots, own, rope, (heads, sinks) in self._all(rows, queries):
                _, kv_heads, _, size = slots.ring_k.shape
                qkv = slots.ring_k.new_zeros(tokens, heads + 2 * kv_heads, size)
                q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
                out = torch.zeros_like(q, memory_format=torch.contiguous_format)
                for query_len in (1, tokens):
                    known = {"max_query_len": query_len, "live_tokens": tokens}
                    kernels.write(k, v, slots, *own, **known)
                    kernels.attend(q, slots, *own, 1.0, out, rope, sinks, **known)
        self.due = [Due(Rows(*map(self.upload, ([-1], [0, 1], [0]))), longest)]
        self.merge_due()

    def _all(self, rows: list[Rows], queries: list) -> Iterator[tuple]:
        """Layers of all slabs, with the slab's rows, their rope and what warm_up() is told of their queries."""
        for slab, own in zip(self.slabs, rows, strict=True):
            yield from zip(slab.layers, repeat(own), self.ropes, queries)

    def reset(self, rows: list[Rows]) -> None:
        """Clear the slots of sequences whose first token is in this step, and write their pins. rows: of every slab.

        Parts are cleared as a sequence comes to them: what others left there would be saved along with a session.
        """
        whole, *parts = rows
        fresh = kernels.reset(self.whole.rows, *whole)
        if ON_CPU:
            self.whole.forget(fresh)
        for slab, own in zip(self.slabs[1:], parts, strict=True):
            kernels.reset(slab.rows, *own, cells=slab.layers[0].ring_k.shape[2])
        self._write_pins()

    def forget(self, slot: Slot) -> None:
        """Drop what the CPU path has read of a slot that is restored."""
        self._slab(slot).forget([*slot.rows])

    def pin(self, claimed: dict[int, list[list[int]]]) -> None:
        """Write the pinned spans of whole slots that sequences just claimed, and once more where reset() clears one."""
        self.pins = claimed
        for row in claimed:
            self.whole.layers[0].pins[row] = 0  # a memory that went back may have had some past its new end
        self._write_pins()

    @torch.inference_mode()
    def move(self, moves: Moves) -> None:
        """Have parts lie elsewhere from the next step on."""
        for source, target in moves.parts.items():
            self.slabs[1].copy(source, target)
        if moves.places:
            blocks, places = self.upload([*moves.places]), self.upload([*moves.places.values()])
            self.places.index_copy_(0, blocks.long(), places)

    def copy(self, source: Slot, target: Slot) -> None:
        """Have a vacant slot hold what another one of its kind holds now, in its first parts if that has fewer."""
        assert source.whole == target.whole and len(source.rows) <= len(target.rows)
        for rows in zip(source.rows, target.rows, strict=False):
            self._slab(target).copy(*rows)

    def branch(self, branches: list[Branch]) -> None:
        """Have the forward pass copy slots, none of which has pins, while prompts are read."""
        self.branches = branches
        for branch in branches:
            self.whole.layers[0].pins[branch.target] = 0
        self.whole.forget([branch.target for branch in branches])

    def copy_branches(self, layer: int, piece: int) -> None:
        """Copy in one layer what is due after this piece of every prompt."""
        for branch in self.branches:
            if branch.piece == piece:
                self.whole.copy_layer(layer, branch.slot, branch.target)

    def pins_of(self, slot: Slot) -> list[list[int]]:
        """The spans that are written in a whole slot."""
        return [span for span in self.whole.layers[0].pins[slot.rows[0]].tolist() if any(span)]

    def _slab(self, slot: Slot) -> Slab:
        return self.whole if slot.whole else self.slabs[1]

    def _write_pins(self) -> None:
        for row, spans in self.pins.items():
            if spans:
                self.whole.layers[0].pins[row, : len(spans)] = self.upload(spans)

    def upload(self, values: list) -> torch.Tensor:
        """Values as an int32 tensor on the slab's device, without waiting for it."""
        values = torch.tensor(values, dtype=torch.int32, device="cpu", pin_memory=not ON_CPU)
        return values.to(self.whole.rows.device, non_blocking=True)

    @classmethod
    def from_caches(cls, plan: MemoryPlan, caches: list[torch.Tensor], ropes: list[Rope | None]) -> "SlotPool":
        """View the layers' pages [blocks, 1, 1, page] uint8 of one allocation as slabs.

        Raises RuntimeError when vLLM did not lay the pages of a block side by side.
        """
        layers, first = plan.layout.shape.layers, min(caches, key=lambda cache: cache.storage_offset())
        begin = first.storage_offset()
        offsets = sorted(cache.storage_offset() - begin for cache in caches)
        expected = [i * plan.layout.page_bytes // plan.parts for i in range(layers)]
        if offsets != expected or len({cache.untyped_storage().data_ptr() for cache in caches}) > 1:
            raise RuntimeError(
                f"vLLM laid out the KV cache pages at {offsets[:4]}... of one block instead of {expected[:4]}...; "
                "deltamem needs the layout BLHNC (is VLLM_KV_CACHE_LAYOUT set?)."
            )
        if first.stride(0) != plan.block_bytes:
            raise RuntimeError(
                f"vLLM made blocks of {first.stride(0):,} bytes for a model that takes {plan.block_bytes:,} by its "
                "config: deltamem does not know all of its layers."
            )
        begin, blocks = begin + plan.block_bytes, first.shape[0] - 1  # without vLLM's null block
        rows = first.as_strided((blocks // plan.parts, plan.worker_bytes), (plan.worker_bytes, 1), begin)
        slabs = [Slab.of(rows, plan.layout, [plan.pairs(i) for i in range(layers)])]
        if plan.part:
            rows = first.as_strided((blocks, plan.block_bytes), (plan.block_bytes, 1), begin)
            slabs.append(Slab.of(rows, plan.part, [None] * layers))
        if ON_CPU:
            logger.info("deltamem compiles its CPU kernels, which takes a minute or two the first time.")
            for slab in slabs:
                for slots, rope in zip(slab.layers, ropes, strict=True):
                    kernels.compile_walk(slots, rope)
        policies = [plan.policy(i, first.device) for i in range(layers)]
        places = torch.arange(-1, blocks, dtype=torch.int32, device=first.device)
        return cls(slabs, policies, ropes, plan.parts, places)


def reserve(plan: MemoryPlan, attending: int, merging: int, device: torch.device) -> None:
    """Have vLLM's memory profiling count the scratch of kernels whose calls have up to so many rows."""
    if not ON_CPU:
        layers = []
        for layout in filter(None, (plan.layout, plan.part)):
            shapes = torch.empty(1, layout.slot_bytes, dtype=torch.uint8, device="meta")
            layers += [layout.views(shapes, i) for i in range(layout.shape.layers)]
        kernels.reserve(layers, attending, merging, device)
