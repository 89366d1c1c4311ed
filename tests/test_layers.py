"""vllm_deltamem/layers.py, and what sliding layers take in the layout."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.layers import check_windows, count_recurrent, find_attending, find_rotated, find_windows
from vllm_deltamem.memory import Shape, plan_layout

FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = (None, 40, 40, None)
SHAPE = Shape(layers=4, kv_heads=2, head_size=32, dtype=torch.bfloat16, max_model_len=2048, windows=MIXED)
TOKEN = 2 * 2 * 32 * 2  # bytes of a token in the kv heads of one layer


def config(kinds, window, **changes):
    return SimpleNamespace(
        **{"num_hidden_layers": 4, "model_type": "llama", "layer_types": kinds, "sliding_window": window} | changes
    )


@pytest.mark.parametrize(
    "kinds, window, expected",
    [
        (None, None, (None,) * 4),
        ([FULL] * 4, 40, (None,) * 4),
        ([FULL, SLIDING, SLIDING, FULL], 40, MIXED),
        ([FULL, SLIDING, SLIDING, FULL, SLIDING], 40, MIXED),  # a draft layer at the end
        ([FULL, SLIDING, SLIDING, FULL], None, (None,) * 4),  # --disable-sliding-window
        ([FULL, SLIDING, SLIDING, FULL], 9000, (None, 2048, 2048, None)),
        (None, 4096, (None,) * 4),  # as wide as the context: never slides
    ],
)
def test_windows_are_those_of_the_config(kinds, window, expected):
    assert find_windows(config(kinds, window), 2048) == expected


@pytest.mark.parametrize(
    "kinds, attending, recurrent",
    [
        (["linear_attention", FULL, "linear_attention", FULL], [1, 3], 2),
        (["mamba", "mlp", "attention", "moe"], [2], 1),
        (["hybrid"] * 4, [0, 1, 2, 3], 4),
        ([FULL, "conv", SLIDING, "hybrid"], [0, 2, 3], 2),
        ([FULL] * 4, [0, 1, 2, 3], 0),
    ],
)
@pytest.mark.parametrize("name", ["layer_types", "layers_block_type"])
def test_layers_that_attend_are_counted_by_themselves(name, kinds, attending, recurrent):
    hybrid = config(None, 40 if SLIDING in kinds else None, **{name: kinds})
    assert find_attending(hybrid) == attending and count_recurrent(hybrid) == recurrent
    assert find_windows(hybrid, 2048) == tuple(40 if kinds[i] == SLIDING else None for i in attending)
    assert find_rotated(hybrid) == (True,) * len(attending)


def test_a_family_may_leave_out_the_query_itself():
    kinds = [FULL, SLIDING, SLIDING, FULL]
    assert find_windows(config(kinds, 39, model_type="cohere2"), 2048) == MIXED


@pytest.mark.parametrize(
    "kinds, message",
    [
        (None, "Every layer of this model sees the last 1,024 tokens only"),
        ([SLIDING] * 4, "Every layer of this model"),
        ([FULL, "chunked_attention"] * 2, "does not support layers of chunked attention"),
    ],
)
def test_models_without_a_context_to_compress_are_refused(kinds, message):
    with pytest.raises(ValueError, match=message):
        find_windows(config(kinds, 1024), 2048)


def test_windows_that_vllm_gives_otherwise_are_refused():
    check_windows(MIXED, [*MIXED], 2048)
    check_windows((None, 2048), [None, 9000], 2048)
    check_windows((None,), [4096], 2048)
    for given in ([None, 41, 40, None], [None, None, 40, None], [40, 40, 40, None]):
        with pytest.raises(ValueError, match="layer . should see the last .* tokens by its config"):
            check_windows(MIXED, given, 2048)
    for given in ([None], [*MIXED, None]):
        with pytest.raises(ValueError, match="layers that attend alike where its config tells 4"):
            check_windows(MIXED, given, 2048)


def test_sliding_layers_hold_their_window_and_nothing_else():
    layout = plan_layout(SHAPE, DeltaMemConfig(memory=128, segment=16, window=8, fidelity="k8v4"))
    slab = torch.zeros(2, layout.slot_bytes, dtype=torch.uint8)
    for layer, window in enumerate(MIXED):
        slots = layout.views(slab, layer)
        assert slots.sliding == (window is not None) and slots.window == (window or 8)
        assert slots.ring_k.shape[2] == slots.window + 16
        assert (slots.exact_rank.shape[1] == 0) == slots.sliding


def test_a_worker_of_two_has_the_same_windows():
    whole = plan_layout(SHAPE, DeltaMemConfig(memory=128, segment=16, window=8))
    part = whole.of_worker(1, 2)
    assert part.shape.windows == MIXED and part.coarse == tuple(row[1:] for row in whole.coarse)
    assert part.views(torch.zeros(1, part.slot_bytes, dtype=torch.uint8), 1).ring_k.shape == (1, 1, 40 + 16, 32)


@pytest.mark.parametrize("settings", [dict(memory=128), dict(memory_bytes=100_000)], ids=str)
def test_bytes_of_sliding_layers_come_on_top_of_the_memory(settings):
    config = DeltaMemConfig(segment=16, window=8, **settings)
    layout = plan_layout(SHAPE, config)
    rings = 2 * (TOKEN * (40 + 16) + 2 * 32 * 4)
    most = 100_000 if config.memory_bytes else rings + 128 * TOKEN * 2
    assert most - 4 * 2 * 200 <= layout.slot_bytes <= most
    assert layout.memory_tokens == pytest.approx((layout.slot_bytes - rings) / (2 * TOKEN))
    alone = plan_layout(
        Shape(2, 2, 32, torch.bfloat16, 2048), DeltaMemConfig(memory_bytes=most - rings, segment=16, window=8)
    )
    assert (layout.exact[0], layout.exact[3]) == alone.exact and (layout.coarse[0], layout.coarse[3]) == alone.coarse


def test_memory_bytes_that_hold_the_windows_only_are_refused():
    with pytest.raises(ValueError, match="too small .* beside 29,184 bytes for the sliding layers"):
        plan_layout(SHAPE, DeltaMemConfig(memory_bytes=30_000, segment=16, window=8))


def test_a_paged_cache_would_hold_windows_too():
    assert SHAPE.full_attention_bytes(10) == 4 * 10 * TOKEN
    assert SHAPE.full_attention_bytes(1000) == 2 * (1000 + 40) * TOKEN


def test_budgets_of_sliding_layers_are_ignored():
    budgets = torch.tensor([[1.0, 3.0], [100.0, 1.0], [1.0, 50.0], [2.0, 2.0]])
    config = DeltaMemConfig(memory=256, segment=16, window=8)
    layout, other = plan_layout(SHAPE, config, budgets), plan_layout(SHAPE, config, budgets.clamp(max=3))
    assert layout == other and layout.coarse[1] == (0, 0)
    assert sum(layout.exact[0][1:] + layout.coarse[0][1:]) > 2 * sum(layout.exact[0][:1] + layout.coarse[0][:1])


@pytest.mark.parametrize("memory", [2048, 100_000])
def test_a_memory_as_large_as_the_context_holds_every_token_exactly_whatever_a_heads_share(memory):
    budgets = torch.tensor([[0.1, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.9]])
    layout = plan_layout(SHAPE, DeltaMemConfig(memory=memory, segment=64, pinned=10), budgets)
    assert layout.exact == ((2048 - layout.window,) * 2, (0, 0), (0, 0), (2048 - layout.window,) * 2)
    assert not any(map(any, layout.coarse))
    less = plan_layout(SHAPE, DeltaMemConfig(memory=2047, segment=64, pinned=10), budgets)
    assert any(map(any, less.coarse)), "a memory of that many bytes has room for codes only"


def test_placed_tokens_are_those_of_layers_with_full_attention():
    config = DeltaMemConfig(memory=128, segment=16, window=8)
    both = Shape(2, 2, 32, torch.bfloat16, 2048)
    layout = plan_layout(SHAPE, config)
    assert layout.placed(0, 1600) == plan_layout(both, config).placed(0, 1600)
    assert sum(layout.placed(0, 1600).values()) == 1600 - 8, "all but the window"
    grown = [layout.placed(n, n + 1) for n in range(1600)]
    assert sum(map(bool, grown)) == 100, "a segment at a time"
    assert {name: sum(step.get(name, 0) for step in grown) for name in grown[-1]} == layout.placed(0, 1600)


def test_sliding_layers_may_have_other_heads():
    shape = replace(SHAPE, kv_heads=1, head_size=64, sliding_heads=(4, 16))
    layout = plan_layout(shape, DeltaMemConfig(memory=300))
    slab = torch.zeros(1, layout.slot_bytes, dtype=torch.uint8)
    assert [layout.views(slab, layer).ring_k.shape[1::2] for layer in range(4)] == [(1, 64), (4, 16), (4, 16), (1, 64)]
    part = layout.of_worker(1, 2)
    assert (part.shape.kv_heads, part.shape.sliding_heads) == (1, (2, 16))
    assert [len(row) for row in part.exact] == [1, 2, 2, 1] and part.exact[0] == layout.exact[0]
