"""Tiny random models of every family, and in-process vLLM engines on them, for tests."""

import gc
import threading
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock, patch

import pytest
import torch

STOCK = "TRITON_ATTN" if torch.cuda.is_available() else "CPU_ATTN"  # vLLM's own backend that takes fp32
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 512}  # fmt: skip
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
SHAPE = dict(vocab_size=384, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, initializer_range=0.15,
             bos_token_id=None, eos_token_id=1, pad_token_id=0)  # fmt: skip
FAMILIES = {  # name: (transformers model type, what its config adds)
    "llama": ("llama", {}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-wide": ("llama", {"hidden_size": 1536, "intermediate_size": 1536, "initializer_range": 0.05}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2-bias": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen3-norms": ("qwen3", {}),
    "cohere": ("cohere", {}),  # interleaved RoPE
    "glm": ("glm", {}),  # of half the dimensions, interleaved; Transformers' own modules in vLLM
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),  # none in the second layer; Transformers' own modules
}
MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
SLIDING = {"num_hidden_layers": len(MIXED), "layer_types": MIXED, "sliding_window": 48}
FAMILIES |= {  # a window of 48 tokens in some layers
    "gemma3-mixed": ("gemma3_text", SLIDING | {"tie_word_embeddings": True}),  # two ropes
    "mistral-mixed": ("mistral", SLIDING),
    "cohere2-mixed": ("cohere2", SLIDING),  # no RoPE in full layers; windows count the tokens before the query
    "exaone4-mixed": ("exaone4", SLIDING),  # no RoPE in full layers
    "gemma4-mixed": (
        "gemma4_text",
        SLIDING
        | {
            "hidden_size_per_layer_input": 0,
            "tie_word_embeddings": True,
            "per_layer_config": {i: {"head_dim": 64, "num_key_value_heads": 1} for i in (2, 4)},
        },
    ),
    "gpt-oss-mixed": ("gpt_oss", {"num_hidden_layers": 4, "sliding_window": 48, "num_local_experts": 4}),  # sink logits
    "qwen3-mixed": ("qwen3", SLIDING | {"use_sliding_window": True}),
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
FAMILIES |= {  # recurrent layers
    "granite-hybrid": (
        "granitemoehybrid",
        MAMBA
        | {
            "num_hidden_layers": 5,
            "layer_types": ["mamba", "attention", "mamba", "attention", "mamba"],
            "num_local_experts": 0,
            "shared_intermediate_size": 192,
            "position_embedding_type": "rope",
        },
    ),
    "falcon-h1": ("falcon_h1", MAMBA | {"mamba_d_ssm": 256}),  # each of which attends, too
    "nemotron-h": (  # no RoPE
        "nemotron_h",
        {
            "num_hidden_layers": 6,
            "layers_block_type": ["mamba", "attention", "mlp"] * 2,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
    ),
}
OPTIONS = {"qwen3-mixed": {"model_impl": "transformers"}}  # vLLM's own Qwen has no mixed layers


def save_model(folder, family: str, **others):
    """Write a Hugging Face folder of a family, with random weights, the same every time; others: of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SHAPE | extra | others)))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, std=1.0)
    model.save_pretrained(folder)
    return folder


@contextmanager
def engine(folder, backend="DELTAMEM", dtype="bfloat16", settings=None, **options):
    """An LLM in this process (needs VLLM_ENABLE_V1_MULTIPROCESSING=0), gone when the block ends."""
    from vllm import LLM
    from vllm.model_executor.models.transformers.base import Base

    from vllm_deltamem.patches import cpu_numba

    cpu_numba.apply()  # vLLM's own backend may follow tests that have loaded Numba
    gc.freeze()  # vLLM collects garbage eight times, and would look through all modules each time
    if backend == "DELTAMEM":
        options["additional_config"] = {"deltamem": settings or {}}
    options = {"max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": True} | options
    options = {"enable_prefix_caching": False} | options  # prompts are computed, whatever was asked before
    # vLLM changes Transformers' classes for torch.compile, and whoever makes such a model later could not.
    unchanged = patch.object(Base, "_decorate_cls_for_torch_compile") if options["enforce_eager"] else nullcontext()
    with unchanged:
        llm = LLM(
            str(folder),
            attention_backend=backend,
            dtype=dtype,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            **options,
        )
    try:
        yield llm
    finally:
        with patch.object(gc, "unfreeze"):
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.unfreeze()
        gc.collect()


@contextmanager
def ahead():
    """Engines made inside schedule every step before the results of the one before are known, as on GPUs by default.

    vLLM's CPU platform turns that off. Its runner can do it: only streams and events have to be stood in for.
    """
    if torch.cuda.is_available():
        yield
        return
    from vllm.platforms.cpu import CpuPlatform

    settle = CpuPlatform.check_and_update_config

    def schedule_ahead(vllm_config):
        settle(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    names = ("Stream", "Event", "stream", "current_stream")
    with (
        patch.object(CpuPlatform, "check_and_update_config", staticmethod(schedule_ahead)),
        patch.multiple("torch.cuda", **{name: MagicMock() for name in names}),
    ):
        yield


def preempted(llm, prompt: list[int], params, after: int):
    """vLLM's output of a request that is preempted once, after so many steps."""
    core = llm.llm_engine
    core.add_request("preempted", {"prompt_token_ids": prompt}, params)
    for _ in range(after):
        core.step()
    scheduler = core.engine_core.engine_core.scheduler
    assert scheduler.running
    scheduler.reset_prefix_cache(reset_running_requests=True)
    assert not scheduler.running, "the request must have been preempted"
    finished = []
    while core.has_unfinished_requests():
        finished += [o for o in core.step() if o.finished]
    return finished[0]


def session_of(llm, name: str):
    """A session of an engine in this process, once it is saved."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from vllm_deltamem.enginestore import open_store
    from vllm_deltamem.sessionname import tenant_of

    get_kv_transfer_group().worker.carrier.finish()
    return open_store(llm.llm_engine.vllm_config, 0).restore(tenant_of(None), name)


@contextmanager
def gated(kind):
    """What the carrier's threads do of a kind waits until the event is set."""
    gate, run = threading.Event(), kind.run
    with patch.object(kind, "run", lambda self, store: gate.wait(60) and run(self, store)):
        try:
            yield gate
        finally:
            gate.set()


STEPS = pytest.mark.parametrize("steps", [nullcontext, ahead], ids=["one by one", "ahead"])


def read_answers(outputs) -> list[tuple[list[int], list[float], int]]:
    """The answers that LLM.generate returned, their log-probabilities, and how much of each prompt was not computed."""
    answers = []
    for out in outputs:
        (answer,) = out.outputs
        chosen = [row[token].logprob for row, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        answers.append((list(answer.token_ids), chosen, out.num_cached_tokens))
    return answers


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 384, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
