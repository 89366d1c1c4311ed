"""Folders that hold a config.json alone: enough for vLLM's config, no weights."""

import json

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
DEEPSEEK = LLAMA | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
JAMBA = LLAMA | {
    "architectures": ["JambaForCausalLM"],
    "model_type": "jamba",
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 1,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64}
CHUNKED = LLAMA | {"layer_types": ["chunked_attention"] * 3 + ["full_attention"]}
MIXED = LLAMA | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 64}
GEMMA2 = MIXED | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "head_dim": 32,
    "attn_logit_softcapping": 50.0,
}
SHARED = MIXED | {
    "architectures": ["Gemma3nForCausalLM"],
    "model_type": "gemma3n_text",
    "head_dim": 32,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.0] * 4,
}
GEMMA4 = MIXED | {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "head_dim": 32,
    "per_layer_config": {"3": {"head_dim": 64, "num_key_value_heads": 1}},
}
BLOOM = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "vocab_size": 384,
    "hidden_size": 128,
    "n_layer": 2,
    "n_head": 4,
    "seq_length": 512,
}
FALCON = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "vocab_size": 384,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "alibi": True,
}
MAMBA = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "vocab_size": 384,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "state_size": 16,
}


def save_config(folder, config=LLAMA, **changes):
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def vllm_config(folder, settings=None, **options):
    """What vLLM makes of it with the backend chosen. Raises what start-up raises."""
    from vllm.engine.arg_utils import EngineArgs

    options = {"attention_backend": "DELTAMEM", "skip_tokenizer_init": True} | options
    additional = {"additional_config": {"deltamem": settings or {}}}
    return EngineArgs(model=str(folder), **(additional | options)).create_engine_config()
