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

REPOSITORY = Path(__file__).parents[1]

# The engine stays in this process, so that the patch need not travel as a plugin of an installed package.
GENERATE = """
import json, sys
import ray
from vllm import LLM, SamplingParams
from vllm_deltamem.patches import ray_cpu

model, backend, executor, workers, output = sys.argv[1:]
ray_cpu.apply()
if executor == "ray":
    ray.init(num_cpus=int(workers), include_dashboard=False)
llm = LLM(model, distributed_executor_backend=executor, tensor_parallel_size=int(workers), enforce_eager=True,
          dtype="float32", max_model_len=512, max_num_seqs=4, kv_cache_memory_bytes=64 << 20,
          attention_backend=backend, additional_config={"deltamem": {"sessions": {"directory": model}}})
prompts = ["Once upon a time", "x", "The quick brown fox " * 20]
said = {}
def ask(prompts, **more):
    return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, **more))
first = ask(prompts)
said["answers"] = [answer.outputs[0].token_ids for answer in first]
if backend == "DELTAMEM":
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
def cpu_platform(monkeypatch):
    """The CPU platform and the Ray executor; what a test patches on them is undone after it."""
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
    return current_platform, ray_executor_v2


def test_apply_twice_is_apply_once(cpu_platform):
    platform, executor = cpu_platform
    ray_cpu.apply()
    once = executor.RayExecutorV2._get_actor_resource_kwargs
    ray_cpu.apply()
    assert platform.ray_device_key == "CPU"
    assert executor.RayExecutorV2._get_actor_resource_kwargs is once
    assert executor.RayWorkerProc.get_node_and_physical_gpu_ids is ray_cpu.node_without_device_ids


def test_import_changes_nothing():
    script = "import sys, vllm_deltamem.patches.ray_cpu; assert not {'vllm', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPOSITORY)


def test_unknown_vllm_is_refused(cpu_platform, monkeypatch):
    platform, _ = cpu_platform
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    with pytest.raises(ValueError, match="0.99.0"):
        ray_cpu.apply()
    assert platform.ray_device_key == ""


def generate(model: Path, backend: str, executor: str, workers: int) -> dict:
    """What a new engine answers to three prompts, of which one is longer than deltamem's memory, and in a session."""
    output = model / f"{executor}.json"
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-c", GENERATE, model, backend, executor, str(workers), output]
    subprocess.run(command, check=True, env=environment, timeout=400)
    return json.loads(output.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["CPU_ATTN", "DELTAMEM"])
def test_two_ray_workers_answer_as_one(backend, tmp_path):
    model = save_tiny_llama(tmp_path)
    alone, together = generate(model, backend, "uni", 1), generate(model, backend, "ray", 2)
    assert together == alone
    if backend == "DELTAMEM":
        again, anew = together["answers"][-2:]
        assert again == anew and together["reused"] > 400, "two workers have saved and restored their parts"
