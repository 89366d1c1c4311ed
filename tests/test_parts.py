"""Short sequences hold parts of slots: exact there, and computed anew in a whole slot once they have outgrown them."""

import os
import random
from unittest.mock import patch

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch  # noqa: E402
from engines import (  # noqa: E402
    STEPS,
    STOCK,
    ahead,
    engine,
    gated,
    preempted,
    read_answers,
    save_model,
    session_of,
    tokens,
)
from test_engine import greedy  # noqa: E402
from test_vacancies import ask  # noqa: E402
from vllm.v1.core.block_pool import BlockPool  # noqa: E402
from vllm.v1.core.sched.interface import PauseState  # noqa: E402

from vllm_deltamem import memory, vacancies  # noqa: E402
from vllm_deltamem.backend import DeltaMemBackend  # noqa: E402
from vllm_deltamem.blocks import Blocks, Slot  # noqa: E402
from vllm_deltamem.carrier import Read  # noqa: E402
from vllm_deltamem.config import DeltaMemConfig  # noqa: E402
from vllm_deltamem.connectorscheduler import ConnectorScheduler  # noqa: E402
from vllm_deltamem.enginestore import open_store  # noqa: E402
from vllm_deltamem.memory import Shape, plan_layout, plan_part  # noqa: E402
from vllm_deltamem.pool import SlotPool  # noqa: E402
from vllm_deltamem.sessionname import tenant_of  # noqa: E402
from vllm_deltamem.transfers import Span  # noqa: E402
from vllm_deltamem.vacancies import Vacancies  # noqa: E402

SETTINGS = {"memory": 80, "segment": 8, "window": 12, "pinned": 4}
PARTS, CELLS = 8, 8  # of a slot; tokens that a part has room for
SHORT = PARTS * CELLS - 1  # tokens of the longest sequence that holds parts


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    families = ("llama", "gemma3-mixed")
    return {family: save_model(tmp_path_factory.mktemp(family), family) for family in families}


@pytest.fixture(autouse=True)
def shorter():
    """Parts that are outgrown soon, and are worth being copied."""
    with patch.object(memory, "PART_TOKENS", CELLS), patch.object(vacancies, "LEAST", CELLS):
        yield


def serving(folder, slots=4, sessions=None, **options):
    """An engine with so many slots; sessions: how they are kept."""
    options = {"num_gpu_blocks_override": PARTS * slots + 1, "max_num_seqs": 32, "max_model_len": 2048} | options
    return engine(folder, settings=SETTINGS | {"sessions": sessions or {}}, **options)


def anew(folder, prompt, count):
    """The answer of an engine that holds nothing else, from the prompt on."""
    with serving(folder) as llm:
        return ask(llm, prompt, count=count)[0][0]


def finished(llm):
    """What is answered, in that order."""
    outputs = []
    while llm.llm_engine.has_unfinished_requests():
        outputs += [output for output in llm.llm_engine.step() if output.finished]
    return outputs


def slots_of(llm):
    (manager,) = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers
    return manager


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed"])
def test_short_sequences_are_exact(folders, family):
    """Of a memory that would code most of their entries: log-probabilities as of full attention, fp32."""
    prompts, found = [tokens(n, seed=n) for n in (1, 8, 33, 42)], {}
    for backend in (STOCK, "DELTAMEM"):
        given = {"backend": backend, "dtype": "float32", "max_model_len": 2048}
        settings = SETTINGS | {"fidelity": "k8v4"}
        with engine(folders[family], settings=settings, max_num_batched_tokens=64, **given) as llm:
            params = greedy(13, logprobs=1)
            found[backend] = read_answers(llm.generate([{"prompt_token_ids": p} for p in prompts], params))
    for (theirs, expected, _), (ours, chosen, _) in zip(*found.values(), strict=True):
        assert ours == theirs
        assert chosen == pytest.approx(expected, abs=1e-4)


