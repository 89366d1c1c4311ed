"""The plan of a model's memory: its layout and policies, from vLLM's config alone, no weights needed."""

from dataclasses import dataclass

import torch
from vllm.logger import init_logger

from vllm_deltamem import profile as profiles
from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.kernels.pairs import Pairs
from vllm_deltamem.kernels.slot import Policy
from vllm_deltamem.layers import count_recurrent, find_attending, find_heads, find_windows
from vllm_deltamem.memory import ALIGNMENT, STATE_ALIGNMENT, Layout, Shape, align, plan_part, worker_heads
from vllm_deltamem.rope import trained_context

logger = init_logger(__name__)


@dataclass(frozen=True)
class MemoryPlan:
    """What one tensor-parallel worker needs to know about its slots."""

    layout: Layout  # of this worker
    whole: Layout  # of all kv heads together
    profile: profiles.Profile | None
    merge: bool
    heads: slice  # kv heads of this worker
    workers: int
    part: Layout | None = None  # of this worker: of a part of a slot, of which a short sequence holds some
    parts: int = 1  # of a slot, each a block of vLLM's

    @property
    def part_tokens(self) -> int:
        """Tokens of the longest sequence that holds parts of slots; 0 where all hold whole ones."""
        return self.part.ring - 1 if self.part else 0

    @property
    def block_bytes(self) -> int:
        """What a block of vLLM's takes on one worker."""
        return self.worker_bytes // self.parts

    @property
    def worker_bytes(self) -> int:
        """What a sequence takes on one worker: its memory, and behind it the states of recurrent layers."""
        return self.layout.slot_bytes + self.layout.shape.state_bytes

    @property
    def bytes_per_sequence(self) -> int:
        """The same on all workers."""
        return self.worker_bytes * self.workers

    @property
    def grain(self) -> int:
        """Tokens at whose multiples a memory can be taken back no further: segments; states, not even by one."""
        return 1 if self.layout.shape.state_bytes else self.layout.segment

    def policy(self, layer: int, device) -> Policy:
        """Importance and gate of one layer; of sliding layers, where nothing is merged, any."""
        if self.profile is None or self.layout.shape.sliding(layer):
            policy = profiles.training_free(self.layout.shape.heads(layer)[0], device)
        else:
            policy = self.profile.policy(layer, self.heads, device)
        if not self.merge:
            closed = torch.tensor(profiles.CLOSED_GATE, device=device).repeat(len(policy.gate), 1)
            policy = policy._replace(gate=closed)
        return policy

    def pairs(self, layer: int) -> Pairs | None:
        """Of one layer's keys, if there is a profile that has them; sliding layers code none."""
        known = self.profile is not None and not self.layout.shape.sliding(layer)
        return self.profile.pairs_of(layer, self.heads) if known else None


def plan_memory(vllm_config, settings: DeltaMemConfig | None = None, rank: int = 0) -> MemoryPlan:
    """The plan for worker `rank`. Raises ValueError as plan_layout, find_windows, find_heads and profile.choose do."""
    settings = settings or DeltaMemConfig.from_vllm(vllm_config)
    model, workers = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    hf = model.hf_text_config
    windows = find_windows(hf, model.max_model_len)
    (kv_heads, head_size), sliding_heads = find_heads(model.model_arch_config, find_attending(hf), windows)
    shape = Shape(
        layers=len(windows),
        kv_heads=kv_heads,
        head_size=head_size,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        windows=windows,
        sliding_heads=sliding_heads,
        state_bytes=_state_bytes(vllm_config) * workers,
    )
    profile = profiles.choose(settings.profile, model.hf_config)
    if profile is None and settings.profile is None:
        logger.warning_once(
            "deltamem has no profile for this model: every head gets the same memory and training-free scores. "
            "`deltamem calibrate MODEL -o PROFILE` makes one; heads then get what they need."
        )
    whole = profiles.divide(shape, settings, profile)
    layouts = [whole.of_worker(i, workers) for i in range(workers)]
    page = max(layout.page_bytes for layout in layouts)
    part = plan_part(whole)
    parts = page // max(part.of_worker(i, workers).page_bytes for i in range(workers))
    held = min(parts, (trained_context(hf) or shape.max_model_len) // part.cells)  # of a sequence
    if parts < 2 or not held or shape.state_bytes:  # states can't be divided
        part, parts = None, 1
    least = align(-(-page // parts), STATE_ALIGNMENT if shape.state_bytes else ALIGNMENT)
    return MemoryPlan(
        layout=layouts[rank].with_page(least * parts),
        whole=whole,
        profile=profile,
        merge=settings.merge,
        heads=worker_heads(shape.kv_heads, rank, workers),
        workers=workers,
        part=part and part.of_worker(rank, workers).with_parts(held).with_page(least),
        parts=parts,
    )


def _state_bytes(vllm_config) -> int:
    """What the recurrent layers of a hybrid model keep of a sequence on one worker."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.kv_cache_interface import MambaSpec

    from vllm_deltamem.spec import state_page

    model = vllm_config.model_config
    layers = count_recurrent(model.hf_text_config)
    if not layers:
        return 0
    made, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    if not hasattr(made, "get_mamba_state_shape_from_config"):
        raise ValueError(f"--attention-backend deltamem does not support recurrent layers in vLLM's {made.__name__}.")
    shapes = made.get_mamba_state_shape_from_config(vllm_config)
    dtypes = made.get_mamba_state_dtype_from_config(vllm_config)
    return layers * state_page(MambaSpec(block_size=1, shapes=tuple(shapes), dtypes=tuple(dtypes)))
