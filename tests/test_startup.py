"""Start-up: what is refused, in one clear error each, and what is adjusted."""

import logging
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from model_configs import (
    BLOOM,
    CHUNKED,
    DEEPSEEK,
    FALCON,
    GEMMA2,
    GEMMA4,
    JAMBA,
    LLAMA,
    MAMBA,
    MISTRAL,
    SHARED,
    save_config,
    vllm_config,
)
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec

from benchmarks.server import VllmServer
from vllm_deltamem import profile as profiles
from vllm_deltamem.plan import plan_memory
from vllm_deltamem.profile import Profile, fingerprint_of, save
from vllm_deltamem.rope import TRAINED
from vllm_deltamem.spec import make_spec
from vllm_deltamem.startup import CONTINUING

ON_CPU = current_platform.is_cpu()


def rope(**parameters):
    return {"rope_theta": 10000.0, **parameters}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_config(tmp_path_factory.mktemp("llama"))


def test_planning_ignores_the_default_device(llama, tmp_path):
    """vLLM makes models with the GPU as default device."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from vllm_deltamem.plan import plan_memory
    from vllm_deltamem.rope import find_ropes

    config = vllm_config(llama, {"memory": 320, "segment": 32})
    text = config.model_config.hf_text_config
    path = tmp_path / "profile.safetensors"
    save(Profile(fingerprint_of(text), (0.1, 0.5), torch.rand(2, 4, 2) + 0.5, torch.zeros(4, 2, 3)), path)
    learned = vllm_config(llama, {"memory": 320, "segment": 32, "profile": str(path), "merge": False})
    for chosen in (learned, config):
        expected = plan_memory(chosen).layout
        profiles.load.cache_clear()
        with torch.device("meta"), set_current_vllm_config(chosen):
            plan = plan_memory(chosen)
            policy = plan.policy(1, "cpu")
            get_rope(32, 4096, True, text.rope_parameters, torch.bfloat16)
            rope = find_ropes(chosen.model_config, plan.layout.shape, "cpu")[0]
        assert plan.layout == expected and policy.gate.device.type == "cpu"
        assert rope.cos.shape == (4096, 16) and rope.cos.device.type == "cpu"


def test_a_rope_is_found_again_as_it_was_found_first(llama):
    """What looking for it leaves in vLLM's dictionary is no rope of the loaded model's."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding

    from vllm_deltamem.plan import plan_memory
    from vllm_deltamem.rope import find_ropes

    config = vllm_config(llama, dtype="float32")
    text, shape = config.model_config.hf_text_config, plan_memory(config).layout.shape

    def found():
        return find_ropes(config.model_config, shape, "cpu")[0]

    with set_current_vllm_config(config), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotary_embedding, "_ROPE_DICT", {})
        assert found() is found() is None
        rotary_embedding.get_rope(32, text.max_position_embeddings, False, text.rope_parameters, torch.float32)
        assert all(found().interleaved for _ in range(2))