def test_a_part_does_not_depend_on_chunks_company_reuse_or_preemption(folders):
    """To the bit, of prompt and answer; every part has been used before."""
    prompt, others = tokens(40), [tokens(42 + i, seed=1 + i) for i in range(PARTS - 1)]
    params = greedy(15)

    def left(llm, run):
        """The part that the prompt was read in, as its request left it."""
        llm.reset_prefix_cache()
        run()
        (slot,) = (slot for slot, vacancy in slots_of(llm).vacancies._held.items() if vacancy.span == span)
        assert not slot.whole and len(slot.rows) == 7
        return SlotPool.serving().slabs[1].rows[[*slot.rows]]

    expected = None
    for chunk in (8, 23, 2048):
        options = {"enable_prefix_caching": True, "max_num_seqs": 8, "max_num_batched_tokens": chunk}
        with serving(folders["llama"], slots=PARTS, **options) as llm:
            answer = ask(llm, prompt, count=15)[0][0][0]
            span = Span.of(prompt + answer[:-1], None)
            ask(llm, *others, tokens(48, seed=9), count=15)
            for run in (
                lambda: ask(llm, prompt, count=15),
                lambda: ask(llm, *others, prompt, count=15),
                lambda: preempted(llm, prompt, params, 9),
                lambda: preempted(llm, prompt, params, 1),
            ):
                found = left(llm, run)
                expected = found if expected is None else expected
                assert found.any() and torch.equal(found, expected), f"chunks of {chunk}"


@STEPS
def test_who_outgrows_a_part_goes_on_as_if_computed_in_a_slot(folders, steps):
    """To the bit, whether the part was outgrown alone or among others, by tokens ahead of what is known or not."""
    prompt = tokens(40)
    with steps(), serving(folders["llama"]) as llm:
        (answer, chosen), _ = ask(llm, prompt, count=60)[0]
        assert slots_of(llm).used() == (0, 0)
        among = ask(llm, prompt, *(tokens(20 + 9 * i, seed=1 + i) for i in range(6)), count=60)
        assert among[0][0] == (answer, chosen)
    before = SHORT - len(prompt) + 1  # the last of these is not in the part
    with serving(folders["llama"]) as llm:
        assert ask(llm, prompt, count=before)[0][0] == (answer[:before], chosen[:before])
        assert ask(llm, prompt + answer[:before], count=60 - before)[0][0] == (answer[before:], chosen[before:])


def test_a_part_ends_with_its_last_token(folders):
    """What fits is not computed anew: nor what ends with the token that it has no room for, steps ahead or not."""
    for steps in (lambda: patch.object(os, "sep", os.sep), ahead):
        with steps(), serving(folders["llama"]) as llm:
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            with patch.object(scheduler, "_preempt_request", wraps=scheduler._preempt_request) as preempt:
                ask(llm, tokens(SHORT), count=1)
                ask(llm, tokens(40), count=SHORT - 40 + 1)
                assert not preempt.called
                ask(llm, tokens(40), count=SHORT - 40 + 2)
                assert preempt.call_count == 1
                ask(llm, tokens(SHORT + 1), count=2)
                assert preempt.call_count == 1


@STEPS
def test_more_short_sequences_run_at_once_than_there_are_slots(folders, steps):
    """Each takes parts as it grows; when none are left, who came last goes on later."""
    prompts = [tokens(18, seed=i) for i in range(12)]
    with serving(folders["llama"]) as llm:
        expected = {str(i): ask(llm, prompt, count=30)[0][0] for i, prompt in enumerate(prompts)}
    with steps(), serving(folders["llama"], slots=2) as llm:
        core, most, preempted = llm.llm_engine, 0, 0
        scheduler = core.engine_core.engine_core.scheduler
        for i, prompt in enumerate(prompts):
            core.add_request(str(i), {"prompt_token_ids": prompt}, greedy(30, logprobs=0))
        found = {}
        while core.has_unfinished_requests():
            done = [output for output in core.step() if output.finished]
            found |= {output.request_id: read_answers([output])[0][:2] for output in done}
            most = max(most, len(scheduler.running))
            preempted = max(preempted, *(request.num_preemptions for request in scheduler.requests.values()), 0)
    assert most == 5 and preempted
    assert found == expected


def test_a_long_one_waits_for_a_whole_slot_and_short_ones_behind_it(folders):
    """First come, first served, and whoever has outgrown a part comes before those that have not begun."""
    with serving(folders["llama"], slots=1) as llm:
        asked = {"short": (30, 10), "outgrows": (30, 40), "long": (100, 10), "later": (30, 10)}
        for name, (length, count) in asked.items():
            llm.llm_engine.add_request(name, {"prompt_token_ids": tokens(length, seed=length)}, greedy(count))
        assert [output.request_id for output in finished(llm)] == ["short", "outgrows", "long", "later"]


