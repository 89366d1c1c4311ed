"""What the bytes of a slot mean: who changes it must raise kernels.slot.STATE, or old sessions are misread.

A failure here is no fault by itself: raise STATE and put down what the test finds now.
"""

import hashlib

import pytest
import torch

from tests.layers import advance, make_rope, make_tokens
from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.kernels.slot import STATE, decode, rank_position
from vllm_deltamem.memory import Shape, plan_layout
from vllm_deltamem.profile import training_free

STATE_IS = {"state": 1, "layout": "91c146b45e77", "held": "3004cd3ec616"}
LENGTHS_ARE = {"mass": 15.6002, "keys": 93.682, "values": 48.371, "key_sum": 517.97}


def digest(value) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=6).hexdigest()


def test_the_same_tokens_leave_what_they_left():
    shape = Shape(2, 2, 32, torch.float32, 512)
    layout = plan_layout(shape, DeltaMemConfig(memory=60, window=12, segment=8, pinned=3))
    slab = torch.zeros(2, layout.slot_bytes, dtype=torch.uint8)
    slots = layout.views(slab, 1)
    slots.pins[1, 0] = torch.tensor([20, 23])
    torch.manual_seed(0)
    k, v, _ = make_tokens(200, kv_heads=2)
    advance(slots, 1, k, v, make_rope("neox", 32, trained=96), training_free(2))

    ranks = slots.exact_rank[1], slots.coarse_rank[1]
    found = {
        "state": STATE,
        "layout": digest(layout._fields),
        "held": digest([[*rank_position(rank).tolist(), (rank != 0).sum().item()] for rank in ranks]),
    }
    weights = torch.linspace(-1, 1, 32)  # so that it matters where in a vector a number is
    coded = (slots.coarse_k, slots.coarse_k_affine, 8), (slots.coarse_v, slots.coarse_v_affine, 4)
    keys, values = (decode(code[1], affine[1], bits, torch.float32) @ weights for code, affine, bits in coded)
    lengths = {"mass": slots.coarse_mass[1], "keys": keys, "values": values, "key_sum": slots.key_sum[1] @ weights}
    lengths = {name: vector.double().norm().item() for name, vector in lengths.items()}
    print(found, lengths)
    assert found == STATE_IS and lengths == pytest.approx(LENGTHS_ARE, rel=1e-3)
