"""vLLM's V2 runner on a CUDA device: the memory as full attention, and CUDA graphs as eager steps."""

import os

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from tests.engines import STOCK, engine, save_model, tokens  # noqa: E402
from vllm_deltamem import memory  # noqa: E402

SMALL = {"memory": 96, "segment": 16, "window": 24, "pinned": 8}  # runs out of entries soon


def logprobs(folder, backend, settings, prompts, count, **options) -> list[torch.Tensor]:
    """Of the tokens of every prompt and of `count` more, decoded greedily by one engine for all."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=1, prompt_logprobs=1
    )
    with engine(folder, backend, "float32", settings, gpu_memory_utilization=0.3, **options) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        read = [row[token].logprob for row, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        made = [row[t].logprob for row, t in zip(completion.logprobs, completion.token_ids, strict=True)]
        found.append(torch.tensor(read + made))
    return found


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("family", ["llama", "qwen2-bias", "gemma3-mixed", "granite-hybrid"])
def test_memory_as_large_as_the_context_is_full_attention(tmp_path, family, eager):
    folder, prompts = save_model(tmp_path, family), [tokens(300), tokens(70, seed=1)]
    stock, ours = (
        logprobs(folder, backend, settings, prompts, 64, enforce_eager=eager)
        for backend, settings in ((STOCK, None), ("DELTAMEM", {"memory": 1200, "segment": 64, "fidelity": "bf16"}))
    )
    torch.testing.assert_close(torch.cat(ours), torch.cat(stock), atol=5e-4, rtol=0)


def test_graphs_and_merges_between_them_give_what_eager_steps_give(tmp_path):
    """Over several segments of decoding, with a memory that overflows, in a batch and alone."""
    folder, prompts = save_model(tmp_path, "llama"), [tokens(200), tokens(45, seed=1), tokens(7, seed=2)]
    eager = logprobs(folder, "DELTAMEM", SMALL, prompts, 80)
    graphs = logprobs(folder, "DELTAMEM", SMALL, prompts, 80, enforce_eager=False)
    (alone,) = logprobs(folder, "DELTAMEM", SMALL, prompts[:1], 80, enforce_eager=False)
    for some, others in (*zip(eager, graphs, strict=True), (graphs[0], alone)):
        torch.testing.assert_close(some, others, atol=2e-3, rtol=0)


@pytest.mark.parametrize("parts", [1, 5])
def test_a_long_request_and_32_mixed_ones_answer_as_each_alone(tmp_path, monkeypatch, parts):
    """Prompts of one token to many segments, read in pieces, more of them than slots. Alone they are served eagerly.

    Slots have parts, too, of 16 tokens, which up to 79 lie in, and which others are moved from.
    """
    folder = save_model(tmp_path, "llama")
    if parts > 1:
        monkeypatch.setattr(memory, "PART_TOKENS", 16)
    prompts = [tokens(1900, seed=99), *(tokens(1 + 47 * i % 590, seed=i) for i in range(32))]
    shape = dict(max_model_len=2048, max_num_batched_tokens=300)
    few = {"enforce_eager": False, "num_gpu_blocks_override": 4 * parts + 1}
    together = logprobs(folder, "DELTAMEM", SMALL, prompts, 40, **shape, **few)
    alone = [logprobs(folder, "DELTAMEM", SMALL, [prompt], 40, **shape)[0] for prompt in prompts[::8]]
    for some, others in zip(together[::8], alone, strict=True):
        torch.testing.assert_close(some, others, atol=2e-3, rtol=0)
