"""The attention backend: plan a step, then per layer write the new tokens, attend, merge.

A batch runs as a few steps, in each of which a sequence has at most one piece: tokens of one segment. Decoding
is one step; a prompt chunk takes as many as the segments it touches, since a segment must see the memory as it
was at its boundary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.config import get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_deltamem.plan import MemoryPlan, plan_memory
from vllm_deltamem.pool import SlotPool
from vllm_deltamem.rope import find_rope
from vllm_deltamem.spec import make_spec
from vllm_deltamem.windows import check_windows

ON_CPU = current_platform.is_cpu()
if ON_CPU:
    from vllm_deltamem.kernels import cpu as kernels
else:
    from vllm_deltamem.kernels import cuda as kernels


class DeltaMemBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update: bool = True
    serving: ClassVar["MemoryPlan | None"] = None  # of the model that this process loaded last

    @classmethod
    def supports_sliding_window(cls) -> bool:
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
        layout = cls.serving.layout
        return make_spec(spec, layout.page_bytes, layout.shape.max_model_len)


@dataclass
class Step:
    """One piece of each of N sequences; see kernels/reference.py for the tensors."""

    slot_indices: torch.Tensor  # [N] int32, -1 for rows that sit this step out
    cu_seqlens: torch.Tensor  # [N + 1] int32
    seq_lens: torch.Tensor  # [N] int32, tokens of the sequence up to the end of its piece
    longest: int  # tokens of the longest piece
    tokens: int  # of all pieces
    merges: bool  # whether a piece may complete a segment that makes another leave the window


@dataclass
class DeltaMemMetadata:
    steps: list[Step]
    num_tokens: int
    pool: SlotPool


class DeltaMemMetadataBuilder(AttentionMetadataBuilder[DeltaMemMetadata]):
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.plan = DeltaMemBackend.serving
        self.pool: SlotPool | None = None
        shape = self.plan.layout.shape
        given = {extract_layer_index(name): layer.sliding_window for name, layer in self._layers().items()}
        check_windows(shape.windows, given, shape.max_model_len)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> DeltaMemMetadata:
        if self.pool is None:
            self.pool = self._make_pool()
        batch = common_attn_metadata
        slots = batch.block_table_tensor[:, 0]
        if batch.max_query_len == 1:
            # captured in a CUDA graph, so it merges whether or not this step has anything to
            steps = [Step(slots, batch.query_start_loc, batch.seq_lens, 1, len(slots), True)]
        else:
            steps = self._cut(batch, slots)
        fresh = kernels.reset(self.pool.slab, slots, batch.query_start_loc, batch.seq_lens)
        if ON_CPU:
            self.pool.forget(fresh)
        self.pool.write_pins()
        return DeltaMemMetadata(steps, batch.num_actual_tokens, self.pool)

    def _cut(self, batch: CommonAttentionMetadata, slots: torch.Tensor) -> list[Step]:
        """Cut every sequence's new tokens at segment boundaries; the k-th piece of each goes into step k.

        Rows between the pieces of a step become padding, so that cu_seqlens covers the batch as it lies.
        """
        segment = self.plan.layout.segment
        start = batch.query_start_loc_cpu.tolist()
        ends = batch.seq_lens_cpu_upper_bound.tolist()  # exact: speculative decoding is refused
        pieces: list[list[tuple[int, int, int, int]]] = []
        for i, end in enumerate(ends):
            done, row = end - (start[i + 1] - start[i]), start[i]
            step = 0
            while done < end:
                count = min(segment - done % segment, end - done)
                if step == len(pieces):
                    pieces.append([])
                pieces[step].append((i, row, count, done + count))
                done, row, step = done + count, row + count, step + 1
        return [self._make_step(rows, slots) for rows in pieces]

    def _make_step(self, rows, slots: torch.Tensor) -> Step:
        owner, cu, lens = [], [rows[0][1]], []
        for i, row, count, seq_len in rows:
            if row > cu[-1]:
                owner.append(-1)
                lens.append(0)
                cu.append(row)
            owner.append(i)
            lens.append(seq_len)
            cu.append(row + count)
        packed = torch.tensor([owner + [0], lens + [0], cu], dtype=torch.int32)
        if self.device.type != "cpu":
            packed = packed.pin_memory().to(self.device, non_blocking=True)
        owner, lens, cu = packed
        owner, lens = owner[:-1], lens[:-1]
        held = torch.where(owner >= 0, slots[owner.clamp(min=0)], -1)
        layout, counts = self.plan.layout, [count for _, _, count, _ in rows]
        merges = any(end % layout.segment == 0 and end > layout.window for _, _, _, end in rows)
        return Step(held, cu, lens, max(counts), sum(counts), merges)

    def _layers(self) -> dict[str, torch.nn.Module]:
        """vLLM's attention layers, by name."""
        layers = self.vllm_config.compilation_config.static_forward_context
        return {name: layers[name] for name in self.layer_names}

    def _make_pool(self) -> SlotPool:
        shape = self.plan.layout.shape
        model = self.vllm_config.model_config
        with set_current_vllm_config(self.vllm_config):  # vLLM makes the rope anew if the model has another one
            rope = find_rope(model.hf_text_config, shape.head_size, model.dtype, shape.max_model_len)
        return SlotPool.from_caches(self.plan, [layer.kv_cache for layer in self._layers().values()], rope)


class DeltaMemImpl(AttentionImpl[DeltaMemMetadata]):
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
        **unsupported,
    ):
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
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
        DeltaMemBackend.serving = plan = plan_memory(vllm_config, rank=rank)
        if (self.head_size, self.num_kv_heads) != (plan.layout.shape.head_size, plan.layout.shape.kv_heads):
            raise ValueError("--attention-backend deltamem does not support attention layers of unequal shapes.")
        self.position: int | None = None  # of this layer in the model

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
            return output.zero_()
        if self.position is None:
            self.position = extract_layer_index(layer.layer_name)
        n, pool = attn_metadata.num_tokens, attn_metadata.pool
        slots, policy = pool.layers[self.position], pool.policies[self.position]
        query, key, value, out = query[:n], key[:n], value[:n], output.view(query.shape)[:n]
        scratch = {"scratch": pool.readouts[self.position]} if ON_CPU else {}
        for step in attn_metadata.steps:
            rows = step.slot_indices, step.cu_seqlens, step.seq_lens
            known = {} if ON_CPU else {"max_query_len": step.longest, "live_tokens": step.tokens}
            kernels.write(key, value, slots, *rows, **known)
            kernels.attend(query, slots, *rows, self.scale, out, pool.rope, **known, **scratch)
            if step.merges:
                kernels.merge(slots, *rows, pool.rope, policy, **scratch)
        return output
