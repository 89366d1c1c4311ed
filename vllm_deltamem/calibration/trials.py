"""Trials on the keys of a prompt: merging tokens, and coding them.

Trial merges: how much of what a query loses with a dropped token comes back when the token is merged.

Dropping token j takes t = w_j (v_j - o) out of a head's output o (w_j its attention weight). Merging it into
entry e instead adds d = 2 w_m (v_m - o) - w_e (v_e - o), where m is the mean of both. A gate of g leaves an
error of about |t - g d|^2 = t.t - 2 g t.d + g^2 d.d, so three sums per pair are all that a gate is fitted to.
"""

from typing import NamedTuple

import torch

from vllm_deltamem.calibration.pairs import fit, squares
from vllm_deltamem.kernels.pairs import pair_code
from vllm_deltamem.kernels.slot import Rope, decode, encode, rotate

LOSERS = 64  # dropped tokens tried per head and prompt
QUERIES = 32  # later tokens whose queries are asked, per query head
CODED = (3, 5, 8)  # bits that keys are coded in
SINKS = 4  # first tokens of a prompt, which no code holds
KEPT = 0.3  # of the tokens, those of highest KeyDiff score, are entries


class Trials(NamedTuple):
    """Sums over the queries, [..., LOSERS] fp32; divided by the head's sum of t.t."""

    cosine: torch.Tensor  # of the centred keys of token and entry
    given_back: torch.Tensor  # t.d
    size: torch.Tensor  # d.d


def trial_merges(q, k, v, plain, score, rope: Rope | None, scale: float, generator: torch.Generator) -> Trials:
    """Try merges inside the first half of a prompt with queries of its second half. Trials [G, LOSERS].

    q [H, T, D], k and v [G, T, D] rotated, plain [G, T, D] the keys before RoPE, score [G, T]; all fp32.
    """
    half, group, asked = k.shape[1] // 2, len(q) // len(k), _asked(k, generator)
    visible = torch.arange(k.shape[1], device=k.device) <= asked[:, None]
    rows = []
    for g in range(len(k)):
        order = score[g, :half].argsort(descending=True)
        entries, rest = order[: int(KEPT * half)], order[int(KEPT * half) :]
        losers = rest[torch.randperm(len(rest), generator=generator)[:LOSERS].to(k.device)]
        query = q[g * group : (g + 1) * group, asked]  # [R, Q, D]
        logits = (query @ k[g].T * scale).masked_fill(~visible, -torch.inf)
        total, out = (
            logits.logsumexp(-1, keepdim=True),
            (logits.softmax(-1) @ v[g])[:, :, None],
        )  # [R, Q, 1, D]

        mean = plain[g, :half].mean(0)
        centred = torch.nn.functional.normalize(plain[g, :half] - mean, dim=-1)
        cosine, nearest = (centred[losers] @ centred[entries].T).max(-1)
        entry = entries[nearest]
        turned = rotate(plain[g, losers], entry, rope)

        def pull(key, value, query=query, total=total, out=out):
            weight = torch.exp(query @ key.T * scale - total)
            return weight[..., None] * (value - out)  # [R, Q, LOSERS, D]

        lost = pull(k[g, losers], v[g, losers])
        merged = 2 * pull((k[g, entry] + turned) / 2, (v[g, entry] + v[g, losers]) / 2)
        change = merged - pull(k[g, entry], v[g, entry])
        norm = lost.square().sum().clamp_min(1e-20)
        sums = (lost * change).sum((0, 1, 3)) / norm, change.square().sum((0, 1, 3)) / norm
        rows.append(Trials(cosine, *sums))
    return Trials(*(torch.stack(column).cpu() for column in zip(*rows, strict=True)))


def logit_errors(q, k, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Errors [G, CODED] in nats that codes of keys bring into logits: rms, weighted by the attention they get.

    What all logits of a query have in common changes nothing and does not count; sinks are never coded.
    q [H, T, D], k [G, T, D] rotated fp32. Queries of the second half of a prompt are asked about keys of the first.
    """
    half, group, asked = k.shape[1] // 2, len(q) // len(k), _asked(k, generator)
    query = q[:, asked].unflatten(0, (len(k), group)).flatten(1, 2)  # [G, R Q, D]
    weight = (query @ k[:, :half].mT * scale).softmax(-1)
    coded, errors = k[:, SINKS:half], []
    pairs = fit(squares(coded), squares(query * scale))
    for bits in CODED:
        how = pair_code(pairs, bits, len(k), k.device).of((slice(None), None))  # for all tokens of a head
        wrong = decode(*encode(coded, bits, torch.float32, how), bits, torch.float32, how) - coded
        wrong = torch.nn.functional.pad(wrong, (0, 0, SINKS, 0))
        error = query @ wrong.mT * scale
        error = error - (weight * error).sum(-1, keepdim=True)
        errors.append((weight * error.square()).sum(-1).mean(-1).sqrt())
    return torch.stack(errors, -1).cpu()


def _asked(k, generator: torch.Generator) -> torch.Tensor:
    """Positions [Q] of the queries that are asked: some of the second half of k [G, T, D]."""
    half = k.shape[1] // 2
    return half + torch.randperm(k.shape[1] - half, generator=generator)[:QUERIES].to(k.device)
