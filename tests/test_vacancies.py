"""Prompts that go on in a slot as an earlier sequence left it: answered as if all of it had been computed."""

import os
import random
from itertools import product

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from engines import STEPS, ahead, engine, read_answers, save_model, tokens  # noqa: E402
from test_engine import SMALL, greedy  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


def serving(folder, slots=8, **options):
    """An engine with prefix caching on, as vLLM has it by default."""
    options = {"enable_prefix_caching": True, "num_gpu_blocks_override": slots + 1} | options
    return engine(folder, settings=SMALL, **options)


def ask(llm, *prompts, count=20, salt=None, **asked):
    """Of every prompt the answer with its log-probabilities, and how many tokens were not computed."""
    params, salted = greedy(count, **{"logprobs": 0} | asked), {"cache_salt": salt} if salt else {}
    outputs = llm.generate([{"prompt_token_ids": p} | salted for p in prompts], params, use_tqdm=False)
    return [((answer, chosen), cached) for answer, chosen, cached in read_answers(outputs)]


def reused(llm, prompt, **asked):
    """Tokens of a prompt that were not computed."""
    return ask(llm, prompt, **asked)[0][1]


def check(folder, asked, count=20, **params):
    """That prompts were answered, to the bit, as by an engine that computes everything: (prompt, answer) each."""
    prompts, answers = zip(*asked, strict=True)
    with engine(folder, settings=SMALL) as llm:
        assert [answer for answer, _ in ask(llm, *prompts, count=count, **params)] == list(answers)


def test_a_conversation_goes_on_in_its_slot(folder):
    talk, known, asked = tokens(200), 0, []
    with serving(folder) as llm:
        for turn in range(4):
            ((answer, found),) = ask(llm, talk)
            assert found == known
            asked.append((talk, answer))
            talk, known = talk + answer[0], len(talk) + 19  # what was sampled last has not been read
            talk += tokens(30, seed=turn + 1)
    check(folder, asked)


def test_a_prompt_may_tell_the_answer_otherwise(folder):
    """Of 200 tokens 8 are in the open segment: a slot goes back to it, or a copy from before the answer left it."""
    prompt, asked = tokens(200), []
    with serving(folder) as llm:
        for count, keep in product((5, 60), (2, 0)):
            if keep:
                llm.reset_prefix_cache()
            ask(llm, prompt, count=count)
            ((answer, _),) = ask(llm, prompt, count=count)
            told = prompt + answer[0][:keep] + tokens(30, seed=1 + keep)
            ((again, found),) = ask(llm, told)
            assert found == 200 + keep
            asked.append((told, again))
    check(folder, asked)


@STEPS
def test_a_stop_token_ends_what_is_known(folder, steps):
    """It is in the next prompt, but only a step ahead has read it."""
    with engine(folder, settings=SMALL) as llm:
        answer = ask(llm, tokens(200))[0][0][0]
    at = answer.index(answer[9])  # it may have come before
    with steps(), serving(folder) as llm:
        stopped = ask(llm, tokens(200), stop_token_ids=[answer[9]])[0][0][0]
        assert stopped == answer[: at + 1]
        prompt = tokens(200) + stopped + tokens(30, seed=1)
        ((found, known),) = ask(llm, prompt)
        assert known == 200 + at + (steps is ahead)
    check(folder, [(prompt, found)])


def test_whatever_else_a_memory_depends_on_must_agree(folder):
    pinned = {"extra_args": {"deltamem_pin_tokens": [20, 23]}}
    prompt, longer = tokens(200), tokens(200) + tokens(30, seed=1)
    with serving(folder) as llm:
        for first, then, known in (
            ({}, {}, 199),
            (pinned, {}, 0),
            ({}, pinned, 0),
            (pinned, pinned, 199),
            ({"salt": "ours"}, {"salt": "ours"}, 199),
            ({"salt": "ours"}, {"salt": "theirs"}, 0),
            ({"salt": "ours"}, {}, 0),
            ({}, {"prompt_logprobs": 0}, 0),
            ({}, {"extra_args": {"deltamem_session": "talk"}}, 0),
            ({"extra_args": {"deltamem_session": "other"}}, {}, 0),
        ):
            llm.reset_prefix_cache()
            assert not reused(llm, prompt, **first), "what was there before is forgotten"
            assert reused(llm, prompt, **then) == known, (first, then)
        llm.reset_prefix_cache()
        assert [reused(llm, prompt), reused(llm, longer), reused(llm, prompt)] == [0, 200, 0]
    with serving(folder, enable_prefix_caching=False) as llm:
        assert [reused(llm, prompt), reused(llm, prompt)] == [0, 0]


def test_pins_past_the_end_of_what_is_left_are_gone(folder):
    """They may lie in the open segment, to which a slot goes back."""
    prompt, asked = tokens(206), tokens(203) + tokens(60, seed=1)
    with serving(folder) as llm:
        ask(llm, prompt, count=1, extra_args={"deltamem_pin_tokens": [203, 206]})
        ((found, known),) = ask(llm, asked)
        assert known == 203
    check(folder, [(asked, found)])


@STEPS
def test_many_conversations_in_few_slots(folder, steps):
    """Three at a time of eight, in six slots, prompts in pieces; some answers lack their beginning when sent back."""
    stops = {"stop_token_ids": [*range(7, 384, 40)]}
    rng, talks, asked, known = random.Random(5), [tokens(60 + 9 * i, seed=i) for i in range(8)], [], 0
    with steps(), serving(folder, slots=6, max_num_seqs=3, max_num_batched_tokens=64) as llm:
        for turn in range(9):
            some = rng.sample(range(8), 4)
            for i, (answer, found) in zip(some, ask(llm, *(talks[i] for i in some), count=25, **stops), strict=True):
                asked.append((talks[i], answer))
                known += found
                kept = answer[0][rng.choice([0, 0, 3, 20]) :]
                talks[i] = talks[i] + kept + tokens(rng.randrange(1, 40), seed=100 * turn + i)
    assert known > sum(len(prompt) for prompt, _ in asked) / 8, "how much is left depends on what the model says"
    check(folder, asked, count=25, **stops)
