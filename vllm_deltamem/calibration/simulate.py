"""The memory inside transformers: the serving path's own kernels and layout, one sequence at a time."""

from dataclasses import dataclass
from importlib import import_module

import torch

from vllm_deltamem.calibration.frozen import Attention, FrozenModel, full_attention
from vllm_deltamem.calibration.prompts import Prompt
from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.kernels.pairs import Pairs
from vllm_deltamem.kernels.slot import Policy
from vllm_deltamem.memory import Layout
from vllm_deltamem.profile import Profile, divide, training_free

SHARES = (0.15, 0.05)  # memory sizes, of full attention, to choose for and to compare at


@dataclass(frozen=True)
class Score:
    """How well a model predicted the wanted tokens of prompts: answers, or plain text as one long answer."""

    answers: int
    exact: float  # share of answers of which every token is the model's first choice
    tokens: float  # share of answer tokens that are
    loss: float  # nats per wanted token


class MemoryAttention:
    """Attention of every layer with full attention through a slot of the memory. Every call starts an empty one."""

    def __init__(self, model: FrozenModel, layout: Layout, policies: list[Policy], pairs: list[Pairs | None]):
        self.model, self.policies = model, policies
        self.slab = torch.zeros(1, layout.slot_bytes, dtype=torch.uint8, device=model.device)
        self.slots = [layout.views(self.slab, layer, of_layer) for layer, of_layer in enumerate(pairs)]
        self.on_cpu = torch.device(model.device).type == "cpu"
        self.kernels = import_module("vllm_deltamem.kernels." + ("cpu" if self.on_cpu else "cuda"))

    def __call__(self, layer, q, k, v, scale, sinks=None):
        computed, held = q.dtype, self.model.dtype
        q, k, v = (x.transpose(0, 1).to(held).contiguous() for x in (q, k, v))
        slots, policy, out = self.slots[layer], self.policies[layer], torch.empty_like(q)
        rope = self.model.rope(layer, len(q))
        self.slab.zero_()
        pieces = [(begin, min(begin + slots.segment, len(q))) for begin in range(0, len(q), slots.segment)]
        if self.on_cpu:
            steps = self.kernels.Pieces.of(self._rows(begin, end, end) for begin, end in pieces)
            self.kernels.walk(slots, steps, rope, policy, k=k, v=v, q=q, out=out, scale=scale, sink_logits=sinks)
            return out.transpose(0, 1).to(computed)
        for begin, end in pieces:
            piece, batch = slice(begin, end), self._rows(0, end - begin, end)
            self.kernels.write(k[piece], v[piece], slots, *batch)
            self.kernels.attend(q[piece], slots, *batch, scale, out[piece], sink_logits=sinks)
            self.kernels.merge(slots, *batch, rope, policy)
        return out.transpose(0, 1).to(computed)

    def _rows(self, begin: int, end: int, seq_len: int) -> list[torch.Tensor]:
        """A batch of one piece, see kernels/reference.py."""
        return [torch.tensor(x, dtype=torch.int32, device=self.slab.device) for x in ([0], [begin, end], [seq_len])]


def memory_attention(
    model: FrozenModel, profile: Profile | None, context: int, share: float, **settings
) -> MemoryAttention:
    """The memory at a share of full attention over `context` tokens; settings as in DeltaMemConfig."""
    shape, memory = model.shape(context), round(share * context)
    layout = divide(shape, DeltaMemConfig(memory=memory, **settings), profile)
    device, layers = model.device, range(shape.layers)
    policies = [profile.policy(i, device=device) if profile else training_free(shape.kv_heads, device) for i in layers]
    pairs = [profile and profile.pairs_of(i) for i in layers]
    return MemoryAttention(model, layout, policies, pairs)


def score(model: FrozenModel, prompts: list[Prompt], attention: Attention = full_attention) -> Score:
    """Teacher-forced: an answer is exact when greedy decoding would have given it token for token."""
    right, exact, loss = [], [], []
    for prompt in prompts:
        wanted = torch.cat([torch.arange(*span) for span in prompt.spans])
        logits = model.logits(prompt.ids, attention, wanted)
        label = prompt.ids[wanted].to(logits.device)
        hits = logits.argmax(-1) == label
        exact += [bool(part.all()) for part in hits.split([end - begin for begin, end in prompt.spans])]
        right.append(hits)
        loss.append(torch.nn.functional.cross_entropy(logits, label, reduction="none"))
    return Score(
        answers=len(exact),
        exact=sum(exact) / len(exact),
        tokens=torch.cat(right).float().mean().item(),
        loss=torch.cat(loss).mean().item(),
    )


def total_loss(model: FrozenModel, profile: Profile, prompts: list[Prompt]) -> float:
    """Nats per wanted token with this profile, summed over prompts and SHARES."""
    return sum(
        score(model, [prompt], memory_attention(model, profile, len(prompt.ids), share)).loss
        for prompt in prompts
        for share in SHARES
    )
