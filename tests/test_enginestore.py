"""What a saved session is marked with, so that no other model, setting or version takes it for its own."""

import pytest
from model_configs import save_config, vllm_config

from vllm_deltamem import enginestore
from vllm_deltamem.kernels.slot import STATE
from vllm_deltamem.weights import STRIDE, weights_digest


@pytest.fixture
def folder(tmp_path):
    weights_digest.cache_clear()
    (tmp_path / "model.safetensors").write_bytes(bytes(2 * STRIDE))
    yield save_config(tmp_path)
    weights_digest.cache_clear()


def marks(folder, settings=None, **options):
    return enginestore.fingerprint_of(vllm_config(folder, {"memory": 320} | (settings or {}), **options), 0)


def test_the_same_server_makes_the_same_mark(folder):
    made = marks(folder)
    weights_digest.cache_clear()
    assert marks(folder).difference(made) == ""
    assert marks(folder, {"sessions": {"max_age_s": 60}}, max_num_seqs=3).difference(made) == ""


def test_another_version_of_the_state(folder, monkeypatch):
    made = marks(folder)
    monkeypatch.setattr(enginestore, "STATE", STATE + 1)
    assert marks(folder).difference(made) == f"state is {STATE + 1} here, {STATE} in the session"


@pytest.mark.parametrize(
    "field, settings, options",
    [
        ("settings", {"memory": 336}, {}),
        ("settings", {"sinks": 5}, {}),
        ("settings", {"merge": False}, {}),
        ("settings", {}, {"max_model_len": 2048}),
        ("dtype", {}, {"dtype": "float16"}),
        ("model", {}, {"hf_overrides": {"rms_norm_eps": 1e-3}}),
        ("model", {}, {"revision": "other"}),
        ("tp_size", {}, {"tensor_parallel_size": 2}),
    ],
)
def test_another_setting(folder, field, settings, options):
    difference = marks(folder, settings, **options).difference(marks(folder))
    assert difference.startswith(f"{field} is ") or f"; {field} is " in difference


def test_other_weights_in_the_same_place(folder):
    made = marks(folder)
    for at, changed in ((STRIDE, True), (STRIDE + 1000, False)):
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(at)
            file.write(b"tuned")
        weights_digest.cache_clear()
        assert bool(marks(folder).difference(made)) == changed, "samples tell"
        made = marks(folder)
    assert weights_digest("organisation/model") == "none", "a hub's name and revision tell"
    assert weights_digest(str(folder / "model.safetensors")) == weights_digest(str(folder))
