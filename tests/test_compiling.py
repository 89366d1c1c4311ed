"""A second start of a compiled model on the CPU, in processes of their own."""

import os
import subprocess
import sys

import pytest
import torch
from engines import save_model

from vllm_deltamem.patches import cpu_compiling

if torch.cuda.is_available():
    pytest.skip("vLLM's CPU build alone cannot load what it has compiled", allow_module_level=True)

START = """
import sys
from torch._dynamo.utils import counters
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], attention_backend="DELTAMEM", skip_tokenizer_init=True, max_model_len=256, max_num_seqs=2)
prompt = {"prompt_token_ids": list(range(5, 205))}
said = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=20, detokenize=False), use_tqdm=False)
print("from the cache:", counters["inductor"]["fxgraph_cache_hit"], *said[0].outputs[0].token_ids)
"""


def start(model, folder, **environment) -> subprocess.CompletedProcess:
    own = {"VLLM_CACHE_ROOT": f"{folder}/vllm", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | environment
    return subprocess.run([sys.executable, "-c", START, model], capture_output=True, text=True, env=os.environ | own)


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "1")
    cpu_compiling.apply()
    assert os.environ["VLLM_USE_AOT_COMPILE"] == "1"
    monkeypatch.delenv("VLLM_USE_AOT_COMPILE")
    cpu_compiling.apply()
    assert os.environ["VLLM_USE_AOT_COMPILE"] == "0"


@pytest.mark.slow
def test_a_second_start_does_not_compile_again(tmp_path):
    model = save_model(tmp_path / "model", "llama")
    first, second = start(model, tmp_path), start(model, tmp_path)
    said = [done.stdout.rpartition("from the cache: ")[2].split() for done in (first, second)]
    assert said[0][0] == "0" and int(said[1][0]) > 0, first.stderr + second.stderr
    assert said[0][1:] == said[1][1:] and len(said[0]) == 21


@pytest.mark.slow
def test_the_patch_is_still_needed(tmp_path):
    model = save_model(tmp_path / "model", "llama")
    _, second = (start(model, tmp_path, VLLM_USE_AOT_COMPILE="1") for _ in range(2))
    assert "Compiling model again due to a load failure" in second.stdout + second.stderr
