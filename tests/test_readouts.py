"""Sequences that decode together, against each of them alone, for whatever readouts there is room."""

import pytest
import torch

from tests.layers import make_batch, make_layer, make_policy, make_rope, make_tokens
from vllm_deltamem.kernels import cpu, readout, readouts
from vllm_deltamem.kernels.readouts import Readouts

STARTS = {5: 3, 0: 470, 3: 150, 1: 90, 6: 149, 2: 152}  # slot: tokens of its prompt; slot 4 and 7 are nobody's
STEPS = 70


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_readouts(slots, rows):
    """Readouts that hold `rows` of the longest sequence here."""
    places = sum(readout.rooms(readout.capacities(slots), 540))
    return Readouts(slots, rows * places * readout.Storage.bytes_per_place(slots.ring_k))


def step(slots, tokens, rows, rope, policy, kept):
    """One step of a layer over rows (slot, query tokens, length); what each row's last token sees."""
    k, v, q = (torch.cat([tokens[slot][field][length - n : length] for slot, n, length in rows]) for field in range(3))
    batch, out = make_batch(rows), torch.zeros_like(q)
    cpu.write(k, v, slots, *batch)
    cpu.attend(q, slots, *batch, q.shape[-1] ** -0.5, out, rope, readouts=kept)
    cpu.merge(slots, *batch, rope, policy, readouts=kept)
    return dict(zip([slot for slot, _, _ in rows], out[batch[1][1:].long() - 1], strict=True))


def prompt(slots, slot, length, tokens, rope, policy, kept):
    for first in range(0, length, slots.segment):
        last = min(first + slots.segment, length)
        step(slots, tokens, [(slot, last - first, last)], rope, policy, kept)


def make_sequences(count, length, rows):
    """One head that holds `count` prompts of `length` tokens: slab, slots, tokens, and up to `rows` readouts."""
    slab, views = make_layer(exact=(8,), coarse=(100,), slots=8)
    slots, tokens = views(slab), {slot: make_tokens(200, 1) for slot in range(count)}
    kept = make_readouts(slots, rows)
    for slot in tokens:
        prompt(slots, slot, length, tokens, None, make_policy(1), kept)
    return slab, slots, tokens, kept


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("fidelity,trained", [("k8v4", 0), ("bf16", 0), ("k8v4", 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_together_as_alone(dtype, fidelity, trained, rows, monkeypatch):
    monkeypatch.setattr(readout, "LEAST_ROOM", 64)  # so that sequences outgrow theirs
    heads = dict(exact=(30, 4, 4), coarse=(60, 300, 300))
    slab, views = make_layer(fidelity, dtype=dtype, slots=8, **heads)
    rope, policy = make_rope("neox", 32, trained), make_policy()
    tokens = {slot: make_tokens(length + STEPS, dtype=dtype) for slot, length in STARTS.items()}
    slots, alone = views(slab), views(slab.clone())
    kept = make_readouts(slots, rows)
    for slot, length in STARTS.items():
        prompt(slots, slot, length, tokens, rope, policy, kept)
        prompt(alone, slot, length, tokens, rope, policy, None)
    for n in range(1, STEPS + 1):
        order = list(STARTS)[n % 3 :] + list(STARTS)[: n % 3]  # the scheduler's order is not that of the slots
        seen = step(slots, tokens, [(slot, 1, STARTS[slot] + n) for slot in order], rope, policy, kept)
        for slot in order:
            expected = step(alone, tokens, [(slot, 1, STARTS[slot] + n)], rope, policy, None)[slot]
            assert torch.equal(seen[slot], expected), f"slot {slot} after {n} tokens"
    for field in ("exact_k", "exact_v", "exact_rank", "coarse_k", "coarse_v", "coarse_mass", "coarse_rank"):
        assert torch.equal(getattr(slots, field), getattr(alone, field)), field


def test_a_slot_is_read_anew_when_another_sequence_has_it():
    """As vLLM hands slots on while others decode."""
    (slab, slots, tokens, kept), policy = make_sequences(3, 150, 8), make_policy(1)
    step(slots, tokens, [(slot, 1, 151) for slot in tokens], None, policy, kept)
    slab[1].zero_()
    kept.forget(1)
    tokens[1] = make_tokens(200, 1)
    prompt(slots, 1, 100, tokens, None, policy, kept)
    rows = [(0, 1, 152), (1, 1, 101), (2, 1, 152)]
    seen = step(slots, tokens, rows, None, policy, kept)
    fresh = step(slots, tokens, rows, None, policy, Readouts(slots))
    assert all(torch.equal(seen[slot], fresh[slot]) for slot in tokens)


def test_readouts_at_hand_are_kept_in_a_step_that_needs_more(monkeypatch):
    _, slots, tokens, kept = make_sequences(5, 100, 3)
    made = []
    monkeypatch.setattr(
        readouts, "Readout", lambda slots, slot, *rest: made.append(slot) or readout.Readout(slots, slot, *rest)
    )
    for n in range(101, 111):  # no merge is due
        made.clear()
        step(slots, tokens, [(slot, 1, n) for slot in tokens], None, make_policy(1), kept)
        assert len(made) == 2


def test_one_that_is_outgrown_takes_no_row_of_the_same_call(monkeypatch):
    _, slots, _, kept = make_sequences(2, 100, 2)
    monkeypatch.setattr(readout.Readout, "has_room", lambda self, gone: self.slot == 0)
    assert sorted(kept.of(slot, 80).row for slot in (0, 1)) == [0, 1] and 0 in kept and 1 in kept


def test_layers_of_any_size_hold_as_many_sequences(monkeypatch):
    monkeypatch.setattr(readouts, "READOUT_BYTES", 4 << 20)
    made = [make_layer(exact=(64,), coarse=(coarse,), slots=64) for coarse in (64, 192, 1216)]
    held = []
    for kept in Readouts.of_layers([views(slab) for slab, views in made]):
        held.append({kept.of(slot, 4000).row for slot in range(64)})
    assert [len(rows) for rows in held] == [18] * 3  # of 128, 256 and 1,280 entries of 400 bytes
