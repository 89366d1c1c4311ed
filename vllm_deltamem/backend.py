"""The attention backend: plan a step, then per layer write the new tokens, attend, merge.

A batch runs as a few steps, in each of which a sequence has at most one piece: tokens of one segment. Decoding
is one step, which may be a CUDA graph and merges after the forward pass (connectorworker.py); a prompt chunk takes as
many as the segments it touches, since a segment must see the memory as it was at its boundary. A CPU walks through
these by itself (kernels/chains.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from vllm.config import get_current_vllm_config, set_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_deltamem.heap import keep_freed
from vllm_deltamem.layers import check_windows
from vllm_deltamem.patches import cpu_seeds
from vllm_deltamem.plan import MemoryPlan, plan_memory
from vllm_deltamem.pool import ON_CPU, Due, Rows, SlotPool, kernels, reserve
from vllm_deltamem.rope import find_ropes
from vllm_deltamem.spec import make_spec, start_states

TOGETHER = 32  # sequences of a call of merge()
Table = tuple[list[int], list[int], list[int]]  # Rows on the host, with sequences of the batch in place of slots
NOWHERE = -1  # the row of a sequence in a slab that has no slot of it


class DeltaMemBackend(AttentionBackend):
    """What vLLM asks of a backend: classes, dtypes and the shape of its cache."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update: bool = True
    serving: ClassVar["MemoryPlan | None"] = None  # of the model that this process loaded last

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @staticmethod
    def get_name() -> str:
        return "DELTAMEM"

    @staticmethod
    def get_impl_cls() -> type["DeltaMemImpl"]:
        return DeltaMemImpl

    @staticmethod
    def get_builder_cls() -> type["DeltaMemMetadataBuilder"]:
        return DeltaMemMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC,)  # block outermost: a slot is one slab

    @classmethod
    def customize_spec(cls, spec):
        if cls.serving is None:
            return spec
        return make_spec(spec, cls.serving)


@dataclass
class Step:
    """One piece of each of N sequences."""

    rows: list[Rows]  # of every slab: the same but for the slots, each of which is in one
    longest: int  # tokens of the longest piece
    tokens: int  # of all pieces
    reach: int | None  # tokens of the longest sequence, where the host may count on it
    due: list[Due]  # merged in every layer after it attended


@dataclass
class DeltaMemMetadata:
    """What a step has attention do, in this order."""

    steps: list[Step]
    num_tokens: int
    pool: SlotPool
    single: bool = False  # whether the first step is that of sequences with a single token, before pieces of the others

    @cached_property
    def walks(self) -> "list[tuple[int, list[kernels.Pieces], bool]]":
        """On a CPU: steps without copies of slots between them as one, by slab; the last piece, whether any merges."""
        copied, walks, steps = {branch.piece for branch in self.pool.branches}, [], []
        for piece, step in enumerate(self.steps, -self.single):
            steps.append(step)
            if piece in copied or step is self.steps[-1]:
                slabs = [kernels.Pieces.of(rows) for rows in zip(*(s.rows for s in steps), strict=True)]
                walks.append((piece, slabs, any(s.due for s in steps)))
                steps = []
        return walks


