"""How much every token of a prompt matters to what the model recalls from it, in every head.

The influence of a token in a head is the derivative of the answer's margin with respect to the logarithm of
the weight that later queries give to it: p (g.v - g.o), summed over the queries that no longer have it in
their window (p attention probability, o output of the head, g gradient of the margin by o). To first order it
is what dropping the token costs. One forward and one backward pass give it for all tokens and heads at once.
"""

from typing import NamedTuple

import torch

from vllm_deltamem.calibration.frozen import FrozenModel, full_attention
from vllm_deltamem.calibration.pairs import squares
from vllm_deltamem.calibration.prompts import Prompt
from vllm_deltamem.calibration.trials import SINKS, logit_errors, trial_merges
from vllm_deltamem.kernels.slot import rotate
from vllm_deltamem.memory import NEAR

QUERY_BLOCK = 256


class Observation(NamedTuple):
    """What one prompt shows of every token; L layers with full attention, T excludes the last NEAR tokens."""

    key: torch.Tensor  # [L, G, T, D] fp16, pre-RoPE, unit norm
    value: torch.Tensor  # [L, G, T, D] fp16, unit norm
    keydiff: torch.Tensor  # [L, G, T] fp32, the training-free score
    influence: torch.Tensor  # [L, G, T] fp32, squares sum to 1 over everything; 0 if no answer was right
    exposure: torch.Tensor  # [T] fp32, share of the wanted tokens that are predicted once the token left the window
    cosine: torch.Tensor  # [L, G, LOSERS] fp32, this and the next two: see Trials
    given_back: torch.Tensor
    size: torch.Tensor
    logit_error: torch.Tensor  # [L, G, CODED] fp32, see trials.logit_errors
    key_square: torch.Tensor  # [L, G, D / 2] fp32, see pairs.squares; of keys after RoPE
    query_square: torch.Tensor  # likewise, of the group's queries times the scale of logits


class _Recording:
    """The attention of one forward and backward pass, and what it saw."""

    def __init__(self, model: FrozenModel, tokens: int, seed: int):
        self.model, self.tokens = model, tokens
        self.generator = torch.Generator().manual_seed(seed)
        self.key, self.value, self.keydiff, self.influence, self.trials, self.errors = ({} for _ in range(6))
        self.key_square, self.query_square = {}, {}

    def __call__(self, layer, q, k, v, scale, sinks=None):
        unit = torch.nn.functional.normalize
        position, rope = torch.arange(self.tokens, device=k.device), self.model.rope(layer, self.tokens)
        rotated, value = k.detach().float(), v.detach().float()
        plain = rotate(rotated, position, rope, inverse=True)
        mean = plain.cumsum(-2) / (position[:, None] + 1)
        keydiff = -(unit(plain, dim=-1) * unit(mean, dim=-1)).sum(-1)
        self.key[layer], self.value[layer] = (
            unit(plain, dim=-1).half().cpu(),
            unit(value, dim=-1).half().cpu(),
        )
        self.keydiff[layer] = keydiff.cpu()
        query = q.detach().float()
        self.trials[layer] = trial_merges(query, rotated, value, plain, keydiff, rope, scale, self.generator)
        self.errors[layer] = logit_errors(query, rotated, scale, self.generator)
        self.key_square[layer] = squares(rotated[:, SINKS:]).cpu()
        self.query_square[layer] = squares((query * scale).unflatten(0, (len(k), -1)).flatten(1, 2)).cpu()
        return _Attention.apply(q, k, v, scale, sinks, self.influence, layer)

    def observation(self, wanted: torch.Tensor) -> Observation:
        def stacked(by_layer):
            return torch.stack([by_layer[i] for i in sorted(by_layer)])

        tokens = slice(0, self.tokens - NEAR)
        influence = stacked(self.influence)[:, :, tokens].contiguous()
        influence[:, :, :SINKS] = 0  # kept whatever they score
        asking = wanted - 1 >= torch.arange(self.tokens - NEAR)[:, None] + NEAR
        return Observation(
            key=stacked(self.key)[:, :, tokens].contiguous(),
            value=stacked(self.value)[:, :, tokens].contiguous(),
            keydiff=stacked(self.keydiff)[:, :, tokens].contiguous(),
            influence=influence / influence.square().sum().sqrt().clamp_min(1e-20),
            exposure=asking.float().mean(1),
            cosine=stacked({i: t.cosine for i, t in self.trials.items()}),
            given_back=stacked({i: t.given_back for i, t in self.trials.items()}),
            size=stacked({i: t.size for i, t in self.trials.items()}),
            logit_error=stacked(self.errors),
            key_square=stacked(self.key_square),
            query_square=stacked(self.query_square),
        )


