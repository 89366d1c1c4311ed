"""vllm_deltamem/profile.py: what is saved is what is loaded, and only for the model it was made for."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import FalconConfig, GPTBigCodeConfig, LlamaConfig

from vllm_deltamem import profile as profiles
from vllm_deltamem.calibration import pairs
from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.kernels import reference
from vllm_deltamem.kernels.pairs import Pairs
from vllm_deltamem.kernels.slot import FIDELITIES
from vllm_deltamem.memory import Shape


def make_config(**changes):
    settings = dict(
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        hidden_size=96,
        intermediate_size=64,
        vocab_size=100,
        head_dim=16,
    )
    return LlamaConfig(**settings | changes)


def make_profile(**changes):
    torch.manual_seed(0)
    weights = (torch.randn(2, 3, 32, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 3))
    made = profiles.Profile(
        fingerprint=profiles.fingerprint_of(make_config()),
        sizes=(0.05, 0.2),
        budgets=torch.rand(2, 2, 3) + 0.5,
        gate=torch.randn(2, 3, 3),
        fidelity=(("bf16", "k3v4"), ("k8v4", "k8v4")),
        pairs=pairs.fit(*torch.rand(2, 2, 3, 8)),
        window_share=0.125,
        importance=weights,
        meta={"seed": 7},
    )
    return dataclasses.replace(made, **changes)


def test_saved_profile_loads_as_it_was(tmp_path):
    made = make_profile()
    profiles.save(made, tmp_path / "a.safetensors")
    read = profiles.load(tmp_path / "a.safetensors")
    assert (read.fingerprint, read.sizes, read.fidelity) == (made.fingerprint, made.sizes, made.fidelity)
    assert read.window_share == made.window_share
    assert read.meta == made.meta
    assert torch.equal(read.budgets, made.budgets) and torch.equal(read.gate, made.gate)
    assert all(map(torch.equal, read.pairs, made.pairs))
    for actual, expected in zip(read.importance, made.importance, strict=True):
        torch.testing.assert_close(actual, expected.half())


def test_a_profile_in_the_place_of_another_is_what_loads(tmp_path):
    profiles.save(make_profile(), tmp_path / "a.safetensors")
    assert profiles.load(tmp_path / "a.safetensors").window_share == 0.125
    profiles.save(make_profile(window_share=0.25), tmp_path / "a.safetensors")
    assert profiles.load(tmp_path / "a.safetensors").window_share == 0.25


def test_saved_profile_is_readable_by_whom_the_umask_lets(tmp_path):
    profiles.save(make_profile(), tmp_path / "a.safetensors")
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_budgets_interpolate_between_sizes_and_stop_at_the_ends():
    made = make_profile()
    assert torch.equal(made.budgets_for(10, 1000), made.budgets[0])
    assert torch.equal(made.budgets_for(900, 1000), made.budgets[1])
    torch.testing.assert_close(made.budgets_for(100, 1000), made.budgets.mean(0))  # .1 is halfway in log size


def test_fidelity_is_that_of_the_nearest_size():
    made = make_profile()
    assert made.fidelity_for(90, 1000) == made.fidelity_for(1, 1000) == ("bf16", "k3v4")
    assert made.fidelity_for(110, 1000) == made.fidelity_for(900, 1000) == ("k8v4", "k8v4")
    assert make_profile(fidelity=None).fidelity_for(90, 1000) is None
    shape = Shape(2, 3, 16, torch.bfloat16, 4096)
    kinds = [profiles.divide(shape, DeltaMemConfig(memory=n), made).codecs for n in (200, 800)]
    assert kinds == [(FIDELITIES["bf16"], FIDELITIES["k3v4"]), (FIDELITIES["k8v4"],) * 2]
    own = profiles.divide(shape, DeltaMemConfig(memory=200, fidelity="k8v8"), made)
    assert own.codecs == (FIDELITIES["k8v8"],) * 2, "settings come first"


def test_window_of_a_small_memory_is_the_share_of_the_profile():
    shape = Shape(2, 3, 16, torch.bfloat16, 4096)
    windows = [
        [profiles.divide(shape, DeltaMemConfig(memory=n, **own), made).window for n in (200, 400, 800)]
        for made, own in ((None, {}), (make_profile(), {}), (make_profile(), {"window": 40}))
    ]
    assert windows == [[50, 64, 64], [25, 50, 64], [40, 40, 40]], "settings come first"


@pytest.mark.parametrize("learned", [True, False])
def test_policy_of_a_slice_is_the_slice_of_the_policy(learned):
    made = make_profile() if learned else make_profile(importance=None)
    k, v, mean = torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.randn(3, 16)
    whole, part = made.policy(1), made.policy(1, slice(1, 3))
    torch.testing.assert_close(part.gate, whole.gate[1:3])
    for mine, all_heads in zip(made.pairs_of(1, slice(1, 3)), made.pairs_of(1), strict=True):
        assert torch.equal(mine, all_heads[1:3])
    torch.testing.assert_close(
        reference.importance(k[1:], v[1:], mean[1:], part.importance),
        reference.importance(k, v, mean, whole.importance)[1:],
    )


def test_profile_of_another_model_is_refused(tmp_path):
    made = make_profile()
    profiles.check(made, make_config())
    path = str(tmp_path / "a.safetensors")
    profiles.save(made, path)
    assert profiles.choose(path, make_config()) is not None
    with pytest.raises(ValueError, match="layers is 2 in the profile and 3 in the model"):
        profiles.choose(path, make_config(num_hidden_layers=3))


def test_keys_in_three_bits_take_a_profile_that_says_how():
    shape, settings = Shape(2, 3, 16, torch.bfloat16, 4096), DeltaMemConfig(memory=400, fidelity="k3v4")
    assert profiles.divide(shape, settings, make_profile()).codecs == (FIDELITIES["k3v4"],) * 2
    bare = make_profile(pairs=None, fidelity=None)
    for lacking in (None, bare):
        with pytest.raises(ValueError, match="k3v4 takes a profile.*deltamem calibrate"):
            profiles.divide(shape, settings, lacking)


def test_choose_none_and_unknown_models():
    assert profiles.choose("none", make_config()) is None
    assert profiles.choose(None, make_config()) is None


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(budgets=torch.ones(2, 3, 3)), "budgets must be finite with shape"),
        (dict(gate=torch.full((2, 3, 3), torch.nan)), "gate must be finite"),
        (dict(sizes=(0.2, 0.05)), "sizes must rise"),
        (dict(sizes=(0.0, 0.05)), "sizes must rise"),
        (dict(window_share=1.5), "window_share must be above 0 and at most 1, is 1.5"),
        (dict(window_share="wide"), "window_share must be"),
        (
            dict(fidelity=(("k3v4", "k3v4"),)),
            "fidelity must be one of bf16, k8v8, k8v4, k5v4, k3v4 for each size and layer",
        ),
        (dict(fidelity=(("k3v4",), ("k3v4",))), "fidelity must be one of"),
        (dict(fidelity=(("k3v4", "k2v2"),) * 2), "fidelity must be one of"),
        (dict(pairs=None), "it lacks the pairs that its fidelities take"),
        (dict(pairs=pairs.fit(*torch.ones(2, 2, 3, 7))), "pair_place must be finite with shape"),
        (dict(pairs=Pairs(torch.zeros(2, 3, 8), torch.ones(2, 3, 8))), "pairs must each have a place of their own"),
    ],
)
def test_damaged_profile_is_refused(tmp_path, changes, message):
    profiles.save(make_profile(**changes), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        profiles.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "lost", ["fingerprint", "sizes", "meta", "budgets", "gate", "b1", "w2", "pair_reach", "header"]
)
def test_profile_that_lacks_a_part_is_refused(tmp_path, lost):
    path = tmp_path / "a.safetensors"
    profiles.save(make_profile(), path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["deltamem"])
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != lost}
    header = [] if lost == "header" else {name: value for name, value in header.items() if name != lost}
    save_file(tensors, path, {"deltamem": json.dumps(header)})
    with pytest.raises(ValueError, match="is damaged|is not a deltamem profile"):
        profiles.load(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Cannot read"):
        profiles.load(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("not a profile")
    with pytest.raises(ValueError, match="Cannot read"):
        profiles.load(tmp_path / "text")


@pytest.mark.parametrize("config", [GPTBigCodeConfig(), FalconConfig()], ids=lambda config: config.model_type)
def test_a_config_that_says_less_has_no_profile(config):
    """These have one kv head, and no name for it."""
    assert profiles.choose(None, config) is None


def test_shipped_profiles_load():
    shipped = {profiles.load(path).meta["model"] for path in profiles.SHIPPED.glob("*.safetensors")}
    assert shipped == {"SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"}