def test_layers_may_have_thetas_of_their_own(llama):
    """As Granite's, 0 for none; vLLM has made the rope in another dtype."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding

    from vllm_deltamem.plan import plan_memory
    from vllm_deltamem.rope import find_ropes

    config = vllm_config(llama)
    text, shape = config.model_config.hf_text_config, plan_memory(config).layout.shape
    with set_current_vllm_config(config), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotary_embedding, "_ROPE_DICT", {})
        for theta in (5e6, 1e4):
            parameters = text.rope_parameters | {"rope_theta": theta}
            rotary_embedding.get_rope(32, text.max_position_embeddings, True, parameters, torch.float32)
        patch.setattr(text, "layer_rope_theta", [5e6, 0, 5e6, 0], raising=False)
        found = find_ropes(config.model_config, shape, "cpu")
        assert [rope is not None for rope in found] == [True, False, True, False]
        torch.testing.assert_close(
            found[0].cos[1000], (1000 * 5e6 ** -(torch.arange(16) / 16)).cos(), atol=1e-3, rtol=0
        )
        patch.setattr(text, "layer_rope_theta", [5e6, 0, 1e4, 0])
        assert find_ropes(config.model_config, shape, "cpu") == [None] * 4


def test_longrope_has_the_table_that_it_uses(llama):
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from vllm_deltamem.plan import plan_memory
    from vllm_deltamem.rope import find_ropes

    config = vllm_config(llama, dtype="float32")
    text, shape = config.model_config.hf_text_config, plan_memory(config).layout.shape
    text.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 1024,
        "short_factor": [1.0] * 16, "long_factor": [float(i + 1) for i in range(16)],
    }  # fmt: skip
    with set_current_vllm_config(config):
        rope = get_rope(32, text.max_position_embeddings, True, text.rope_parameters, torch.float32)
        found = find_ropes(config.model_config, shape, "cpu")[0]
    key, positions = torch.randn(1, 32), torch.tensor([1500])
    turned = rope(positions, key.clone(), key.clone())[1]
    low, high = (turned / turned.norm() * key.norm()).chunk(2, -1)
    cos, sin = found.cos[1500], found.sin[1500]
    torch.testing.assert_close(torch.cat([low * cos + high * sin, high * cos - low * sin], -1), key, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"memroy": 512}, "Unknown deltamem setting 'memroy'; known settings: memory, "),
        ({"memory": "512"}, "'memory' must be an integer from 0"),
        ({"memory": 10**20}, "'memory' must be an integer from 0"),
        ({"memory": 0}, "A deltamem memory of 0 tokens"),
        ({"memory": 512, "memory_bytes": 1 << 20}, "'memory' and 'memory_bytes' both give the size"),
        ({"memory": 64, "window": 256, "segment": 64}, "too small for window 256, segment 64"),
        ({"memory_bytes": 1000}, "is too small for"),
        ({"segment": 24}, "'segment' must be a power of two"),
        ({"window": 0}, "'window' must be at least 1"),
        ({"fidelity": "k2v2"}, "'fidelity' must be one of bf16, k8v8, k8v4, k5v4, k3v4"),
        ({"fidelity": ["k8v4"]}, "'fidelity' must be one of bf16"),
        ({"merge": "no"}, "'merge' must be true or false"),
        ({"profile": "missing.safetensors"}, "Cannot read the deltamem profile 'missing.safetensors'"),
        ({"sessions": {"dir": "x"}}, "Unknown deltamem setting 'sessions.dir'"),
        ({"sessions": {"host_bytes": 0}}, "sessions are kept nowhere"),
        ({"sessions": {"host_bytes": 5000}}, "kept nowhere: a memory takes .* bytes, 'sessions.host_bytes' is 5,000"),
        ([], "'deltamem' must be an object of settings"),
    ],
)
def test_settings_refused(llama, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        vllm_config(llama, additional_config={"deltamem": settings})
    assert "VllmConfig" not in str(error.value), "ours alone, without pydantic's words"


@pytest.mark.parametrize("misplaced", [{"memory": 512}, {"deltamen": {"memory": 512}}])
def test_settings_in_the_wrong_place_are_not_passed_over(llama, misplaced):
    with pytest.raises(ValueError, match="settings go into .*deltamem"):
        vllm_config(llama, additional_config=misplaced)


def test_a_key_or_directory_that_cannot_hold_sessions_is_refused(llama, tmp_path):
    def start(**sessions):
        return vllm_config(llama, {"sessions": {"directory": str(tmp_path / "kept")} | sessions})

    with pytest.raises(ValueError, match="missing must hold 64 hex digits"):
        start(key_file=str(tmp_path / "missing"))
    assert start() and not (tmp_path / "kept").exists(), "the engine makes it"
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot use the directory .*file: File exists"):
        start(directory=str(tmp_path / "file"))
    with pytest.raises(ValueError, match="cannot make the directory .*file/in/it: .*file is no folder"):
        start(directory=str(tmp_path / "file" / "in" / "it"))
    with pytest.raises(ValueError, match="'sessions.directory' must be a non-empty string"):
        start(directory="a\0b")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "store.json").write_text("[]")
    with pytest.raises(ValueError, match="store.json is damaged"):
        start()


def test_a_server_that_is_refused_ends_in_one_line(llama, tmp_path):
    options = ["--attention-backend", "deltamem", "--skip-tokenizer-init"]
    options += ["--additional-config", '{"deltamem": {"memroy": 512}}']
    with pytest.raises(RuntimeError, match="did not start"):
        VllmServer(llama, options, tmp_path / "log").start()
    log = (tmp_path / "log").read_text()
    assert log.splitlines()[-1].startswith("deltamem: Unknown deltamem setting 'memroy'; known settings: memory, ")
    assert "Traceback" not in log and "validation error" not in log


def test_what_vllm_itself_refuses_stays_as_it_is(llama):
    with pytest.raises(ValueError, match="1 validation error for"):
        vllm_config(llama, max_model_len=100_000)


def test_profile_of_another_model_refused(llama, tmp_path):
    import torch
    from transformers import LlamaConfig

    shape = {key: value for key, value in LLAMA.items() if key not in ("architectures", "model_type")}
    other = fingerprint_of(LlamaConfig(**shape | {"vocab_size": 512}))
    path = tmp_path / "other.safetensors"
    save(Profile(other, (0.15,), torch.ones(1, 4, 2), torch.zeros(4, 2, 3)), path)
    with pytest.raises(ValueError, match="made for another model: vocab_size is 512 in the profile and 384"):
        vllm_config(llama, {"profile": str(path)})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
         "does not support speculative decoding by ngram_gpu .*ngram is supported"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 15, "prompt_lookup_max": 2},
          "additional_config": {"deltamem": {"segment": 16, "memory": 512}}}, "no room for 15 that are drafted"),
        ({"pipeline_parallel_size": 2}, "does not support pipeline parallelism"),
        ({"ubatch_size": 2}, "does not support batches in halves"),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "does not support decode context"),
        ({"prefill_context_parallel_size": 2}, "does not support prefill context"),
        ({"kv_cache_dtype": "fp8"}, "does not support --kv-cache-dtype fp8"),
        ({"worker_extension_cls": "some.Extension"}, "does not support --worker-extension-cls"),
        ({"kv_offloading_size": 1.0}, "does not support --kv-offloading-size"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
         "does not support --kv-transfer-config"),
    ],
)  # fmt: skip
def test_features_refused(llama, options, message):
    with pytest.raises(ValueError, match=message):
        vllm_config(llama, **options)


def test_memory_that_is_mapped_anew_is_refused(llama, monkeypatch):
    """By vLLM, too, in words about a connector that nobody chose."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512,expandable_segments:True")
    with pytest.raises(ValueError, match="deltamem does not support PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"):
        vllm_config(llama)


