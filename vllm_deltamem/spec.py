"""The slot towards vLLM's block manager: one block per sequence and layer, for its whole life."""

from dataclasses import dataclass

import torch
from vllm.v1.kv_cache_interface import AttentionSpec, CircularBufferSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_deltamem.vacancies import SlotManager


@dataclass(frozen=True, kw_only=True)
class DeltaMemSpec(CircularBufferSpec):
    """A page of opaque bytes. Claimed at admission, never grown, returned at finish, abort and preemption."""


def make_spec(spec: AttentionSpec, page_bytes: int, max_model_len: int) -> DeltaMemSpec:
    """The spec of a layer with pages of that size, in place of the paged spec that vLLM made.

    The block covers max_model_len tokens, so that vLLM's slot mapping stays inside a one-block table.
    """
    _register()
    return DeltaMemSpec(
        block_size=max(max_model_len, spec.block_size),
        num_kv_heads=1,  # whatever the layer has: its page has no heads
        head_size=1,
        dtype=torch.uint8,
        num_head_slots=1,
        state_content_bytes=page_bytes,
        tokens_per_state=-1,
        dcp_sharded=False,
    )


def _register() -> None:
    # vLLM registers its own specs only into an empty registry: have it do so before ours goes in.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(DeltaMemSpec, SlotManager, DeltaMemSpec)


_register()