@STEPS
def test_who_outgrew_parts_goes_on_in_the_order_of_arrival(folders, steps):
    """And a scheduler that is paused for new requests waits for all of them."""
    with steps(), serving(folders["llama"], slots=5) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        for paused in (False, True):
            for i in range(5):
                llm.llm_engine.add_request(f"{i}", {"prompt_token_ids": tokens(30, seed=i)}, greedy(60))
            llm.llm_engine.step()
            if paused:
                scheduler.set_pause_state(PauseState.PAUSED_NEW)
            answered, resumed = [], []
            while scheduler.has_requests():
                answered += [output.request_id for output in llm.llm_engine.step() if output.finished]
                whole = [request.request_id[0] for request in scheduler.running if request.num_preemptions]
                resumed += [name for name in whole if name not in resumed]
            answered += [output.request_id for output in finished(llm)]
            scheduler.set_pause_state(PauseState.UNPAUSED)
            assert resumed == [*"01234"] and sorted(answered) == [*"01234"]


@STEPS
def test_a_pause_waits_for_those_that_vllm_has_preempted(folders, steps):
    """Since others grow; none of them is answered otherwise for it."""
    prompts = [tokens(14, seed=i) for i in range(4)]
    with steps(), serving(folders["llama"], slots=1) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        for i, prompt in enumerate(prompts):
            llm.llm_engine.add_request(f"{i}", {"prompt_token_ids": prompt}, greedy(30, logprobs=0))
        llm.llm_engine.step()
        scheduler.set_pause_state(PauseState.PAUSED_NEW)
        outputs = []
        while scheduler.has_requests():
            outputs += [output for output in llm.llm_engine.step() if output.finished]
    assert [output.request_id for output in outputs] == [*"0123"]
    with serving(folders["llama"]) as llm:
        expected = [ask(llm, prompt, count=30)[0][0] for prompt in prompts]
    assert [answer[:2] for answer in read_answers(outputs)] == expected


def test_who_is_preempted_with_its_last_token_in_a_part_is_read_for_nobody(folders):
    """vLLM resets its caches just then: it is to claim a slot, others that began alike hold parts."""
    prompts, options = [tokens(40), tokens(42, seed=1)], {"enable_prefix_caching": True, "max_num_batched_tokens": 44}
    with serving(folders["llama"], **options) as llm:
        core, found, joined, reset = llm.llm_engine, {}, False, False
        scheduler = core.engine_core.engine_core.scheduler
        for name, prompt, count in (("first", prompts[0], 60), ("beside", prompts[1], 5)):
            core.add_request(name, {"prompt_token_ids": prompt}, greedy(count, logprobs=0))
        while core.has_unfinished_requests():
            found |= {out.request_id: read_answers([out])[0][:2] for out in core.step() if out.finished}
            (known, *_) = [r.num_tokens for r in scheduler.running if r.request_id.startswith("first")] or [0]
            if known == 50 and not joined:
                joined = True
                core.add_request("later", {"prompt_token_ids": prompts[0]}, greedy(60, logprobs=0))
            if known == SHORT + 1 and not reset:
                reset = True
                scheduler.reset_prefix_cache(reset_running_requests=True)
    assert found["first"] == found["later"] == anew(folders["llama"], prompts[0], 60)


@STEPS
def test_short_ones_make_way_for_a_long_one(folders, steps):
    """It waits for none of them but those whose places are needed; they go on as if they had not been moved."""
    prompts, long = [tokens(2, seed=i) for i in range(2 * PARTS)], tokens(100, seed=99)
    with steps(), serving(folders["llama"], slots=2) as llm:
        for i, prompt in enumerate(prompts):  # every other one leaves its place soon
            llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, greedy(7 if i % 2 else 2, logprobs=0))
        llm.llm_engine.add_request("long", {"prompt_token_ids": long}, greedy(1, logprobs=0))
        outputs = finished(llm)
    order, found = [output.request_id for output in outputs], read_answers(outputs)
    assert order.index("long") == PARTS
    found = dict(zip(order, found, strict=True))
    with serving(folders["llama"], slots=PARTS) as llm:
        for i in range(1, 2 * PARTS, 2):
            assert ask(llm, prompts[i], count=7)[0][0] == found[str(i)][:2]
        assert ask(llm, long, count=1)[0][0] == found["long"][:2]


