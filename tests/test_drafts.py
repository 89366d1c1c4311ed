"""Speculative decoding from what was said before: answers and memories as of tokens computed one by one."""

import os
import random
from collections import Counter
from unittest.mock import patch

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch  # noqa: E402
from engines import engine, preempted, read_answers, save_model, session_of, tokens  # noqa: E402
from test_engine import SMALL, greedy  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402

from vllm_deltamem import memory, vacancies  # noqa: E402
from vllm_deltamem.metrics import DeltaMemStats  # noqa: E402

DRAFTED = 5
SPECULATIVE = {"method": "ngram", "num_speculative_tokens": DRAFTED, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
PARTED = {"memory": 80, "segment": 8, "window": 12, "pinned": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_model(tmp_path_factory.mktemp(family), family) for family in ("llama", "gemma3-mixed")}


def echo(length, seed=0):
    """A prompt that says a few tokens over and over, with others between: some drafts stay, some do not."""
    rng, said = random.Random(seed), tokens(7, seed)
    prompt = []
    while len(prompt) < length:
        prompt += said[: rng.randrange(2, 8)] + tokens(rng.randrange(3), len(prompt))
    return prompt[:length]


class Drafts:
    """How many tokens were drafted, and how many of them stayed."""

    def __init__(self):
        self.drafted = self.accepted = 0
        count = Scheduler.make_spec_decoding_stats

        def counted(scheduler, stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs):
            self.drafted += num_draft_tokens
            self.accepted += num_accepted_tokens
            return count(scheduler, stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)

        self.counting = patch.object(Scheduler, "make_spec_decoding_stats", counted)


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed"])
def test_a_slot_is_what_it_would_be_without_drafts(folders, family):
    """To the bit, with the answers: alone, among others, from a prompt that ends anywhere in a segment, preempted."""
    prompts, drafts = [echo(200 + 3 * i, i) for i in range(7)], Drafts()
    found = []
    for options in ({}, {"speculative_config": SPECULATIVE}):
        with drafts.counting, engine(folders[family], settings=SMALL, max_num_batched_tokens=100, **options) as llm:
            params, turns = (
                [greedy(count, logprobs=0, extra_args={"deltamem_session": f"{i}"}) for i in range(7)]
                for count in (60, 1)
            )
            asked = [{"prompt_token_ids": prompt} for prompt in prompts]
            outputs = llm.generate(asked, params, use_tqdm=False)
            later = [asked[i]["prompt_token_ids"] + output.outputs[0].token_ids for i, output in enumerate(outputs)]
            for i in range(7):  # over what was drafted in vain, which nobody looks at
                llm.generate([{"prompt_token_ids": later[i] + tokens(40)}], turns[i], use_tqdm=False)
            slabs = [session_of(llm, f"{i}") for i in range(7)]
            outputs += llm.generate(asked[:1], greedy(60, logprobs=0), use_tqdm=False)
            outputs.append(preempted(llm, prompts[1], greedy(60, logprobs=0), 9))
            found.append(([answer[:2] for answer in read_answers(outputs)], slabs))
    assert 0 < drafts.accepted < drafts.drafted
    (expected, slabs), (drafted, others) = found
    assert drafted == expected
    for slab, other in zip(slabs, others, strict=True):
        assert torch.equal(slab.tokens, other.tokens) and torch.equal(slab.slab, other.slab)


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed"])
def test_conversations_go_on_as_without_drafts(folders, family):
    """In slots and in parts, outgrown meanwhile; prompts of which one token is new are filled up with drafts."""
    rng, asked, drafts = random.Random(3), [], Drafts()
    talks = [echo(rng.randrange(5, 60), i) for i in range(6)]
    options = {"max_model_len": 2048, "max_num_seqs": 32, "num_gpu_blocks_override": 8 * 5 + 1}
    with patch.object(memory, "PART_TOKENS", 8), patch.object(vacancies, "LEAST", 8):
        speculative = {"speculative_config": SPECULATIVE, "enable_prefix_caching": True}
        with drafts.counting, engine(folders[family], settings=PARTED, **options, **speculative) as llm:
            for turn in range(8):
                chosen = rng.sample(range(6), rng.randrange(2, 6))
                for i in chosen:
                    talks[i] += echo(rng.choice([1, 1, 2, 9]), 10 * turn + i)
                names = [{"deltamem_session": f"{i}"} if i < 3 else None for i in chosen]
                params = [greedy(rng.randrange(1, 25), logprobs=0, extra_args=name) for name in names]
                outputs = llm.generate([{"prompt_token_ids": talks[i]} for i in chosen], params, use_tqdm=False)
                for i, asking, (*answer, _) in zip(chosen, params, read_answers(outputs), strict=True):
                    asked.append((list(talks[i]), asking.max_tokens, answer))
                    talks[i] += answer[0]
        with engine(folders[family], settings=PARTED, **options) as llm:
            params = [greedy(count, logprobs=0) for _, count, _ in asked]
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, *_ in asked], params, use_tqdm=False)
    assert 0 < drafts.accepted < drafts.drafted
    assert min(len(prompt) for prompt, *_ in asked) < 63 < max(len(prompt) for prompt, *_ in asked)
    assert [answer for *_, answer in asked] == [list(answer[:2]) for answer in read_answers(outputs)]


def test_the_only_slot_restores_a_session(folders):
    """vLLM would set a block aside for drafts while it loads."""
    with engine(folders["llama"], settings=SMALL, num_gpu_blocks_override=2, speculative_config=SPECULATIVE) as llm:
        talk, named = echo(200), greedy(10, extra_args={"deltamem_session": "talk"})
        (output,) = llm.generate([{"prompt_token_ids": talk}], named, use_tqdm=False)
        talk += list(output.outputs[0].token_ids) + tokens(20)
        llm.llm_engine.add_request("talk", {"prompt_token_ids": talk}, named)
        outputs = [output for _ in range(1000) for output in llm.llm_engine.step() if output.finished]
    assert [output.num_cached_tokens for output in outputs] == [209]


def test_drafts_that_stay_are_counted_when_they_are_the_last(folders):
    """No step follows that would count them; those that go never are."""
    counted, drafts = Counter(), Drafts()
    count = patch.object(DeltaMemStats, "count", lambda stats, name, amount: counted.update({name: amount}))
    with drafts.counting, count, engine(folders["llama"], settings=SMALL, speculative_config=SPECULATIVE) as llm:
        for length in range(20, 28):
            counted.clear()
            llm.generate([{"prompt_token_ids": echo(150)}], greedy(length, allowed_token_ids=[7]), use_tqdm=False)
            assert counted["tokens_written"] in (149 + length, 150 + length), "the last one may have been a draft"
    assert drafts.accepted > 8 * 10