class _Attention(torch.autograd.Function):
    """Causal attention whose backward pass also sums the gradient of every key's logit bias."""

    @staticmethod
    def forward(ctx, q, k, v, scale, sinks, influence, layer):
        out = full_attention(layer, q, k, v, scale, sinks)
        ctx.save_for_backward(q, k, v, out)
        ctx.scale, ctx.sinks, ctx.influence, ctx.layer = scale, sinks, influence, layer
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out = ctx.saved_tensors
        tokens, group = q.shape[1], q.shape[0] // k.shape[0]
        dq, dk, dv = (
            torch.empty_like(q),
            torch.zeros_like(k, dtype=torch.float),
            torch.zeros_like(v, dtype=torch.float),
        )
        influence = torch.zeros(k.shape[:2], device=k.device)
        inner = (grad.float() * out.float()).sum(-1, keepdim=True)
        for g in range(k.shape[0]):
            members = slice(g * group, (g + 1) * group)
            for begin in range(0, tokens, QUERY_BLOCK):
                end = min(begin + QUERY_BLOCK, tokens)
                query, upstream = q[members, begin:end], grad[members, begin:end].to(q.dtype)
                distance = torch.arange(begin, end, device=q.device)[:, None] - torch.arange(end, device=q.device)
                weights = (query @ k[g, :end].T).float().mul_(ctx.scale)
                weights[..., begin:].masked_fill_(distance[:, begin:] < 0, -torch.inf)
                if ctx.sinks is not None:
                    sink = ctx.sinks[members].float()[:, None, None].expand(-1, end - begin, 1)
                    weights = torch.cat([weights, sink], -1)
                weights = weights.softmax(-1)[..., :end]
                by_logit = (upstream @ v[g, :end].T).float().sub_(inner[members, begin:end]).mul_(weights)
                far = max(begin - NEAR, 0)  # keys before it are out of the window of the whole block
                influence[g, :far] += by_logit[..., :far].sum((0, 1))
                influence[g, far:end] += (by_logit[..., far:].sum(0) * (distance[:, far:] >= NEAR)).sum(0)
                by_logit, weights = by_logit.to(q.dtype), weights.to(q.dtype)
                dq[members, begin:end] = by_logit @ k[g, :end] * ctx.scale
                dk[g, :end] += (by_logit.flatten(0, 1).T @ query.flatten(0, 1)).float() * ctx.scale
                dv[g, :end] += (weights.flatten(0, 1).T @ upstream.flatten(0, 1)).float()
        ctx.influence[ctx.layer] = influence.cpu()
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def observe(model: FrozenModel, prompt: Prompt, seed: int) -> Observation:
    """Influence of every token on the answers of a recall prompt, or on the predictions of plain text.

    Answer tokens that the model gets right count by their margin over the best other token, which does not
    saturate as a probability does; the tokens of plain text by their log-probability with seeded random
    signs, so that they add up like noise.
    """
    wanted = torch.cat([torch.arange(*span) for span in prompt.spans])
    recording = _Recording(model, len(prompt.ids), seed)
    logits = model.logits(prompt.ids, recording, wanted, grad=True)
    label = prompt.ids[wanted].to(logits.device)[:, None]
    right = logits.gather(1, label)
    if prompt.recall:
        margin = right - logits.scatter(1, label, -torch.inf).amax(1, keepdim=True)
        goal = margin[margin > 0].sum()
    else:
        signs = torch.randint(0, 2, right.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        goal = ((right - logits.logsumexp(1, keepdim=True)) * signs.to(right.device)).sum()
    goal.backward()
    return recording.observation(wanted)