def test_aborted_and_preempted_ones_leave_their_parts(folders):
    prompt = tokens(30)
    expected = anew(folders["llama"], prompt, 20)
    with serving(folders["llama"]) as llm:
        output = preempted(llm, prompt, greedy(20, logprobs=0), 5)
        assert read_answers([output])[0][:2] == expected
        llm.llm_engine.add_request("gone", {"prompt_token_ids": prompt}, greedy(20))
        llm.llm_engine.step()
        assert slots_of(llm).used() == (1, 4)
        llm.llm_engine.abort_request(["gone"])
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        assert slots_of(llm).used() == (0, 0) and not slots_of(llm).short


def turn(llm, prompt, name, count=10):
    """An answer in a session, as ask() tells it, and what became of the session."""
    params = greedy(count, logprobs=0, extra_args={"deltamem_session": name})
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return read_answers([output])[0][:2], output.kv_transfer_params["deltamem_session"]


def check(folder, asked, reused):
    """That prompts, in parts and in slots, were answered as if all were computed: (prompt, answer) each.

    reused: how many of their tokens were not computed.
    """
    lengths = [len(prompt) for prompt, _ in asked]
    assert min(lengths) < SHORT - 12 < max(lengths) - 12
    assert reused > sum(lengths) / 6
    with serving(folder) as llm:
        assert [answer for answer, _ in ask(llm, *(p for p, _ in asked), count=12)] == [answer for _, answer in asked]


def test_a_short_session_takes_as_many_parts_as_its_tokens(folders):
    """It goes back to any of them, and is computed anew once its prompt has outgrown all parts."""
    with serving(folders["llama"]) as llm:
        talk = tokens(30)
        answer, _ = turn(llm, talk, "talk")
        assert session_of(llm, "talk").header.parts == 5  # 39 tokens
        told = talk + answer[0][:4] + [5, 6]  # otherwise
        answers = {tuple(told): turn(llm, told, "talk")}
        part = session_of(llm, "talk").header.n_bytes // 6  # 45 tokens
        longer = told + tokens(SHORT + 1 - len(told), seed=1)
        answers[tuple(longer)] = answer, _ = turn(llm, longer, "talk")
        header = session_of(llm, "talk").header
        assert header.parts == 0 and header.n_bytes == PARTS * part
        longer = longer + answer[0]
        answers[tuple(longer)] = turn(llm, longer, "talk")
    assert [said["history"] for _, said in answers.values()] == ["restored", "outgrown", "restored"]
    assert [said.get("restored_tokens") for _, said in answers.values()] == [34, None, len(longer) - 1]
    for prompt, (answer, _) in answers.items():
        assert answer == anew(folders["llama"], list(prompt), 10)


@STEPS
@pytest.mark.parametrize("directory", [False, True], ids=["host", "directory"])
def test_sessions_go_on_from_parts_and_slots(folders, tmp_path, steps, directory):
    """Restored, branched from, told otherwise, outgrown, among others: as if computed anew."""
    rng, asked, reused = random.Random(6), [], 0
    talks = [tokens(rng.randrange(10, 40), seed=90 + i) for i in range(9)]
    sessions = {"directory": str(tmp_path)} if directory else None
    moving = patch.object(Blocks, "_swap", autospec=True, side_effect=Blocks._swap)
    with steps(), serving(folders["llama"], slots=6, sessions=sessions) as llm, moving as moved:
        for _ in range(7):
            chosen = rng.sample(range(9), rng.randrange(3, 9))
            params = []
            for i in chosen:
                source = rng.choice([i, i, i, i - 1])
                talks[i] = talks[source] + tokens(rng.randrange(1, 14), seed=len(asked) + i)
                names = {"deltamem_session": f"talk-{i}", "deltamem_session_from": f"talk-{source}"}
                params.append(greedy(12, logprobs=0, extra_args=names if rng.random() < 0.9 else None))
            outputs = llm.generate([{"prompt_token_ids": talks[i]} for i in chosen], params, use_tqdm=False)
            for i, (*answer, known) in zip(chosen, read_answers(outputs), strict=True):
                asked.append((list(talks[i]), tuple(answer)))
                talks[i] += answer[0][: rng.choice([12, 12, 11, 5])]
                reused += known
    assert moved.called
    check(folders["llama"], asked, reused)