@pytest.mark.parametrize(
    "config, feature",
    [
        (DEEPSEEK, "multi-head latent attention"),
        (MAMBA, "attention-free models"),
        (CHUNKED, "layers of chunked attention"),
        (GEMMA2, "soft-capped attention logits"),
        (SHARED, "layers that share a KV cache"),
        (GEMMA4 | {"per_layer_config": {"1": {"head_dim": 64}}}, "layers of one kind with unequal heads"),
        (LLAMA | {"model_type": "hrm_text", "architectures": ["HrmTextForCausalLM"]}, "prompts that are read in both"),
        (BLOOM, "ALiBi"),
        (FALCON, "ALiBi"),
    ],
)
def test_models_refused(tmp_path, config, feature):
    with pytest.raises(ValueError, match=f"deltamem does not support {feature}"):
        vllm_config(save_config(tmp_path, config))


def test_drafts_with_recurrent_layers_are_refused(tmp_path):
    drafting = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with pytest.raises(ValueError, match="does not support speculative decoding .* with recurrent layers"):
        vllm_config(save_config(tmp_path, JAMBA), speculative_config=drafting)


def test_a_model_whose_every_layer_slides_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Every layer of this model sees the last 64 tokens only"):
        vllm_config(save_config(tmp_path, MISTRAL))
    assert vllm_config(tmp_path, max_model_len=64), "where no window ever slides"


def test_unknown_vllm_refused(llama, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    with pytest.raises(ValueError, match="knows vLLM 0.32.x, this is 0.99.0"):
        vllm_config(llama)


@pytest.mark.parametrize("wanted", [True, False])
def test_prefix_caching_is_turned_off_with_one_warning(llama, caplog, wanted):
    with caplog.at_level(logging.WARNING, "vllm_deltamem"):
        config = vllm_config(llama, enable_prefix_caching=wanted)
    for made in (config, replace(config)):
        assert not made.cache_config.enable_prefix_caching
        assert made.kv_transfer_config.get_from_extra_config(CONTINUING, None) is wanted
    assert sum("prefix caching is off" in record.message for record in caplog.records) == wanted


@pytest.mark.parametrize("backend, blocks", [("DELTAMEM", 3), (None, 512)])
def test_graphs_are_profiled_on_one_slot(llama, backend, blocks):
    """As vLLM's GPU workers do before they size the cache, with a block for every sequence of a capture."""
    config = vllm_config(llama, attention_backend=backend, num_gpu_blocks_override=512)
    config.cache_config.kv_cache_layout, kind = "BLHNC", config.model_config
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=kind.get_head_size(), dtype=kind.dtype)
    groups = [KVCacheGroupSpec(["layer"], make_spec(spec, plan_memory(config)) if backend else spec)]
    assert kv_cache_utils.get_kv_cache_config_from_groups(config, groups, available_memory=0).num_blocks == blocks
    held = kv_cache_utils.get_kv_cache_config_from_groups(config, groups, available_memory=1 << 30)
    assert held.num_blocks == 512, "the user's number, where there is memory"


