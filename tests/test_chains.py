"""Chains of pieces: what they are divided into, and that one which fails holds up no other."""

import itertools

import numpy as np
import pytest
import torch

from tests.layers import make_layer, make_policy, make_rope, make_tokens
from vllm_deltamem.kernels import chains, cpu, grid, readout
from vllm_deltamem.kernels.chains import AFTER, BEGIN, DOES, END, FIRST, HEAD, LAST, OF, PIECE, PLACE
from vllm_deltamem.kernels.readouts import Readouts
from vllm_deltamem.kernels.rows import as_bits


def make(coarse=(40, 300, 25)):
    slab, views = make_layer(exact=(4,) * len(coarse), coarse=coarse, size=64, slots=4, dtype=torch.bfloat16)
    slots = views(slab)
    return slab, slots, Readouts(slots)


def pieces_of(slots, *sequences):
    """Of (slot, tokens before, tokens after), which lie one after another in the batch, cut as the backend does."""
    rows, first = [], 0
    for i, (_, begin, end) in enumerate(sequences):
        while begin < end:
            count = min(slots.segment - begin % slots.segment, end - begin)
            rows.append((i, first, count, begin))
            first, begin = first + count, begin + count
    slot, begin, end = (list(column) for column in zip(*sequences, strict=True))
    return cpu.Pieces(slot, begin, end, np.array(slot)[:, None], np.array(rows))


def tasks_of(slots, readouts, pieces, threads, group=3, merges=True):
    count = sum(pieces.end) - sum(pieces.begin)
    kv, q = torch.zeros(count, len(slots.exact_start) - 1, 64), torch.zeros(count, group * slots.ring_k.shape[1], 64)
    tokens = chains.Tokens(
        *(as_bits(x.bfloat16()) for x in (kv, kv, q, q)), 1.0, np.full(q.shape[1], -np.inf, np.float32)
    )
    sequences = pieces.slots, np.zeros(len(pieces.slot), np.int64), np.ones(len(pieces.slot), np.bool_)
    given = chains.Pieces(*sequences, pieces.table)
    return chains._tasks(readouts.layer(None, make_policy(3, 64)), tokens, given, merges, threads)[:2]


@pytest.mark.parametrize("threads", [1, 2, 7, 64])
@pytest.mark.parametrize(
    "sequences", [[(0, 0, 1000)], [(1, 70, 71), (3, 0, 5)], [(0, 64, 300), (2, 500, 501), (1, 0, 640)]], ids=str
)
def test_every_row_is_somebodys_task_and_a_task_waits_for_those_before_its_own(sequences, threads):
    _, slots, readouts = make()
    pieces = pieces_of(slots, *sequences)
    tasks, bounds = tasks_of(slots, readouts, pieces, threads)
    seen = set()
    for begin, end in itertools.pairwise(bounds):
        own, rows = tasks[begin:end], {}
        (head,) = set(own[:, HEAD])
        (sequence,) = set(pieces.table[own[:, PIECE], 0])
        assert (sequence, head) not in seen
        seen.add((sequence, head))
        for m, task in enumerate(own):
            n, first, last, after, does = task[[PIECE, FIRST, LAST, AFTER, DOES]]
            assert after <= m and (own[:after, PIECE] <= n).all(), "only what comes before it"
            if does & chains.COMBINES:
                assert rows.setdefault(n, 0) == first and (task[BEGIN], task[END]) == (0, task[OF])
                rows[n] = last
            put = does & chains.PUTS or own[:after][own[:after, PIECE] == n][:1, DOES] & chains.PUTS
            assert put, "keys are there before queries attend"
            if does & chains.MERGES:
                assert rows[n] == 3 * pieces.table[n, 2] and (last > first or after == m), "all have attended"
            assert all(rows[i] == 3 * pieces.table[i, 2] for i in own[:after, PIECE] if i < n), "pieces do not overlap"
        due = pieces.table[:, 2] + pieces.table[:, 3]
        due = (pieces.table[:, 0] == sequence) & (due % slots.segment == 0) & (due > slots.window)
        assert sorted(own[own[:, DOES] & chains.MERGES > 0, PIECE]) == np.flatnonzero(due).tolist()
        assert own[0, DOES] & chains.READS and not (own[1:, DOES] & chains.READS).any()
        assert rows == {n: 3 * pieces.table[n, 2] for n in np.flatnonzero(pieces.table[:, 0] == sequence)}
    assert len(seen) == 3 * len(sequences)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_token_is_shared_out_by_parts_of_the_memory(threads, monkeypatch):
    monkeypatch.setattr(grid, "PART", 64)
    _, slots, readouts = make((40, 2000, 500))
    pieces = pieces_of(slots, (1, 4000, 4001), (2, 100, 101))
    tasks, _ = tasks_of(slots, readouts, pieces, threads)
    large = tasks[(tasks[:, PIECE] == 0) & (tasks[:, HEAD] == 1)]
    if threads == 1:
        assert len(large) == 1 and large[0, DOES] & chains.COMBINES
        return
    puts, sees, combines = large[0], large[1:-1], large[-1]
    assert puts[DOES] & chains.PUTS and combines[DOES] & chains.COMBINES and combines[AFTER] == len(sees) + 1 > 2
    assert sees[:, BEGIN].tolist() == [0, *sees[:-1, END]] and sees[-1, END] == sees[-1, OF] == 33
    assert (sees[:, [FIRST, LAST, AFTER]] == (0, 3, 1)).all()
    shared = tasks[tasks[:, PLACE] >= 0]
    assert all(len({*shared[shared[:, PLACE] == place, HEAD]}) == 1 for place in shared[:, PLACE]), (
        "by one head's tasks"
    )