@pytest.mark.parametrize("leaves", [False, True], ids=["waits", "leaves"])
def test_parts_that_are_being_restored_are_not_moved(folders, leaves):
    """Though they lie in the emptiest slot: bytes on their way would spoil whoever claims it, or never arrive."""
    talk, long = tokens(2 * CELLS - 3), tokens(100, seed=99)
    expected = [anew(folders["llama"], prompt, 12) for prompt in (talk + [7], long)]
    moving = patch.object(Blocks, "_swap", autospec=True, side_effect=Blocks._swap)
    with serving(folders["llama"], slots=2) as llm, gated(Read) as gate, moving as moved:
        core, answered = llm.llm_engine, []
        turn(llm, talk, "talk", count=1)
        named = greedy(12, logprobs=0, extra_args={"deltamem_session": "talk"})
        core.add_request("talk", {"prompt_token_ids": talk + [7]}, named)
        for i in range(2 * PARTS - 2):  # the first fill the slot of the talk
            core.add_request(str(i), {"prompt_token_ids": [2, 3]}, greedy(2 if i < PARTS or i % 2 else 7))
        core.step()
        restoring = slots_of(llm).blocks.slot(held_by(llm, "talk"))
        core.add_request("long", {"prompt_token_ids": long}, greedy(12, logprobs=0))
        if leaves:
            core.abort_request(["talk"])
        while not slots_of(llm).blocks.are_whole(held_by(llm, "long")):
            answered += [output for output in core.step() if output.finished]
        assert moved.called and slots_of(llm).blocks.slot(held_by(llm, "talk")) == restoring
        gate.set()
        answered += finished(llm)
    asked = [output for output in answered if output.request_id in ("talk", "long")]
    found = {output.request_id: read_answers([output])[0][:2] for output in asked}
    assert found["long"] == expected[1]
    assert leaves or found["talk"] == expected[0]


def held_by(llm, name):
    """The blocks of a request, if it has any."""
    blocks = slots_of(llm).req_to_blocks
    return next((held for request_id, held in blocks.items() if request_id.startswith(name)), [])


@STEPS
def test_conversations_go_on_from_parts_and_slots(folders, steps):
    """Whatever is claimed, copied, kept for answers told otherwise, shared or outgrown: as if computed anew."""
    rng, systems = random.Random(5), [tokens(33, seed=90 + i) for i in range(2)]
    talks, asked, known = [list(rng.choice(systems)) for _ in range(9)], [], 0
    options = {"enable_prefix_caching": True, "slots": 6, "max_num_batched_tokens": 64}
    moving = patch.object(Blocks, "_swap", autospec=True, side_effect=Blocks._swap)
    with (
        steps(),
        patch("vllm_deltamem.beginnings.LEAST", 16),
        serving(folders["llama"], **options) as llm,
        moving as moved,
    ):
        for turn in range(7):
            chosen = rng.sample(range(9), rng.randrange(3, 9))
            for i in chosen:
                talks[i] += tokens(rng.randrange(1, 14), seed=100 * turn + i)
            for i, (answer, cached) in zip(chosen, ask(llm, *(talks[i] for i in chosen), count=12), strict=True):
                asked.append((list(talks[i]), answer))
                talks[i] += answer[0][: rng.choice([12, 12, 11, 5])]
                known += cached
    assert moved.called
    check(folders["llama"], asked, known)


def test_without_the_patch_a_part_is_not_written_past_its_end(folders):
    """By a scheduler of the user's, say: vLLM preempts whoever gets no blocks, though others with it."""
    prompts = [tokens(40, seed=i) for i in range(3)]
    with serving(folders["llama"]) as llm:
        expected = ask(llm, *prompts, count=40)
        with patch.object(ConnectorScheduler, "outgrown", return_value=[]):
            assert ask(llm, *prompts, count=40) == expected


def test_samples_of_a_short_prompt_are_read_once(folders):
    params = greedy(10, logprobs=0, n=1)
    with serving(folders["llama"], enable_prefix_caching=True) as llm:
        outputs = llm.generate([{"prompt_token_ids": tokens(40)}] * 3, params, use_tqdm=False)
    answers = read_answers(outputs)
    assert sorted(cached for *_, cached in answers) == [0, 39, 39]
    assert len({tuple(answer) for answer, *_ in answers}) == 1


def test_a_part_and_a_slot_do_not_serve_each_other(folders):
    """A prompt that is too long for a part is computed anew, once."""
    talk = tokens(50)
    with serving(folders["llama"], enable_prefix_caching=True) as llm:
        ask(llm, talk, count=2)
        assert ask(llm, talk + tokens(5, seed=1), count=2)[0][1] == 50
        longer = talk + tokens(30, seed=2)
        assert [ask(llm, longer, count=2)[0][1], ask(llm, longer + [7], count=2)[0][1]] == [0, 80]


