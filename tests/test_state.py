"""What the bytes of a slot mean: who changes it must raise kernels.slot.STATE, or old sessions are misread.

A failure here is no fault by itself: raise STATE and put down what the test finds now.
"""

import hashlib

import pytest
import torch

from tests.layers import advance, make_pairs, make_rope, make_tokens
from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.kernels.slot import STATE, decode, rank_position
from vllm_deltamem.memory import Shape, plan_layout
from vllm_deltamem.profile import training_free

STATE_IS = {
    "k8v4": {"state": 3, "layout": "a01db2068349", "held": "58330f4e000b"},
    "k3v4": {"state": 3, "layout": "bddc14569694", "held": "30af477b87b2"},
}
LENGTHS_ARE = {
    "k8v4": {"mass": 17.517, "keys": 284.107, "values": 123.7, "key_sum": 2701.28},
    "k3v4": {"mass": 18.6011, "keys": 210.326, "values": 129.609, "key_sum": 2701.28},
}


def digest(value) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=6).hexdigest()


@pytest.mark.parametrize("fidelity", STATE_IS)
def test_the_same_tokens_leave_what_they_left(fidelity):
    shape = Shape(2, 2, 128, torch.float32, 512)
    layout = plan_layout(shape, DeltaMemConfig(memory=60, window=12, segment=8, pinned=3, fidelity=fidelity))
    slab = torch.zeros(2, layout.slot_bytes, dtype=torch.uint8)
    slots = layout.views(slab, 1, make_pairs(2, 128))
    slots.pins[1, 0] = torch.tensor([20, 23])
    torch.manual_seed(0)
    k, v, _ = make_tokens(200, 2, 128)
    advance(slots, 1, k, v, make_rope("neox", 128, trained=96), training_free(2))

    ranks = slots.exact_rank[1], slots.coarse_rank[1]
    found = {
        "state": STATE,
        "layout": digest(layout._fields),
        "held": digest([[*rank_position(rank).tolist(), (rank != 0).sum().item()] for rank in ranks]),
    }
    weights = torch.linspace(-1, 1, 128)  # so that it matters where in a vector a number is
    pairs = slots.pairs.of(torch.arange(2).repeat_interleave(slots.coarse_start.diff()))
    keys = decode(slots.coarse_k[1], slots.coarse_k_affine[1], slots.codec.key_bits, torch.float32, pairs) @ weights
    values = decode(slots.coarse_v[1], slots.coarse_v_affine[1], slots.codec.value_bits, torch.float32) @ weights
    lengths = {"mass": slots.coarse_mass[1], "keys": keys, "values": values, "key_sum": slots.key_sum[1] @ weights}
    lengths = {name: vector.double().norm().item() for name, vector in lengths.items()}
    print(found, lengths)
    assert found == STATE_IS[fidelity] and lengths == pytest.approx(LENGTHS_ARE[fidelity], rel=1e-3)