class DeltaMemMetadataBuilder(AttentionMetadataBuilder[DeltaMemMetadata]):
    """Cuts the prompts of a step into pieces that end where segments do."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.plan = DeltaMemBackend.serving
        shape = self.plan.layout.shape
        layers = self._layers()
        check_windows(shape.windows, [layer.sliding_window for layer in layers.values()], shape.max_model_len)
        for position, (name, layer) in enumerate(layers.items()):
            if (layer.impl.num_kv_heads, layer.impl.head_size) != shape.heads(position):
                raise ValueError(f"--attention-backend deltamem does not know the heads of the layer {name}.")
            layer.impl.position = position
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(vllm_config.scheduler_config.max_num_seqs, captured)
        # Of every slab the slots of a step's sequences: captured CUDA graphs read them here.
        shapes = [(), (self.plan.part.parts,)] if self.plan.part else [()]
        self._held = [torch.empty(rows, *shape, dtype=torch.int32, device=device) for shape in shapes]
        # Tokens between two at which a sequence comes to bytes that are to be cleared; there is one if it has a slot.
        self._cleared = self.plan.part.cells if self.plan.part else shape.max_model_len + 1
        if shape.state_bytes:
            start_states(vllm_config)
        SlotPool.held_by(self)
        if ON_CPU:
            cpu_seeds.apply()
            keep_freed()

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> DeltaMemMetadata:
        batch, pool = common_attn_metadata, self.pool
        slots = self._slots(batch)
        starts = batch.query_start_loc_cpu.numpy()
        ends = batch.seq_lens_cpu_upper_bound.numpy()  # exact: whoever drafts plans one step at a time; 0 for padding
        counts = starts[1:] - starts[:-1]
        if (-((counts - ends) // self._cleared) * self._cleared < ends).any():
            pool.reset([Rows(held, batch.query_start_loc, batch.seq_lens) for held in slots])
        pool.due = []
        if batch.max_query_len > 1:
            steps = self._cut(starts.tolist(), ends.tolist(), slots)
            return DeltaMemMetadata(steps, batch.num_actual_tokens, pool, bool((counts == 1).any()))
        due = self._due(list(enumerate(ends.tolist())))
        pool.due = _with_longest(due, iter(self._place(due, slots)))
        return self._decoding(batch, slots)

    def build_for_cudagraph_capture(self, common_attn_metadata) -> DeltaMemMetadata:
        """Rows of a capture are no sequences: nothing is cleared before it or merged after it."""
        return self._decoding(common_attn_metadata, self._slots(common_attn_metadata))

    @cached_property
    def pool(self) -> SlotPool:
        """The slots, once vLLM has allocated its cache. Gone with this builder: vLLM makes one for every cache."""
        shape = self.plan.layout.shape
        model = self.vllm_config.model_config
        with set_current_vllm_config(self.vllm_config):  # vLLM makes the rope anew if the model has another one
            ropes = find_ropes(model, shape, self.device)
        pool = SlotPool.from_caches(self.plan, [layer.kv_cache for layer in self._layers().values()], ropes)
        if not ON_CPU:
            impls = [layer.impl for layer in self._layers().values()]
            queries = [(impl.num_heads, impl.sink_logits) for impl in impls]
            pool.warm_up(queries, impls[0].most_rows, shape.max_model_len)
        return pool

    def _slots(self, batch: CommonAttentionMetadata) -> list[torch.Tensor]:
        """The slots of a step's sequences, of every slab, see Rows; those of padding hold vLLM's null block."""
        table, places = batch.block_table_tensor, self.pool.places
        whole, *parts = held = [held[: len(table)] for held in self._held]
        first = table[:, len(parts)]  # of a whole slot, which has the null block before it where there are parts
        torch.div(places[first], self.plan.parts, rounding_mode="floor", out=whole)
        for own in parts:
            whole.masked_fill_(table[:, 0] > 0, NOWHERE)
            torch.index_select(places, 0, table[:, : own.shape[1]].flatten(), out=own.view(-1))
        return held

    def _decoding(self, batch: CommonAttentionMetadata, slots: list[torch.Tensor]) -> DeltaMemMetadata:
        """One token of every sequence, perhaps replayed from a CUDA graph: it merges after the forward pass."""
        rows = [Rows(held, batch.query_start_loc, batch.seq_lens) for held in slots]
        return DeltaMemMetadata([Step(rows, 1, batch.num_reqs, None, [])], batch.num_actual_tokens, self.pool)

    def _cut(self, starts: list[int], ends: list[int], slots: list[torch.Tensor]) -> list[Step]:
        """Cut every sequence's new tokens at segment boundaries; the k-th piece of each goes into step k.

        Sequences with a single new token have a step of their own, which decodes. Rows between the pieces of a
        step become padding, so that cu_seqlens covers the batch as it lies.
        """
        segment = self.plan.layout.segment
        single: list[tuple[int, int, int, int]] = []
        pieces: list[list[tuple[int, int, int, int]]] = []
        for i, end in enumerate(ends):
            done, row = end - (starts[i + 1] - starts[i]), starts[i]
            if end - done == 1:
                single.append((i, row, 1, end))
                continue
            step = 0
            while done < end:
                count = min(segment - done % segment, end - done)
                if step == len(pieces):
                    pieces.append([])
                pieces[step].append((i, row, count, done + count))
                done, row, step = done + count, row + count, step + 1
        pieces = [single, *pieces] if single else pieces
        due = [self._due([(i, end) for i, _, _, end in rows]) for rows in pieces]
        tables = [[_spread(rows), *calls] for rows, calls in zip(pieces, due, strict=True)]
        placed = iter(self._place([table for step in tables for table in step], slots))
        steps = []
        for rows, calls in zip(pieces, due, strict=True):
            _, _, counts, reached = zip(*rows, strict=True)
            placed_rows, sizes = next(placed), (max(counts), sum(counts), max(reached))
            steps.append(Step(placed_rows, *sizes, _with_longest(calls, placed)))
        return steps

    def _due(self, rows: list[tuple[int, int]]) -> list[Table]:
        """Of (sequence, its length after a step), those that complete a segment which makes another leave the window.

        A few per call of merge(): kernels are compiled for few rows and for many.
        """
        layout = self.plan.layout
        due = [(i, end) for i, end in rows if end % layout.segment == 0 and end > layout.window]
        calls = [due[first : first + TOGETHER] for first in range(0, len(due), TOGETHER)]
        return [([i for i, _ in call], [*range(len(call) + 1)], [end for _, end in call]) for call in calls]

    def _place(self, tables: list[Table], slots: list[torch.Tensor]) -> list[list[Rows]]:
        """Tables on the device, with the slots of every slab in place of sequences; one copy for all."""
        if not tables:
            return []
        columns = [[x for part in column for x in part] for column in zip(*tables, strict=True)]
        owner, cu_seqlens, seq_lens = self.pool.upload(sum(columns, [])).split([len(column) for column in columns])
        counts = [len(owners) for owners, _, _ in tables]
        ends = cu_seqlens.split([n + 1 for n in counts]), seq_lens.split(counts)
        held = [_of_owners(owner, rows).split(counts) for rows in slots]
        slabs = [[Rows(*rows) for rows in zip(own, *ends, strict=True)] for own in held]
        return [list(rows) for rows in zip(*slabs, strict=True)]

    def _layers(self) -> dict[str, torch.nn.Module]:
        """vLLM's attention layers by name, as they follow one another in the model."""
        layers = self.vllm_config.compilation_config.static_forward_context
        return {name: layer for name, layer in layers.items() if name in self.layer_names}