def test_a_prompt_that_goes_on_otherwise_starts_with_a_copy(folders):
    """Of whole parts, at any token; what it was copied from goes on, too. Where none are vacant, it claims them."""
    talk = tokens(50)
    asked = [(talk, 0), (talk[:29] + tokens(9, seed=1), 29), (talk[:20] + tokens(5, seed=2), 20), (talk + [7], 50)]
    with serving(folders["llama"], enable_prefix_caching=True) as llm:
        found = [ask(llm, prompt, count=5)[0] for prompt, _ in asked]
    with serving(folders["llama"]) as llm:
        assert found == [(ask(llm, prompt, count=5)[0][0], cached) for prompt, cached in asked]
    with serving(folders["llama"], slots=1, enable_prefix_caching=True) as llm:
        assert [ask(llm, prompt, count=5)[0][1] for prompt, _ in asked] == [0, 29, 20, 20]


def test_of_prompts_that_come_at_once_one_reads_what_they_begin_with(folders):
    """The others start with copies of its parts while it goes on."""
    prompts = [tokens(40) + tokens(5 + i, seed=1 + i) for i in range(3)]
    options = {"enable_prefix_caching": True, "max_num_seqs": 8, "max_num_batched_tokens": 30}
    with patch("vllm_deltamem.beginnings.LEAST", 16), serving(folders["llama"], **options) as llm:
        with patch.object(Vacancies, "copy", side_effect=AssertionError("nothing is kept beside them")):
            found = ask(llm, *prompts, count=5)
    assert [cached for _, cached in found] == [0, 40, 40]
    with serving(folders["llama"]) as llm:
        assert [answer for answer, _ in found] == [ask(llm, prompt, count=5)[0][0] for prompt in prompts]


def test_of_what_was_left_longest_ago_the_end_is_claimed_first(folders):
    """The parts before it still serve."""
    talk, others = tokens(50), [tokens(56, seed=1), tokens(24, seed=2)]
    with serving(folders["llama"], slots=2, enable_prefix_caching=True) as llm:
        ask(llm, talk, count=2)
        for prompt in others:
            ask(llm, prompt, count=2)
        assert [ask(llm, prompt, count=2)[0][1] for prompt in (talk, others[1])] == [32, 23]


def test_a_cache_that_holds_parts_alone_is_refused(folders):
    """As vLLM refuses a cache that is too small for one sequence: it keeps a block for itself."""
    with pytest.raises(ValueError, match="To serve at least one request"):
        with serving(folders["llama"], num_gpu_blocks_override=PARTS):
            pass


def test_what_a_part_is(folders):
    """A ring of so many tokens in every head, sliding or not, and nothing else; as many as go into the slot."""
    with serving(folders["gemma3-mixed"]):
        plan = DeltaMemBackend.serving
    assert plan.part_tokens == plan.parts * CELLS - 1 and plan.parts == 7
    assert plan.parts * plan.part.slot_bytes == plan.layout.slot_bytes >= plan.parts * plan.part.used_bytes
    assert not any(map(sum, plan.part.exact + plan.part.coarse))
    rings = [extent for fields in plan.part._fields[:-1] for extent in [fields["ring_k"][1]]]
    assert [extent[1] for extent in rings] == [CELLS] * 5


@pytest.mark.parametrize(("segment", "cells"), [(64, 256), (512, 512)], ids=["PART_TOKENS", "a segment"])
def test_how_many_tokens_a_part_has_room_for(segment, cells):
    shape = Shape(layers=2, kv_heads=2, head_size=32, dtype=torch.bfloat16, max_model_len=1 << 17)
    with patch.object(memory, "PART_TOKENS", 256):
        assert plan_part(plan_layout(shape, DeltaMemConfig(memory=8300, segment=segment))).cells == cells


@pytest.mark.parametrize(("trained", "short"), [(1 << 17, SHORT), (45, 39), (CELLS - 1, 0)])
def test_short_is_no_longer_than_the_context_that_the_model_was_made_for(folders, trained, short):
    with patch("vllm_deltamem.plan.trained_context", return_value=trained), serving(folders["llama"]) as llm:
        assert DeltaMemBackend.serving.part_tokens == short
        ask(llm, tokens(50), count=20)


