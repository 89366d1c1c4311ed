"""Serving as on a GPU (card.py): what goes on in slots and sessions is answered as where all of it is computed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from tests.engines import engine, read_answers, save_model
from vllm_deltamem import memory

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has the card itself")
SHAPE = {"vocab_size": 8192, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
SETTINGS = {"memory": 56, "segment": 16, "window": 8, "pinned": 0, "fidelity": "k8v8"}  # merges after 48 tokens
PARTS = 3  # of a slot, of 16 tokens each
STOPS = [*range(0, 8192, 5)]  # one token in five ends an answer
SESSION = {"extra_args": {"deltamem_session": "talk"}}


def tokens(count: int, seed: int) -> list[int]:
    """All of them different: keys of the same token are as near to a third one, and rounding would tell them apart."""
    return random.Random(seed).sample(range(2, SHAPE["vocab_size"]), count)


def ask(llm, *requests) -> list[tuple[list[int], list[int], list[float], int]]:
    """Of every (prompt, what is asked) the prompt, its answer with log-probabilities, and how much was not computed."""
    from vllm import SamplingParams

    common = {"temperature": 0, "detokenize": False, "logprobs": 0}
    prompts, params = zip(*((p, SamplingParams(**(common | asked))) for p, asked in requests), strict=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], list(params), use_tqdm=False)
    return [(prompt, *answer) for prompt, answer in zip(prompts, read_answers(outputs), strict=True)]


def abort(llm, prompt: list[int]) -> None:
    """Break an answer off while steps are under way."""
    from vllm import SamplingParams

    core = llm.llm_engine
    core.add_request("broken", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=50, detokenize=False))
    for _ in range(7):
        core.step()
    core.abort_request(["broken"])


def divide(parts: int) -> None:
    """Have slots be divided, where it is several parts."""
    memory.PART_TOKENS = memory.PART_TOKENS if parts == 1 else 16


def talk(folder: str, parts: int) -> dict:
    """Conversations in few slots, prompts in pieces. Takes a process of its own."""
    from tests.card import Graph, card, compiled
    from vllm_deltamem import beginnings, vacancies

    beginnings.LEAST, vacancies.LEAST = 32, 8
    divide(parts)
    options = {"enforce_eager": False, "enable_prefix_caching": True, "gpu_memory_utilization": 0.1}
    options |= {"max_num_seqs": 4, "max_num_batched_tokens": 40, "num_gpu_blocks_override": 6 * parts + 1}
    fixed, stopping = {"max_tokens": 12, "ignore_eos": True}, {"max_tokens": 12, "stop_token_ids": STOPS}
    with card(), engine(folder, dtype="float32", settings=SETTINGS, **options) as llm:
        reserved, ready = scratch(), set(compiled)
        first = ask(llm, (tokens(60, 0), fixed), (tokens(9, 1), stopping), (tokens(7, 2), fixed | SESSION))
        abort(llm, tokens(20, 3))
        (long, told, _, _), (stopped, whole, _, _), (named, said, _, _) = first
        second = ask(
            llm,
            (long + [told[0] ^ 1, *told[1:]] + tokens(5, 4), fixed),
            (stopped + whole + tokens(5, 5), stopping),
            (named + said + tokens(5, 6), fixed | SESSION),
        )
        alike = tokens(73, 7)
        third = ask(llm, (alike[:61], fixed), (alike[:36] + alike[61:], fixed), (alike[:61], fixed))
        outgrowing = ask(llm, (tokens(40, 8), fixed), (tokens(37, 9), fixed), (tokens(60, 10), fixed))
        made = llm.llm_engine.engine_core.engine_core.scheduler.connector.scheduler.plan.parts
    return {
        "asked": first + second + third + outgrowing,
        "parts": made,
        "replays": Graph.replays,
        "scratch": [reserved, scratch()],
        "late": sorted(map(str, compiled - ready)),
    }


def scratch() -> dict[str, int]:
    """Where the buffers of the kernels lie, and how many have been outgrown."""
    from vllm_deltamem.kernels import launch

    return {str(key): held.data_ptr() for key, held in launch._buffers.items()} | {"": len(launch._outgrown)}


@pytest.mark.parametrize(
    "family, shape, parts, shared",
    [
        ("llama", SHAPE, 1, [0, 32, 60]),
        ("llama", SHAPE, PARTS, [0, 32, 60]),
        # No beginning is kept.
        pytest.param("granite-hybrid", {"vocab_size": 8192}, 1, [0, 0, 0], marks=pytest.mark.slow),
    ],
)
def test_serving_as_on_a_gpu(tmp_path, monkeypatch, family, shape, parts, shared):
    monkeypatch.setattr(memory, "PART_TOKENS", memory.PART_TOKENS)
    folder, found = save_model(tmp_path / family, family, **shape), tmp_path / "found"
    command = [sys.executable, "-m", "tests.test_card", str(folder), str(found), str(parts)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(found.read_text())
    assert said["replays"] > 15
    profiled, served = said["scratch"]
    assert len(profiled) > 20 and served == profiled, "vLLM has counted all scratch before it sized its cache"
    assert said["late"] == [], "no request waits for Triton"
    first, second, third = (said["asked"][i : i + 3] for i in (0, 3, 6))
    known = [len(prompt) + len(answer) for prompt, answer, _, _ in first]
    assert [cached for *_, cached in first] == [0, 0, 0]
    assert [cached for *_, cached in second] == [60, known[1], known[2] - 1]  # a stop token has been read
    assert [cached for *_, cached in third] == shared
    assert said["parts"] == parts
    divide(parts)
    with engine(folder, dtype="float32", settings=SETTINGS) as llm:
        for i, (prompt, answer, chosen, _) in enumerate(said["asked"]):
            named = {"extra_args": {"deltamem_session": str(i)}} if i in (2, 5) else {}  # which holds a whole slot
            ((_, same, there, _),) = ask(llm, (prompt, {"max_tokens": len(answer), "ignore_eos": True} | named))
            assert same == answer
            assert max(abs(x - y) for x, y in zip(chosen, there, strict=True)) < 1e-4


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(talk(sys.argv[1], int(sys.argv[3]))))
