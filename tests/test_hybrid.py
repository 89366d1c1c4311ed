"""Hybrid models through the real engine: states of recurrent layers lie in the slots, and go where these go.

States are sums that round otherwise in chunks of another size, with any backend: so slots are not equal to the bit.
"""

import pytest
import torch

pytest.importorskip("vllm")
from engines import STEPS, ahead, engine, preempted, read_answers, save_model, session_of, tokens  # noqa: E402

from vllm_deltamem import stopstring  # noqa: E402
from vllm_deltamem.pool import SlotPool  # noqa: E402

SMALL = {"memory": 128, "segment": 32}
CLOSE = dict(atol=1e-4, rtol=0)
FAMILIES = ("granite-hybrid", "falcon-h1", "nemotron-h")


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def greedy(count, **options):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=count, logprobs=1, ignore_eos=True, **options)


def ask(llm, *prompts, count=20, **options):
    """Greedy answers: tokens, their log-probabilities, tokens of the prompt that were not computed."""
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    return read_answers(llm.generate(prompts, greedy(count, **options), use_tqdm=False))


def alike(answer, expected) -> bool:
    return answer[0] == expected[0] and torch.allclose(torch.tensor(answer[1]), torch.tensor(expected[1]), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_depend_on_chunks_batch_or_reuse(folders, family):
    """A prompt several times longer than the memory, in chunks, among others, in a used slot."""
    prompt, others = tokens(333), [tokens(n, seed=n) for n in (5, 90, 200, 420)]
    expected = None
    for chunk in (2048, 64, 100):
        options = {"max_num_batched_tokens": chunk, "max_num_seqs": 4}
        with engine(folders[family], dtype="float32", settings=SMALL, **options) as llm:
            (alone,) = ask(llm, prompt)
            expected = expected or alone
            assert alike(alone, expected), f"chunks of {chunk}"
            ask(llm, *others * 2)  # every slot is used, and dirty afterwards
            assert alike(ask(llm, prompt)[0], expected), f"a used slot, chunks of {chunk}"
            assert alike(ask(llm, prompt, *others)[0], expected), f"among others, chunks of {chunk}"


def test_a_state_lies_in_its_slot_behind_the_memory(folders):
    with engine(folders["granite-hybrid"], settings=SMALL) as llm:
        ask(llm, tokens(40), count=2)
        pool, layers = SlotPool.serving(), llm.llm_engine.vllm_config.compilation_config.static_forward_context
        states = [layer.kv_cache for layer in layers.values() if isinstance(layer.kv_cache, tuple)]
        assert len(states) == 3 and len(pool.whole.layers) == 2
        slots = pool.whole.rows
        memory, width = sum(extent.stop - extent.start for extent in pool.whole.extents), slots.shape[1]
        for row, slot in enumerate(slots):
            for part in (part[row + 1] for state in states for part in state):  # the first is vLLM's null block
                first = part.data_ptr() - slot.data_ptr()
                assert memory <= first and first + part.numel() * part.element_size() <= width
        used = [row for row in range(len(slots)) if states[0][1][row + 1].any()]
        assert len(used) == 1, "one sequence has run"


@STEPS
@pytest.mark.parametrize("family", ["granite-hybrid"])
def test_a_conversation_goes_on_where_its_state_is(folders, family, steps):
    """From the end of the answer, from the end of the prompt if the answer is told otherwise, and nowhere else."""
    prompt, question, retold = tokens(400), tokens(60, seed=1), tokens(9, seed=2)
    with engine(folders[family], dtype="float32", settings=SMALL) as llm:
        answer = ask(llm, prompt)[0][0]
        turns = [prompt + retold + question, prompt + answer + question, prompt[:390] + question]
        expected = [ask(llm, turn)[0] for turn in turns]
    reached = [400, 419, 0]
    with steps(), engine(folders[family], dtype="float32", settings=SMALL, enable_prefix_caching=True) as llm:
        assert ask(llm, prompt)[0][0] == answer
        for turn, answered, length in zip(turns, expected, reached, strict=True):
            (got,) = ask(llm, turn)
            assert alike(got, answered) and got[2] == length
    named = {"extra_args": {"deltamem_session": "s"}}
    with steps(), engine(folders[family], dtype="float32", settings=SMALL) as llm:
        for turn, answered, length in zip(turns, expected, reached, strict=True):
            assert ask(llm, prompt, **named)[0][0] == answer
            assert session_of(llm, "s").header.n_tokens == 419
            (got,) = ask(llm, turn, **named)
            assert alike(got, answered) and got[2] == length
            session_of(llm, "s")
            llm.reset_prefix_cache(reset_connector=True)


@pytest.mark.parametrize("after", [2, 12], ids=["in the prompt", "while decoding"])
def test_answers_do_not_depend_on_preemption(folders, after):
    prompt = tokens(333)
    with engine(folders["granite-hybrid"], dtype="float32", settings=SMALL, max_num_batched_tokens=100) as llm:
        (expected,) = ask(llm, prompt, count=40)
        assert alike(read_answers([preempted(llm, prompt, greedy(40), after)])[0], expected)


@pytest.mark.parametrize(
    "family, known, saved",
    [("granite-hybrid", 78, 70), ("llama", 95, 95)],  # the step ahead reads a token, and ends a segment of 32
)
def test_an_answer_that_steps_have_read_past_leaves_what_was_kept_from_before(
    folders, tmp_path, monkeypatch, family, known, saved
):
    """A stop string ends it, which is found while a step is under way."""
    monkeypatch.setattr(stopstring, "ended", lambda *_: True)
    prompt, question, named = tokens(70), tokens(30, seed=1), {"extra_args": {"deltamem_session": "s"}}
    folder = folders.get(family) or save_model(tmp_path, family)
    with ahead(), engine(folder, dtype="float32", settings=SMALL) as llm:
        core = llm.llm_engine
        core.add_request("stopped", {"prompt_token_ids": prompt}, greedy(60, **named))
        core.step()
        (request,) = core.engine_core.engine_core.scheduler.running
        while request.num_tokens < known:
            core.step()
        core.engine_core.engine_core.aborts_queue.put([request.request_id])
        core.step()
        core.abort_request(["stopped"])  # in the frontend
        kept = session_of(llm, "s").tokens.tolist()
        assert kept == request.all_token_ids[:saved] and request.num_computed_tokens > known
        (got,) = ask(llm, kept + question, **named)
    assert got[2] == saved
    with engine(folder, dtype="float32", settings=SMALL) as llm:
        assert alike(got, ask(llm, kept + question)[0])
