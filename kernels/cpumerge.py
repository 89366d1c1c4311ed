"""Merging on the CPU, all heads at once: see reference.merge. Its cost is the number of PyTorch calls."""

import torch

from .readout import MASKED, Readout
from .reference import freshness, gate, importance, is_pinned
from .slot import EMPTY, LayerSlots, Policy, candidates, key_position, pack_rank, rotate


def merge_slot(slots: LayerSlots, slot: int, gone: int, k, v, policy: Policy, readout: Readout) -> None:
    """Move the tokens k, v [G, C, D] at positions up to `gone` from the ring of one slot into its memory.

    readout: of that slot, prepared for merging.
    """
    size, first = k.shape[2], gone - k.shape[1]
    own = k.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # without RoPE it is written below
    plain = rotate(own, slice(first, gone), readout.rope, inverse=True)
    mean = slots.key_sum[slot].add_(plain.sum(1)) / gone
    position = torch.arange(first, gone)
    score = importance(plain, v.float(), mean, policy.importance) + freshness(position, readout.rope, policy)
    if first < slots.sinks or slots.pins[slot].any():
        score = score.masked_fill(is_pinned(slots, slot, position), torch.inf)
    rank = pack_rank(score, position)
    # Every newcomer's row below ends as what it is, or what it drove out: the losers, EMPTY where nobody lost.
    k, v, plain, mass = k.reshape(-1, size).clone(), v.reshape(-1, size).clone(), plain.view(-1, size), None
    _keep_exact(k, v, plain, rank, readout)
    v, mass = _keep_coarse(k, v, plain, rank, readout)
    if (rank != EMPTY).any():
        _merge_rest(v, plain, rank, mass, mean, policy.gate, readout, _columns(readout, gone))


def _duels(order, rank):
    """See reference._duels, over all heads: (head, column, newcomer) of the winners, [W] each.

    order [G, E], see Readout.prepare_merge; rank [G, C].
    """
    pairs = min(order.shape[1], rank.shape[1])
    worst, column = order.topk(pairs, largest=False, sorted=True)
    best, newcomer = rank.sort(descending=True, stable=True)
    head, pair = (best[:, :pairs] > worst.clamp_(min=EMPTY)).nonzero(as_tuple=True)
    among = newcomer.view(-1).index_select(0, head * newcomer.shape[1] + pair)
    return head, column.view(-1).index_select(0, head * pairs + pair), among


def _keep_exact(k, v, plain, rank, readout):
    if not readout.exact_order.shape[1]:
        return
    head, column, newcomer = _duels(readout.exact_order, rank)
    if not len(head):
        return
    loser, fields = head * rank.shape[1] + newcomer, (k, v, plain, rank.view(-1))
    given_up = readout.replace_exact(head, column, *(field.index_select(0, loser) for field in fields))
    for field, old in zip(fields, given_up, strict=True):
        field.index_copy_(0, loser, old)


def _keep_coarse(k, v, plain, rank, readout):
    """Returns v fp32 and mass of the losers; changes plain and rank to theirs."""
    v, mass = v.float(), torch.ones(rank.numel())
    head, column, newcomer = _duels(readout.coarse_order, rank)
    if not len(head):
        return v, mass
    loser, place = head * rank.shape[1] + newcomer, head * readout.width + column
    new_k, new_v, new_rank = (field.index_select(0, loser) for field in (k, v, rank.view(-1)))
    mine = v, mass, plain, rank.view(-1)
    theirs = readout.v.flatten(0, 1), readout.mass.view(-1), readout.plain.flatten(0, 1), readout.rank.view(-1)
    for field, source in zip(mine, theirs, strict=True):
        field.index_copy_(0, loser, source.index_select(0, place).to(field.dtype))
    readout.store(place, new_k.float(), new_v, torch.ones(len(place)), new_rank)
    return v, mass


def _columns(readout, gone) -> list[list[slice]]:
    """Columns of each head's coarse entries among which losers look for the nearest: none before a head has losers."""
    columns, segment = [], readout.slots.segment
    for exact, coarse in zip(readout.exact_count.tolist(), readout.coarse_count.tolist(), strict=True):
        full = gone > exact + coarse  # then every entry is taken, and before that every token has one
        among = candidates(coarse, gone, segment) if full else []
        columns.append([slice(exact + r.start, exact + r.stop) for r in among if r])
    return columns


def _merge_rest(v, plain, rank, mass, mean, gate_weights, readout, columns):
    """Every loser into the coarse entry nearest to it, as far as the gate lets it.

    columns: see _columns.
    """
    (kv_heads, count), width = rank.shape, readout.width
    centred = torch.nn.functional.normalize(plain.view(kv_heads, count, -1) - mean[:, None], dim=-1)
    cosines = [_cosines(centred[g], readout.plain[g], mine, mean[g]) for g, mine in enumerate(columns)]
    nowhere = torch.full((count,), MASKED)
    best = torch.stack([nowhere if cosine is None else cosine.amax(-1) for cosine in cosines])
    # Finding out which entry it is costs more than all the products: only for losers that some mass would let in.
    heaviest = torch.where(gate_weights[:, 2] > 0, readout.mass.amax(-1).clamp(min=1.0), 1.0)
    could = gate(best, heaviest[:, None].expand_as(best), gate_weights) > 0
    loser = (could & (rank != EMPTY) & (best > MASKED / 2)).view(-1).nonzero().squeeze(1)
    head = loser // count
    rows = (loser - head * count).split(head.bincount(minlength=kv_heads).tolist())
    searched = zip(columns, cosines, rows, strict=True)
    column = [_column(mine, cosine.index_select(0, row).argmax(-1)) for mine, cosine, row in searched if len(row)]
    if not column:
        return
    place = torch.cat(column) + head * width
    entry_mass = readout.mass.view(-1).index_select(0, place)
    opened = gate(best.view(-1)[loser][:, None], entry_mass[:, None], gate_weights.index_select(0, head))
    weight = mass.index_select(0, loser) * opened.squeeze(1)
    let_in = weight > 0
    loser, weight = loser[let_in], weight[let_in]
    target, group = place[let_in].unique(return_inverse=True)
    plain, v = plain.index_select(0, loser), v.index_select(0, loser)
    total = readout.mass.view(-1).index_select(0, target).index_add_(0, group, weight)
    entry_rank = readout.rank.view(-1).index_select(0, target)
    turned = rotate(plain, key_position(entry_rank, readout.rope).index_select(0, group), readout.rope)
    merged = []
    for field, new in ((readout.k, turned), (readout.v, v)):
        old = field.flatten(0, 1).index_select(0, target).float()
        delta = new.sub_(old.index_select(0, group)).mul_(weight[:, None])
        merged.append(old + torch.zeros_like(old).index_add_(0, group, delta).div_(total[:, None]))
    readout.store(target, *merged, total, entry_rank)


def _cosines(centred, entries, columns, mean):
    """Cosines [C, K] of losers' centred unit keys [C, D] to K columns of entries [E, D]; None without columns."""
    parts = []
    for mine in columns:
        unit = entries[mine] - mean
        unit.mul_(unit.square().sum(-1, keepdim=True).clamp_(min=1e-24).rsqrt_())
        parts.append(centred @ unit.T)
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0] if parts else None


def _column(columns, place):
    """The columns that stand at places [W] of the slices together."""
    first = columns[0].stop - columns[0].start
    column = columns[0].start + place
    return column if len(columns) == 1 else torch.where(place < first, column, columns[1].start + place - first)