@pytest.mark.parametrize("fast, dtype, warns", [(False, "bfloat16", 1), (False, "float32", 0), (True, "bfloat16", 0)])
def test_a_cpu_slow_at_the_dtype_is_named(llama, monkeypatch, caplog, fast, dtype, warns):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    with caplog.at_level(logging.WARNING, "vllm_deltamem"):
        vllm_config(llama, dtype=dtype)
    assert sum("--dtype float32" in record.message for record in caplog.records) == warns * ON_CPU


def test_max_model_len_past_the_trained_context(llama, monkeypatch):
    """The model's tables must reach it; the trained length stays known, and is what the user says it is."""
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    text = vllm_config(llama, max_model_len=100_000).model_config.hf_text_config
    assert (text.max_position_embeddings, getattr(text, TRAINED)) == (100_000, 4096)
    for overrides, known in (({"max_position_embeddings": 100_000}, False), ({"max_position_embeddings": 9000}, True)):
        text = vllm_config(llama, max_model_len=100_000, hf_overrides=overrides).model_config.hf_text_config
        assert text.max_position_embeddings == 100_000 and hasattr(text, TRAINED) == known
    text = vllm_config(llama, max_model_len=100_000, attention_backend=None).model_config.hf_text_config
    assert text.max_position_embeddings == 4096


@pytest.mark.parametrize(
    "config, settings, message",
    [
        ({"rope_parameters": rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024)}, {},
         "past the 4096 tokens .* cannot continue them with a rotary embedding of type yarn"),
        ({"rope_parameters": rope(rope_type="dynamic", factor=2.0)}, {}, "past the 8192 tokens .* of type dynamic"),
        ({"rope_parameters": rope(rope_type="default", mrope_section=[4, 6, 6])}, {}, "a multimodal or Fourier"),
        ({"no_rope_layers": [1, 0, 1, 1]}, {}, "layers that have no rotary embedding"),
        ({}, {"memory": 9000, "window": 4000}, "a window and segments of 5024 tokens"),
    ],
)  # fmt: skip
def test_positions_that_cannot_be_continued_are_refused(tmp_path, monkeypatch, config, settings, message):
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    with pytest.raises(ValueError, match=message):
        vllm_config(save_config(tmp_path, **config), settings, max_model_len=20_000)


def test_scaled_positions_are_used_as_far_as_they_go(tmp_path):
    folder = save_config(tmp_path, rope_parameters=rope(rope_type="linear", factor=2.0))
    text = vllm_config(folder, max_model_len=8192).model_config.hf_text_config
    assert text.max_position_embeddings == 4096 and not hasattr(text, TRAINED)


def test_another_backend_is_left_alone(llama):
    config = vllm_config(llama, attention_backend=None, enable_prefix_caching=True)
    assert config.cache_config.enable_prefix_caching
    assert config.kv_transfer_config is None and not config.parallel_config.worker_extension_cls


def test_config_keeps_the_backend_in_a_spawned_process(llama, tmp_path):
    """A worker unpickles the config before it has loaded any plugin."""
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(vllm_config(llama, {"memory": 320})))
    code = (
        "import pickle, sys, vllm.config\n"
        "config = pickle.load(open(sys.argv[1], 'rb'))\n"
        "from vllm_deltamem.startup import is_chosen\n"
        "from vllm_deltamem.plan import plan_memory\n"
        "print(is_chosen(config), plan_memory(config).whole.slot_bytes <= 320 * 4 * 2 * 2 * 32 * 2)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-2:] == ["True", "True"]