def blocks_in(slots, parts):
    return Blocks(BlockPool(num_gpu_blocks=slots * parts + 1, enable_caching=False, hash_block_size=16), parts, CELLS)


def whole(row):
    return Slot(True, (row,))


def part(*places):
    return Slot(False, places)


def test_parts_are_moved_out_of_the_slot_where_fewest_are_held():
    blocks, forgotten, held = blocks_in(slots=3, parts=3), [], (0, 1, 2, 4, 7, 8)
    blocks.take(part(*held))
    where = {place: blocks.of(part(place))[0].block_id for place in held}
    assert blocks.whole() is None
    assert blocks.make_vacant([], forgotten.append) == ({}, {}) == blocks.make_vacant(held[:2], forgotten.append)
    moves = blocks.make_vacant(held, forgotten.append)
    assert moves.parts == {4: 6}
    assert moves.places == {where[4]: 6, 7: 4} and [block.block_id for block in forgotten] == [7]
    assert blocks.whole() == whole(1) and blocks.some(1) == part(3)
    assert blocks.slot([blocks.of(part(6))[0]]) == part(6)
    assert blocks.of(part(6))[0].block_id == where[4]
    blocks.take(blocks.some(1))
    assert blocks.whole() is None
    assert blocks.make_vacant(range(9), forgotten.append) == ({}, {}), "two are vacant"


def test_slots_are_claimed_in_the_order_in_which_they_were_left():
    blocks = blocks_in(slots=3, parts=2)
    for row in range(3):
        blocks.take(whole(row))
    blocks.leave([whole(2), whole(0), whole(1)], lambda block: None)
    assert blocks.whole() == whole(2)
    assert blocks.whole(besides=whole(2)) == whole(0)
    blocks.claim_next(part(3, 1))
    assert blocks.some(1) == part(1) and blocks.some(2) == part(1, 3), "the last one first"
    assert blocks.some(2, besides=(3,)) == part(1, 5) and blocks.some(7) is None
    assert blocks.whole() == whole(2), "half of the others was left later"


def test_blocks_that_make_no_slot_are_parts():
    blocks = Blocks(BlockPool(num_gpu_blocks=9, enable_caching=False, hash_block_size=16), 3, CELLS)
    assert blocks.slots == 2
    held = [blocks.take(whole(row)) for row in range(2)]
    assert blocks.whole() is None and blocks.some(2) == part(6, 7)
    assert blocks.slot([blocks._pool.null_block, *held[1]]) == whole(1)


def test_a_session_whose_bytes_do_not_fit_its_tokens_is_refused(folders, tmp_path):
    """Whoever can write to the directory can make a clear file say so; it costs that session alone."""
    with serving(folders["llama"], slots=2, sessions={"directory": str(tmp_path)}) as llm:
        talk, store = tokens(40), open_store(llm.llm_engine.vllm_config, 0)
        expected, _ = turn(llm, talk + [9], "new")
        part = session_of(llm, "new").header.n_bytes // 7  # 50 tokens
        for parts, n_bytes in ((1, part), (4, 4 * part), (5, 10 * part), (1 << 20, 1 << 20), (0, 5 * part)):
            name = f"forged-{parts}"
            store.save(tenant_of(None), name, talk, torch.zeros(n_bytes, dtype=torch.uint8), parts=parts)
            answer, said = turn(llm, talk + [9], name)
            assert answer == expected and said["history"] == "size"


def test_a_pause_does_not_keep_a_session_from_the_parts_that_others_wait_for(folders):
    """It is restored before who was preempted goes on, since it holds some of them."""
    talk = tokens(6)
    with serving(folders["llama"], slots=1) as llm, gated(Read) as gate:
        core, answered = llm.llm_engine, []
        scheduler = core.engine_core.engine_core.scheduler
        turn(llm, talk, "talk", count=1)
        core.add_request("grows", {"prompt_token_ids": tokens(40, seed=5)}, greedy(60))
        core.step()
        named = greedy(4, extra_args={"deltamem_session": "talk"})
        core.add_request("talk", {"prompt_token_ids": talk + [7]}, named)
        core.step()
        scheduler.set_pause_state(PauseState.PAUSED_NEW)
        while scheduler.running:
            core.step()
        gate.set()
        for _ in range(2000):
            answered += [output.request_id for output in core.step() if output.finished]
    assert answered == ["talk", "grows"]
