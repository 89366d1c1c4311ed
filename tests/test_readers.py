"""Prompts that start from a copy of the slot of a request under way: answered as if all of it had been computed."""

import os
from types import SimpleNamespace
from unittest.mock import patch

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from engines import STEPS, engine, save_model, tokens  # noqa: E402
from test_engine import SMALL, greedy  # noqa: E402
from test_vacancies import ask, check, serving  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

from vllm_deltamem.readers import Readers  # noqa: E402
from vllm_deltamem.transfers import Prompt  # noqa: E402
from vllm_deltamem.vacancies import Kind  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


def samples(llm, prompt, n):
    from vllm import SamplingParams

    params = SamplingParams(n=n, temperature=1, seed=7, max_tokens=40, ignore_eos=True, detokenize=False)
    (out,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return [list(sample.token_ids) for sample in out.outputs]


@STEPS
def test_samples_of_a_request_read_its_prompt_once(folder, steps):
    prompt = tokens(200)
    with engine(folder, settings=SMALL) as llm:
        expected = samples(llm, prompt, 5)
    with steps(), serving(folder, slots=6, max_num_seqs=3, max_num_batched_tokens=64) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector.scheduler
        with patch.object(scheduler, "claim", wraps=scheduler.claim) as claims:
            assert samples(llm, prompt, 5) == expected and len(set(map(tuple, expected))) > 1
        known = [call.args[1] for call in claims.call_args_list]
        assert known[:3] == [0, 199, 199], "of the prompt, three at a time"
        assert min(known[3:]) >= 192, "from what these have left"


@STEPS
@pytest.mark.parametrize("chunk", [64, 1024])
def test_prompts_that_differ_in_their_end(folder, steps, chunk):
    """Alike in 192 tokens; others in 150, or wholly, but with no segment open at their end."""
    base = tokens(240)
    prompts = [base[:200], base[:195] + tokens(9, seed=1), base[:192] + tokens(5, seed=2), base[:208]]
    prompts += [base[:150] + tokens(50, seed=3), *[tokens(96, seed=4)] * 2, tokens(10, seed=5)]
    with steps(), serving(folder, max_num_batched_tokens=chunk) as llm:
        found = ask(llm, *prompts, count=40)
    *known, before, last = [known for _, known in found]
    assert known == [0, 195, 192, 200, 0, 0] and last == 0
    assert (before > 0) == (chunk < 96), "what was read before the last chunk"
    check(folder, [(prompt, answer) for prompt, (answer, _) in zip(prompts, found, strict=True)], count=40)


def test_pins_must_agree(folder):
    def pinned(*span):
        return {"deltamem_pin_tokens": list(span)}

    prompt, asked = tokens(200), [None, pinned(20, 23), pinned(20, 23), pinned(190, 195), None]
    with serving(folder) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt}] * len(asked),
            [greedy(40, logprobs=0, extra_args=extra) for extra in asked],
            use_tqdm=False,
        )
    assert [out.num_cached_tokens for out in outputs] == [0, 0, 199, 0, 199]
    check_tokens(folder, prompt, outputs, asked)


def check_tokens(folder, prompt, outputs, asked):
    """That they are what an engine answers that computes everything."""
    with engine(folder, settings=SMALL) as llm:
        for out, extra in zip(outputs, asked, strict=True):
            (((answer, _), _),) = ask(llm, prompt, count=40, extra_args=extra)
            assert list(out.outputs[0].token_ids) == answer


@STEPS
@pytest.mark.parametrize("end", ["aborted", "preempted"])
def test_whoever_reads_may_end(folder, steps, end):
    """In the middle of the prompt: another one reads it."""
    prompt = tokens(200)
    with steps(), serving(folder, max_num_batched_tokens=64) as llm:
        core = llm.llm_engine
        for name in "abc":
            core.add_request(name, {"prompt_token_ids": prompt}, greedy(40))
        core.step(), core.step()
        scheduler = core.engine_core.engine_core.scheduler
        assert [request.request_id[0] for request in scheduler.running] == ["a"], "the others wait"
        if end == "aborted":
            core.abort_request(["a"])
        else:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        found = {}
        while core.has_unfinished_requests():
            found |= {out.request_id: out for out in core.step() if out.finished}
    assert found.keys() == ({"b", "c"} if end == "aborted" else {"a", "b", "c"})
    check_tokens(folder, prompt, found.values(), [None] * len(found))


def test_only_a_slot_that_can_be_taken_back_is_copied():
    """Segments of 16: 200 tokens are read, then the answer grows out of its segment."""

    def request(name, status=RequestStatus.WAITING):
        prompt = tokens(200)
        return SimpleNamespace(
            request_id=name,
            prompt_token_ids=prompt,
            all_token_ids=prompt,
            num_tokens=200,
            num_prompt_tokens=200,
            num_computed_tokens=0,
            status=status,
        )

    readers, kind = Readers(16, chunk=64), Kind([], None, short=False)
    first, second = request("first", RequestStatus.RUNNING), request("second")
    for one in (first, second):
        readers.add(one, Prompt(one.prompt_token_ids), kind)
    for read, expected in (
        (0, ("first", 0)),
        (192, ("first", 0)),
        (200, ("first", 199)),
        (207, ("first", 199)),
        (208, (None, 0)),
    ):
        first.num_computed_tokens = read
        assert readers.find(second) == expected
    first.num_prompt_tokens = first.num_tokens = 208  # the longer one ends with a segment
    for read, expected in ((0, ("first", 0)), (128, ("first", 0)), (144, ("first", 144)), (200, ("first", 199))):
        first.num_computed_tokens = read
        assert readers.find(second) == expected
    first.num_computed_tokens, first.status = 200, RequestStatus.PREEMPTED
    assert readers.find(second) == (None, 0) == readers.find(first)
    readers.remove("first"), readers.remove("second"), readers.remove("never there")
    assert not readers._alike
