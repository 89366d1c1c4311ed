"""The slot towards vLLM's block manager: the same blocks of a sequence for its whole life."""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    CircularBufferSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_deltamem.memory import STATE_ALIGNMENT, align
from vllm_deltamem.plan import MemoryPlan
from vllm_deltamem.vacancies import SlotManager


@dataclass(frozen=True, kw_only=True)
class DeltaMemSpec(CircularBufferSpec):
    """A page of opaque bytes. Returned at finish, abort and preemption."""

    parts: int = 1  # of a slot, each a block: a sequence holds all of them, or any as it grows if it is short
    part_tokens: int = 0  # that a short one has at most
    cells: int = 0  # tokens of a part

    def max_memory_usage_bytes(self, vllm_config) -> int:
        return self.parts * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config, max_len: int) -> int:
        return self.parts + (self.parts > 1)  # before a whole slot comes vLLM's null block

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(isinstance(spec, (DeltaMemSpec, StateSpec)) for spec in kv_cache_specs.values())


@dataclass(frozen=True)
class StateSpec(MambaSpec):
    """The state of a recurrent layer, in the block of its sequence's slot."""

    parts: ClassVar[int] = 1
    part_tokens: ClassVar[int] = 0
    cells: ClassVar[int] = 0


def make_spec(spec: AttentionSpec, plan: MemoryPlan) -> DeltaMemSpec:
    """The spec of a layer, in place of the paged spec that vLLM made.

    All blocks of a slot cover max_model_len tokens, so that vLLM's slot mapping stays inside its table.
    """
    _register()
    return DeltaMemSpec(
        block_size=-(-max(plan.layout.shape.max_model_len, spec.block_size) // plan.parts),
        parts=plan.parts,
        part_tokens=plan.part_tokens,
        cells=plan.part.cells if plan.part else 0,
        num_kv_heads=1,  # whatever the layer has: its page has no heads
        head_size=1,
        dtype=torch.uint8,
        num_head_slots=1,
        state_content_bytes=plan.layout.page_bytes // plan.parts,
        tokens_per_state=-1,
        dcp_sharded=False,
    )


def state_page(spec: MambaSpec) -> int:
    """Bytes that a recurrent layer's state takes of a block."""
    return align(spec.state_content_size_bytes, STATE_ALIGNMENT)


def place_states(specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """The specs of all layers of a hybrid model, states in the blocks of the slots, behind them."""
    slots = {name: spec for name, spec in specs.items() if isinstance(spec, DeltaMemSpec)}
    states = {name: spec for name, spec in specs.items() if isinstance(spec, MambaSpec)}
    if not slots:
        return specs
    block_size = next(iter(slots.values())).block_size
    for name, spec in states.items():
        told = {field.name: getattr(spec, field.name) for field in fields(spec)}
        placed = {"block_size": block_size, "page_size_padded": state_page(spec)}
        states[name] = StateSpec(**(told | placed))
    return slots | specs | states


def start_states(vllm_config) -> None:
    """Let vLLM choose the kernels that update states, which it does for those that have blocks of their own only."""
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.ops.ssu_dispatch import initialize_mamba_ssu_backend

    layers = vllm_config.compilation_config.static_forward_context
    states = {name: layer for name, layer in layers.items() if isinstance(layer, MambaBase)}
    groups = [KVCacheGroupSpec([name], layer.get_kv_cache_spec(vllm_config)) for name, layer in states.items()]
    initialize_mamba_ssu_backend(vllm_config.mamba_config, KVCacheConfig(0, [], groups))


def _register() -> None:
    # vLLM registers its own specs only into an empty registry: have it do so before ours goes in.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(DeltaMemSpec, SlotManager, DeltaMemSpec)
    KVCacheSpecRegistry.register(StateSpec, SlotManager, StateSpec)


_register()
