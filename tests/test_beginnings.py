"""Prompts that begin as others did and part from them: what they share is read twice, and then kept."""

import os
import random

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from engines import STEPS, save_model, tokens  # noqa: E402
from test_vacancies import ask, check, reused, serving  # noqa: E402

from vllm_deltamem import beginnings  # noqa: E402
from vllm_deltamem.beginnings import Beginnings  # noqa: E402
from vllm_deltamem.transfers import Prompt  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(beginnings, "LEAST", 32)


@STEPS
@pytest.mark.parametrize("chunk", [50, 64, 1024])
def test_the_third_prompt_starts_where_the_first_two_part(folder, steps, chunk):
    """Alike in 150 tokens, of which 144 are whole segments; prompts of other lengths are read beside some."""
    system, asked = tokens(150), []
    with steps(), serving(folder, max_num_batched_tokens=chunk) as llm:
        for seed, known in ((1, 0), (2, 0), (3, 144), (4, 144), (5, 144)):
            prompts = [system + tokens(40 + 11 * seed, seed=seed)]
            prompts += [tokens(20 + seed, seed=10 + seed)] * (seed % 2)
            found = ask(llm, *prompts, count=30)
            assert found[0][1] == known
            asked += zip(prompts, [answer for answer, _ in found], strict=True)
    check(folder, asked, count=30)


@STEPS
@pytest.mark.parametrize("chunk", [64, 1024])
def test_of_prompts_at_once_one_reads_for_all(folder, steps, chunk):
    prompts = [tokens(150) + tokens(40 + 10 * seed, seed=seed) for seed in range(1, 6)] + [tokens(40, seed=6)]
    with steps(), serving(folder, max_num_batched_tokens=chunk) as llm:
        found = ask(llm, *prompts, count=30)
        assert [known for _, known in found] == [0, 144, 144, 144, 144, 0]
    check(folder, list(zip(prompts, [answer for answer, _ in found], strict=True)), count=30)


@STEPS
def test_beginnings_of_beginnings(folder, steps):
    """A system prompt, documents below it, questions on each, all at once."""
    system, documents = tokens(100), [tokens(100, seed=seed) for seed in (1, 2)]
    prompts = [system + documents[i % 2] + tokens(20 + i, seed=10 + i) for i in range(8)] + [
        system + tokens(70, seed=3)
    ]
    with steps(), serving(folder, slots=30, max_num_seqs=4, max_num_batched_tokens=64) as llm:
        found = ask(llm, *prompts, count=30)
    known = [known for _, known in found]
    assert known[:2] == [0, 96] and known[2:8] == [192] * 6 and known[8] >= 96
    check(folder, list(zip(prompts, [answer for answer, _ in found], strict=True)), count=30)


def test_a_conversation_is_no_beginning(folder):
    """Its turns go on from one another; the beginning that two of them share stays while both go on."""
    system = tokens(150)
    talks = [system + tokens(40, seed=1), system + tokens(50, seed=2)]
    with serving(folder) as llm:
        vacancies = llm.llm_engine.engine_core.engine_core.scheduler.connector.scheduler._unnamed._vacancies
        for turn in range(3):
            for i, talk in enumerate(talks):
                (((answer, _), known),) = ask(llm, talk)
                assert known == (len(talk) - 31 if turn else 0)
                talks[i] = talk + answer + tokens(30, seed=10 * turn + i)
        assert [vacancy.span.length for vacancy in vacancies._held.values() if vacancy.shared] == [144]
        assert reused(llm, system + tokens(60, seed=3)) == 144


@STEPS
def test_many_prompts_of_few_beginnings(folder, steps):
    """Several at a time, in pieces, in few slots: some beginnings are lost, and read again."""
    rng, asked, known = random.Random(3), [], 0
    systems = [tokens(60 + 50 * i, seed=i) for i in range(4)]
    systems += [systems[1] + tokens(70, seed=9)]
    with steps(), serving(folder, slots=6, max_num_seqs=3, max_num_batched_tokens=100) as llm:
        for turn in range(8):
            prompts = [rng.choice(systems) + tokens(rng.randrange(1, 90), seed=100 * turn + i) for i in range(5)]
            found = ask(llm, *prompts, count=20)
            asked += zip(prompts, [answer for answer, _ in found], strict=True)
            known += sum(cached for _, cached in found)
    assert known > sum(len(prompt) for prompt, _ in asked) / 8
    check(folder, asked, count=20)


def test_where_prompts_part():
    def part(*pieces, salt=None):
        return known.part(Prompt([token for piece in pieces for token in piece]), salt, f"{pieces} {salt}")

    def parts(*pieces, of, salt=None):
        shared, whose = part(*pieces, salt=salt)
        assert whose == f"{of} {salt}"
        return shared

    a, b, c, d = (tokens(32, seed=seed) for seed in range(4))
    known = Beginnings(16)
    assert part(a, b) == (0, None)
    assert part(a, b, [1, 2]) == part(a, b, [1, 2], c) == (0, None), "it goes on"
    assert parts(a, b, [1, 3], of=(a, b, [1, 2], c)) == 64, "it goes on otherwise"
    assert parts(a, b, of=(a, b, [1, 3])) == 64, "it ends where others go on: perhaps otherwise"
    assert parts(a, c, of=(a, b)) == 32 and parts(a, d[:20], of=(a, c)) == 32
    assert parts(a, b[:16], d, of=(a, b)) == 48
    assert part(a, c, salt="mine") == (0, None) and parts(a, d, of=(a, c), salt="mine") == 32
    assert part([7]) == part() == (0, None)


def test_old_prompts_are_forgotten(monkeypatch):
    monkeypatch.setattr(beginnings, "MOST", 4)
    known = Beginnings(16)
    a, b, c = (tokens(48, seed=seed) for seed in range(3))
    known.part(Prompt(a), None, "a")
    known.part(Prompt(b), None, "b")
    assert known.part(Prompt(a[:32] + c), None, "c") == (0, None)
    assert len(known._seen) == 4