def _of_owners(owner: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The slots of sequences, of which the owners are indices; a negative one is padding's."""
    nobody = (owner < 0).view(-1, *[1] * (slots.dim() - 1))
    return slots[owner.clamp(min=0)].masked_fill_(nobody, NOWHERE)


def _with_longest(tables: list[Table], placed: Iterator[list[Rows]]) -> list[Due]:
    """The next rows of `placed`, which are those tables."""
    return [Due(next(placed)[0], max(seq_lens)) for _, _, seq_lens in tables]


def _spread(rows: list[tuple[int, int, int, int]]) -> Table:
    """Pieces (sequence, first row, rows, length after it) with padding where rows of the batch lie between them."""
    owner, cu, lens = [], [rows[0][1]], []
    for i, row, count, seq_len in rows:
        if row > cu[-1]:
            owner.append(-1)
            lens.append(0)
            cu.append(row)
        owner.append(i)
        lens.append(seq_len)
        cu.append(row + count)
    return owner, cu, lens


class DeltaMemImpl(AttentionImpl[DeltaMemMetadata]):
    """One layer: writes tokens to its slots, attends and merges."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,  # the metadata builder compares it with the plan
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unsupported,
    ):
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.sink_logits = sinks
        refusals = {
            "ALiBi": alibi_slopes is not None,
            "soft-capped attention logits": bool(logits_soft_cap),
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "layers that share a KV cache": kv_sharing_target_layer_name is not None,
            ", ".join(unsupported): any(v is not None for v in unsupported.values()),
        }
        for feature, present in refusals.items():
            if present:
                raise ValueError(f"--attention-backend deltamem does not support {feature}.")
        vllm_config = get_current_vllm_config()
        rank = vllm_config.parallel_config.rank % vllm_config.parallel_config.tensor_parallel_size
        DeltaMemBackend.serving = self.plan = plan_memory(vllm_config, rank=rank)
        self.most_rows = 2 * vllm_config.scheduler_config.max_num_seqs  # of a step: sequences, and padding before each
        self.position: int | None = None  # of this layer among those that attend; the metadata builder knows

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: DeltaMemMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [T, H, D], key and value [T, G, D]; writes output [T, H, D] (or flat) and the slots."""
        if attn_metadata is None:  # vLLM's memory profiling
            if self.plan is DeltaMemBackend.serving:  # of the layer that was made last
                reserve(self.plan, self.most_rows, TOGETHER, output.device)
            return output.zero_()
        n, pool = attn_metadata.num_tokens, attn_metadata.pool
        rope = pool.ropes[self.position]
        query, key, value, out = query[:n], key[:n], value[:n], output.view(query.shape)[:n]
        if ON_CPU:
            k, v, q = (x.contiguous() for x in (key, value, query))
            given = dict(k=k, v=v, q=q, out=out, scale=self.scale, sink_logits=self.sink_logits)
            for piece, pieces, merges in attn_metadata.walks:
                for slab, own in zip(pool.slabs, pieces, strict=True):
                    if not own.slot:
                        continue
                    policy = pool.policies[self.position] if merges and slab is pool.whole else None
                    kernels.walk(slab.layers[self.position], own, rope, policy, slab.readouts[self.position], **given)
                pool.copy_branches(self.position, piece)
            return output
        for piece, step in enumerate(attn_metadata.steps, -attn_metadata.single):
            known = {"max_query_len": step.longest, "live_tokens": step.tokens}
            beside = {"sink_logits": self.sink_logits, "max_seq_len": step.reach}
            for slab, rows in pool.busy(step.rows):
                slots = slab.layers[self.position]
                kernels.write(key, value, slots, *rows, **known)
                kernels.attend(query, slots, *rows, self.scale, out, rope, **known, **beside)
            pool.merge(self.position, step.due)
            pool.copy_branches(self.position, piece)
        return output
