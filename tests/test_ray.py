"""The patch for Ray on the CPU platform, and tensor-parallel workers that run on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("ray")

from benchmarks.tiny_llama import save_tiny_llama
from vllm_deltamem.patches import ray_cpu
from vllm_deltamem.startup import apply_patches

REPOSITORY = Path(__file__).parents[1]

GENERATE = """
import json, sys
import ray
from vllm import LLM, SamplingParams
model, executor, workers, output = sys.argv[1:]
if executor == "ray":
    ray.init(num_cpus=int(workers), include_dashboard=False)
llm = LLM(model, distributed_executor_backend=executor, tensor_parallel_size=int(workers), enforce_eager=True,
          dtype="float32", max_model_len=512, max_num_seqs=4, kv_cache_memory_bytes=64 << 20,
          attention_backend="DELTAMEM", additional_config={"deltamem": {"sessions": {"directory": model}}})
prompts = ["Once upon a time", "x", "The quick brown fox " * 20]
said = {}
def ask(prompts, **more):
    return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, **more))
first = ask(prompts)
said["answers"] = [answer.outputs[0].token_ids for answer in first]
session = {"deltamem_session": "kept"}
told = first[2].prompt_token_ids
(turn,) = ask([{"prompt_token_ids": told}], extra_args=session)
longer = [{"prompt_token_ids": [*told, *turn.outputs[0].token_ids, *told[:20]]}]
(again,), (anew,) = ask(longer, extra_args=session), ask(longer)
said["reused"] = again.num_cached_tokens
said["answers"] += [again.outputs[0].token_ids, anew.outputs[0].token_ids]
with open(output, "w") as file:
    json.dump(said, file)
"""


@pytest.fixture
def platform(monkeypatch):
    """The CPU platform; what a test patches on it and on the Ray executor is undone after it."""
    from vllm.platforms import current_platform
    from vllm.v1.executor import ray_executor_v2

    if not current_platform.is_cpu():
        pytest.skip("the patch is for vLLM's CPU platform")
    monkeypatch.setattr(type(current_platform), "ray_device_key", "")
    for owner, name in (
        (ray_executor_v2.RayWorkerProc, "get_node_and_physical_gpu_ids"),
        (ray_executor_v2.RayExecutorV2, "_get_actor_resource_kwargs"),
    ):
        monkeypatch.setattr(owner, name, vars(owner)[name])
    return current_platform


def test_choosing_the_backend_lets_ray_start_workers(platform):
    """Who asks for the resource's name is about to: the executor is patched by then."""
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc

    apply_patches()
    assert platform.ray_device_key == "CPU" and platform.ray_device_key == "CPU"
    assert RayExecutorV2._get_actor_resource_kwargs() == {"num_gpus": 0}
    assert RayWorkerProc.get_node_and_physical_gpu_ids is ray_cpu.node_without_device_ids


def test_ray_is_loaded_only_when_asked_for():
    script = """
import sys
from vllm_deltamem.patches import ray_cpu
ray_cpu.apply()
assert "vllm.v1.executor.ray_executor_v2" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPOSITORY)


def generate(model: Path, executor: str, workers: int) -> dict:
    """What a new engine answers to three prompts, of which one is longer than deltamem's memory, and in a session."""
    output = model / f"{executor}.json"
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-c", GENERATE, model, executor, str(workers), output]
    subprocess.run(command, check=True, env=environment, timeout=400)
    return json.loads(output.read_text())


@pytest.mark.slow
def test_two_ray_workers_answer_as_one(tmp_path):
    model = save_tiny_llama(tmp_path)
    alone, together = generate(model, "uni", 1), generate(model, "ray", 2)
    assert together == alone
    again, anew = together["answers"][-2:]
    assert again == anew and together["reused"] > 400, "two workers have saved and restored their parts"
