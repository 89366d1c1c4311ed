"""Prompts that begin as others did and part from them: what they share is read twice, and then kept."""

import os
import random
from types import SimpleNamespace

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from engines import STEPS, save_model, tokens  # noqa: E402
from test_vacancies import ask, check, reused, serving  # noqa: E402
from vllm.v1.core.block_pool import BlockPool  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

from vllm_deltamem import beginnings  # noqa: E402
from vllm_deltamem.beginnings import Beginnings  # noqa: E402
from vllm_deltamem.blocks import Blocks, Slot  # noqa: E402
from vllm_deltamem.transfers import Prompt  # noqa: E402
from vllm_deltamem.unnamed import Unnamed  # noqa: E402
from vllm_deltamem.vacancies import Vacancies  # noqa: E402


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
        vacancies = llm.llm_engine.engine_core.engine_core.scheduler.connector.scheduler._slots.vacancies
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


@pytest.mark.parametrize("slots", [3, 4])
def test_two_beginnings_that_one_step_keeps_go_to_two_slots(folder, slots):
    """Or one of them is not kept, where only one slot is vacant."""
    a, b = tokens(64, seed=1), tokens(128, seed=2)
    prompts = [b + tokens(50, seed=3), a + tokens(50, seed=4), a + tokens(50, seed=5), b + tokens(50, seed=6)]
    with serving(folder, slots=slots, max_num_batched_tokens=1024) as llm:
        found = ask(llm, *prompts)
    assert slots == 3 or any(known for _, known in found)
    check(folder, list(zip(prompts, [answer for answer, _ in found], strict=True)))


def unnamed():
    """As the scheduler has it, over a pool of 32 slots."""
    found = Unnamed(16, chunk=1024)
    blocks = Blocks(BlockPool(num_gpu_blocks=33, enable_caching=False, hash_block_size=16), parts=1, cells=0)
    found.bind(SimpleNamespace(vacancies=Vacancies(blocks), short=set(), slot=lambda *_: Slot(True, (0,))))
    return found


def request(name, prompt):
    return SimpleNamespace(
        request_id=name, prompt_token_ids=prompt, all_token_ids=prompt, num_prompt_tokens=len(prompt),
        num_tokens=len(prompt), num_computed_tokens=0, status=RequestStatus.WAITING, sampling_params=None,
        cache_salt=None,
    )  # fmt: skip


def test_thousands_of_prompts_may_wait_for_one_another():
    """Two questions each on documents below one system prompt: every prompt parts from the one before it."""
    known, system = unnamed(), tokens(32)
    documents = [system + tokens(32, seed=1 + i) for i in range(2000)]
    waiting = [request(f"{i} {j}", [*documents[i], 7, j]) for i in range(2000) for j in range(2)]
    assert all(known.arrive(found) for found in waiting)
    first, *others = waiting
    known.match(first), known.claim(first.request_id)
    first.status = RequestStatus.RUNNING
    assert [known.match(other) for other in others] == [None] * 3999
    first.num_computed_tokens = 66
    known.plan([])
    assert known.match(others[0]) is not None


def test_a_finished_request_leads_nobody():
    known, document = unnamed(), tokens(64)
    first, second, third = (request(name, [*document, i]) for i, name in enumerate("abc"))
    known.arrive(first), known.arrive(second)
    first.status = RequestStatus.FINISHED_STOPPED
    known.finish("a")
    known.arrive(third)
    assert known._leaders["c"] == (second, 64)
    known.finish("b"), known.finish("c")
    assert not (known._parting or known._leaders or known._requests)


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