@pytest.mark.parametrize("trained", [0, 150], ids=["near", "far"])
def test_parts_of_the_memory_are_what_all_of_it_is_whoever_looks(trained, monkeypatch):
    rope, policy, most = make_rope("neox", 64, trained), make_policy(3, 64), torch.get_num_threads()
    k, v, q = make_tokens(409, 3, 64, 3, torch.bfloat16)
    found = []
    for part, threads, cuts in (
        (grid.PART, 1, [(0, 409)]),
        (64, 1, [(0, 409)]),
        (64, 5, [(0, 400), (400, 403), (403, 409)]),
    ):
        monkeypatch.setattr(grid, "PART", part)
        slab, slots, readouts = make()
        slab[:] = 0
        out = torch.zeros_like(q)
        torch._C.set_num_threads(threads)
        try:
            for begin, end in cuts:
                given = {name: x[begin:end] for name, x in dict(k=k, v=v, q=q, out=out).items()}
                cpu.walk(slots, pieces_of(slots, (2, begin, end)), rope, policy, readouts, scale=0.1, **given)
        finally:
            torch._C.set_num_threads(most)
        found.append((out, slab))
    whole, alone, shared = found
    assert torch.equal(alone[0], shared[0]) and torch.equal(alone[1], shared[1]) and torch.equal(whole[1], alone[1])
    assert not torch.equal(whole[0], alone[0]) and torch.allclose(whole[0].float(), alone[0].float(), atol=0.02)


def test_few_heads_are_divided_among_many_threads():
    _, slots, readouts = make((40, 2000))
    pieces = pieces_of(slots, (0, 0, 4096))
    for threads in (1, 2, 3, 8):
        tasks, bounds = tasks_of(slots, readouts, pieces, threads, group=14)
        last = tasks[tasks[:, PIECE] == len(pieces.table) - 1]
        parts = [(last[:, LAST] > last[:, FIRST])[last[:, HEAD] == head].sum() for head in (0, 1)]
        assert (parts == [1, 1]) if threads == 1 else parts[1] > 1, "the large head has most of the work"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_what_fails_is_told_and_nobody_waits_for_it(threads):
    _, slots, readouts = make()
    k, v, q = make_tokens(640, 3, 64, 3, torch.bfloat16)
    most, out = torch.get_num_threads(), torch.zeros_like(q)
    pieces, given = pieces_of(slots, (1, 0, 640)), dict(q=q, out=out, scale=0.1)
    readouts.of(1, 576, 0)
    layer = readouts.layer(None, make_policy(3, 64))
    wide = layer.arrays._replace(cells=1 << 42)  # more than any memory holds, of which AMX takes all
    readouts._layer, right = layer._replace(way=layer.way._replace(in_tiles=True), arrays=wide), layer
    torch._C.set_num_threads(threads)  # vLLM replaces torch.set_num_threads
    try:
        with pytest.raises(RuntimeError, match="short of memory"):
            cpu.walk(slots, pieces, None, None, readouts, **given)
        readouts._layer = right
        cpu.walk(slots, pieces, None, None, readouts, k=k, v=v, **given)
    finally:
        torch._C.set_num_threads(most)
    assert out.any(-1).all()


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("trained", [0, 150], ids=["near", "far"])
def test_pieces_in_one_walk_leave_the_same_bits_as_one_at_a_time(trained, rows):
    slab, slots, _ = make()
    slab[:] = 0
    places = sum(readout.rooms(readout.capacities(slots), 400))
    rope, policy, sequences = make_rope("neox", 64, trained), make_policy(3, 64), [(2, 0, 400), (0, 0, 5), (3, 0, 333)]
    k, v, q = make_tokens(738, 3, 64, 3, torch.bfloat16)
    pieces, found = pieces_of(slots, *sequences), []
    alone = [
        cpu.Pieces([sequences[i][0]], [p], [p + n], pieces.slots[i : i + 1], np.array([(0, b, n, p)]))
        for i, b, n, p in pieces.table.tolist()
    ]
    for walks in ([pieces], alone):
        slab[:] = 0
        out, kept = torch.zeros_like(q), Readouts(slots, rows * places * readout.Storage.bytes_per_place(slots.ring_k))
        for walk in walks:
            cpu.walk(slots, walk, rope, policy, kept, k=k, v=v, q=q, out=out, scale=0.1)
        found.append((out, slab.clone()))
    assert found[0][0].any(-1).all() and (slots.coarse_mass > 1).any()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
