"""The invariant and exactness through the real engine, on tiny models of every family."""

import os
import shutil
import threading
import time
from unittest.mock import patch

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch  # noqa: E402
from engines import (  # noqa: E402
    FAMILIES,
    OPTIONS,
    STEPS,
    STOCK,
    engine,
    gated,
    preempted,
    read_answers,
    save_model,
    session_of,
    tokens,
)
from transformers import AutoConfig  # noqa: E402

from vllm_deltamem import profile as profiles  # noqa: E402
from vllm_deltamem.calibration import pairs  # noqa: E402
from vllm_deltamem.pool import SlotPool  # noqa: E402

SMALL = {"memory": 96, "segment": 16, "window": 24, "pinned": 8}  # runs out of entries soon


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = save_model(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder


def greedy(count, **extra):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **extra)


def generate(llm, prompts, params):
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


def slab_of(llm, prompt, count=40, name="slot"):
    """State of the slot after a prompt and `count` generated tokens, as its session keeps it."""
    session = {"deltamem_session": name}
    text = generate(llm, [prompt], greedy(count, extra_args=session))[0]
    saved = session_of(llm, name)
    assert saved.tokens.tolist() == (prompt + text)[: len(saved.tokens)]
    assert len(saved.tokens) >= len(prompt) + count - 1
    return text, saved.slab


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_as_large_as_the_context_is_full_attention(folders, family):
    """Log-probabilities of a prompt and a whole greedy generation, fp32, against the stock backend."""
    params = greedy(64, logprobs=1, prompt_logprobs=1)
    prompt, found = tokens(300), {}
    for backend in (STOCK, "DELTAMEM"):
        settings = {"memory": 512, "segment": 64}
        options = {"max_model_len": 512} | OPTIONS.get(family, {})
        with engine(folders(family), backend, "float32", settings, **options) as llm:
            out = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
        chosen = [row[token].logprob for row, token in zip(out.prompt_logprobs[1:], prompt[1:], strict=True)]
        chosen += [row[t].logprob for row, t in zip(out.outputs[0].logprobs, out.outputs[0].token_ids, strict=True)]
        found[backend] = torch.tensor(chosen)
    difference = (found["DELTAMEM"] - found[STOCK]).abs().max().item()
    print(f"{family}: largest difference in log-probability {difference:.2e}")
    assert difference < 2e-4


@pytest.mark.parametrize(
    "family, expected",
    [
        ("qwen2-bias", [(False, 16)] * 2),
        ("cohere", [(True, 16)] * 2),
        ("glm", [(True, 8)] * 2),
        ("smollm3", [(False, 16), None]),
        ("cohere2-mixed", [None] * 5),
    ],
)
def test_every_layer_has_the_rope_that_turns_its_keys(folders, family, expected):
    with engine(folders(family), settings=SMALL) as llm:
        generate(llm, [tokens(40)], greedy(2))
        ropes = SlotPool.serving().ropes
    assert [rope and (rope.interleaved, rope.cos.shape[1]) for rope in ropes] == expected
    theta = AutoConfig.from_pretrained(folders(family)).rope_parameters["rope_theta"]
    for rope in filter(None, ropes):
        angles = torch.outer(
            torch.arange(float(len(rope.cos))), theta ** -(torch.arange(rope.cos.shape[1]) / rope.cos.shape[1])
        )
        torch.testing.assert_close(rope.cos, angles.cos(), atol=1e-4, rtol=0)


def save_profile(folder, path):
    """A profile of uneven heads, codes that differ from layer to layer, and importance heads of random weights."""
    config = AutoConfig.from_pretrained(folder)
    heads, size = (config.num_hidden_layers, config.num_key_value_heads), config.head_dim
    torch.manual_seed(3)
    extents = (2 * size, 16), (16,), (16,), ()
    made = profiles.Profile(
        fingerprint=profiles.fingerprint_of(config),
        sizes=(0.1,),
        budgets=0.5 + torch.rand(1, *heads),
        gate=torch.tensor([-1.0, 3.0, -0.1]).expand(*heads, 3),
        fidelity=(("k3v4", "k8v4"),),
        pairs=pairs.fit(*torch.rand(2, *heads, size // 2)),
        importance=tuple(torch.randn(*heads, *extent) for extent in extents),
    )
    profiles.save(made, path)
    return {"profile": str(path)}


@pytest.mark.parametrize(
    "family,trained,learned,dtype",
    [
        ("llama", 2048, False, "bfloat16"),
        ("llama", 2048, False, "float32"),
        ("llama", 160, False, "bfloat16"),
        ("llama", 160, True, "bfloat16"),
        ("gemma3-mixed", 2048, False, "bfloat16"),
        ("gemma4-mixed", 2048, False, "bfloat16"),
        ("gpt-oss-mixed", 2048, False, "float32"),
        ("smollm3", 2048, False, "bfloat16"),
    ],
)
def test_slot_does_not_depend_on_chunks_batch_or_reuse(folders, monkeypatch, tmp_path, family, trained, learned, dtype):
    """One prompt: in chunks of 64, 100 and 2048 tokens, among others, in a used slot: the same bytes.

    Also where most of it lies past the context that the model was trained on, and with a profile.
    """
    settings = SMALL | (save_profile(folders(family), tmp_path / "profile") if learned else {})
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    options = {"dtype": dtype, "max_num_seqs": 4, "hf_overrides": {"max_position_embeddings": trained}}
    prompt, others = tokens(333), [tokens(n, seed=n) for n in (5, 90, 200, 420)]
    expected = None
    for chunk in (2048, 64, 100):
        with engine(folders(family), settings=settings, max_num_batched_tokens=chunk, **options) as llm:
            alone = slab_of(llm, prompt, name="alone")
            expected = expected or alone
            assert alone[0] == expected[0] and torch.equal(alone[1], expected[1]), f"chunks of {chunk}"
            generate(llm, others * 2, greedy(30))  # every slot is used, and dirty afterwards
            again = slab_of(llm, prompt, name="again")
            assert torch.equal(again[1], expected[1]), f"a used slot, chunks of {chunk}"
            crowd = crowded_slab(llm, prompt, others)
            assert torch.equal(crowd, expected[1]), f"among others, chunks of {chunk}"


def crowded_slab(llm, prompt, others):
    params = [greedy(40, extra_args={"deltamem_session": "crowd"})] + [greedy(25 + i) for i in range(len(others))]
    generate(llm, [prompt, *others], params)
    return session_of(llm, "crowd").slab


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_slot_does_not_depend_on_decoding_alone(folders, eager):
    """A model with wide products: decoded alone, decoded among others, prefilled: the same bytes."""
    with engine(folders("llama-wide"), settings=SMALL, enforce_eager=eager) as llm:
        prompt = tokens(333)
        text, decoded = slab_of(llm, prompt)
        assert torch.equal(crowded_slab(llm, prompt, [tokens(n, seed=n) for n in (5, 90)]), decoded)
        following, prefilled = slab_of(llm, prompt + text[:-1], count=1, name="prefilled")
    assert following == text[-1:] and torch.equal(prefilled, decoded)


@pytest.mark.parametrize("after", [2, 12], ids=["in the prompt", "while decoding"])
@pytest.mark.parametrize("family, learned", [("qwen2-bias", False), ("mistral-mixed", False), ("llama", True)])
@STEPS
def test_slot_does_not_depend_on_preemption(folders, tmp_path, steps, family, learned, after):
    """Nor on steps under way when it happens."""
    prompt = tokens(333)
    settings = SMALL | (save_profile(folders(family), tmp_path / "profile") if learned else {})
    with steps(), engine(folders(family), settings=settings, max_num_batched_tokens=100) as llm:
        expected = slab_of(llm, prompt)
        output = preempted(llm, prompt, greedy(40, extra_args={"deltamem_session": "p"}), after).outputs[0]
        assert output.token_ids == expected[0]
        slab = session_of(llm, "p").slab
    assert torch.equal(slab, expected[1])


def test_a_restored_session_goes_on_as_if_it_had_never_ended(folders):
    """In a model of sliding and full layers: the windows are part of the slot."""
    with engine(folders("gemma3-mixed"), settings=SMALL) as llm:
        prompt = tokens(200)
        prompt += slab_of(llm, prompt, name="talk")[0] + tokens(70, seed=1)
        expected = slab_of(llm, prompt, name="afresh")
        turn = greedy(1, extra_args={"deltamem_session": "talk"})
        said = llm.generate([{"prompt_token_ids": prompt[:-1]}], turn, use_tqdm=False)[0].kv_transfer_params
        assert said["deltamem_session"]["history"] == "restored"
        resumed = slab_of(llm, prompt, name="talk")
    assert resumed[0] == expected[0] and torch.equal(resumed[1], expected[1])


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed"])
def test_a_session_goes_back_to_where_the_prompt_differs(folders, family):
    """Inside the segment that was open at the end, 288 to 289, or at the end of the prompt, 192 to 207."""

    def answer(llm, prompt, count, name):
        params = greedy(count, extra_args={"deltamem_session": name})
        out = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
        return list(out.outputs[0].token_ids), out.kv_transfer_params["deltamem_session"]

    with engine(folders(family), settings=SMALL) as llm:
        said = tokens(200)
        said += answer(llm, said, 90, "talk")[0]
        for kept, restored in ((288, 288), (287, 207), (207, 207), (200, 200), (192, 192), (191, None)):
            answer(llm, said[:200], 90, "talk")
            prompt = said[:kept] + [said[kept] ^ 1] + tokens(40, seed=1)
            (text, told), (fresh, _) = answer(llm, prompt, 20, "talk"), answer(llm, prompt, 20, f"fresh-{kept}")
            assert text == fresh and told.get("restored_tokens") == restored
            assert told["history"] == ("restored" if restored else "other history")
            slabs = [slab_of(llm, prompt + text, 1, name)[1] for name in ("talk", f"fresh-{kept}")]
            assert torch.equal(*slabs), f"went back to {restored}"
        answer(llm, said[:200], 90, "talk")
        again, told = answer(llm, said[:200], 90, "talk")
        assert again == said[200:] and told["restored_tokens"] == 199, "one token is computed"


def test_a_session_goes_back_to_before_a_step_with_the_prompts_of_others(folders):
    """There the answer's first merge is part of the forward pass."""
    with engine(folders("llama"), settings=SMALL) as llm:
        core, prompt = llm.llm_engine, tokens(200)
        core.add_request("talk", {"prompt_token_ids": prompt}, greedy(20, extra_args={"deltamem_session": "talk"}))
        for i in range(20):
            core.add_request(f"other-{i}", {"prompt_token_ids": tokens(30, seed=i)}, greedy(1))
            core.step()
        while core.has_unfinished_requests():
            core.step()
        prompt += tokens(40, seed=1)
        turns = [greedy(20, extra_args={"deltamem_session": name}) for name in ("talk", "fresh")]
        outs = [llm.generate([{"prompt_token_ids": prompt}], turn, use_tqdm=False)[0] for turn in turns]
        assert outs[0].kv_transfer_params["deltamem_session"]["restored_tokens"] == 200
        assert outs[0].outputs[0].token_ids == outs[1].outputs[0].token_ids
        assert torch.equal(
            *(slab_of(llm, prompt + list(outs[1].outputs[0].token_ids), 1, n)[1] for n in ("talk", "fresh"))
        )


@STEPS
def test_a_disk_holds_up_nobody(folders, tmp_path, steps):
    """While a session is written its next turn goes on; while it is read, or another process writes it, others do."""
    from vllm_deltamem.carrier import Read, Write
    from vllm_deltamem.enginestore import open_store
    from vllm_deltamem.sessionname import tenant_of
    from vllm_deltamem.sessions import SessionStore

    settings = SMALL | {"sessions": {"directory": str(tmp_path), "host_bytes": 1 << 20}}
    prompt, others, talk = tokens(200), [tokens(60, seed=i) for i in range(5)], {"deltamem_session": "talk"}
    with steps(), engine(folders("llama"), settings=settings, max_num_seqs=2) as llm:
        core = llm.llm_engine
        expected = generate(llm, others, greedy(30))
        said, _ = slab_of(llm, prompt, name="fresh")
        follows = prompt + said + tokens(20, seed=9)
        after, state = slab_of(llm, follows, name="fresh")

        def go_on(name):
            """What others are answered while the next turn waits: nothing less."""
            core.add_request(name, {"prompt_token_ids": follows}, greedy(40, extra_args=talk))
            for i, other in enumerate(others):
                core.add_request(f"{name}-{i}", {"prompt_token_ids": other}, greedy(30))
            finished = {}
            while len(finished) < len(others):
                finished |= {o.request_id: list(o.outputs[0].token_ids) for o in core.step() if o.finished}
            assert [finished.pop(f"{name}-{i}") for i in range(len(others))] == expected and not finished

        def turn_of(name):
            while core.has_unfinished_requests():
                done = [o for o in core.step() if o.finished]
            (out,) = done
            assert out.request_id == name and list(out.outputs[0].token_ids) == after
            return out.kv_transfer_params["deltamem_session"]["history"]

        def next_turn():
            core.add_request("at once", {"prompt_token_ids": follows}, greedy(40, extra_args=talk))
            return turn_of("at once")

        ours = open_store(core.vllm_config, 0)
        with gated(Write) as gate:
            assert generate(llm, [prompt], greedy(40, extra_args=talk)) == [said]
            assert generate(llm, others, greedy(30)) == expected
            assert next_turn() == "restored" and ours.peek(tenant_of(None), "talk") is None
            gate.set()
        first = session_of(llm, "talk")
        assert torch.equal(first.slab, state)
        with gated(Write) as gate:
            generate(llm, [prompt], greedy(40, extra_args=talk))
            assert ours.erase(tenant_of(None), "talk")
            assert next_turn() == "new"
            gate.set()
        assert torch.equal(session_of(llm, "talk").slab, state)

        theirs = SessionStore(ours.settings, ours._fingerprint)
        generate(llm, [prompt], greedy(40, extra_args=talk))
        kept = session_of(llm, "talk")
        ours.erase(tenant_of(None), "talk")
        save_id = theirs.begin(tenant_of(None), "talk")
        theirs.expect(tenant_of(None), "talk", save_id)
        go_on("waits for another process")
        theirs.save(tenant_of(None), "talk", kept.tokens, kept.slab, save_id)
        assert turn_of("waits for another process") == "restored"
        assert torch.equal(session_of(llm, "talk").slab, state)
        with gated(Read) as gate:
            generate(llm, [prompt], greedy(40, extra_args=talk))
            go_on("waits for the reader")
            gate.set()
            assert turn_of("waits for the reader") == "restored"
        assert torch.equal(session_of(llm, "talk").slab, state)
        with gated(Read) as gate:  # its client goes away meanwhile
            go_on("goes away")
            core.abort_request(["goes away"])
            gate.set()
            assert generate(llm, others, greedy(30)) == expected
        scheduler = core.engine_core.engine_core.scheduler
        assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == scheduler.kv_cache_config.num_blocks - 1
    assert not list(tmp_path.rglob("*.tmp"))


@STEPS
def test_workers_elsewhere_save_between_the_merges_of_others(folders, steps):
    """These are told with the next step what to save: here it ends a segment of another sequence."""
    prompts, counts = [tokens(40), tokens(54, seed=1), tokens(53, seed=2)], [10, 30, 30]
    elsewhere = patch("vllm_deltamem.connector.has_kv_transfer_group", return_value=False)
    with elsewhere, steps(), engine(folders("llama"), settings=SMALL) as llm:

        def ask(chosen, **extra):
            params = [greedy(counts[i], logprobs=0, **extra) for i in chosen]
            inputs = [{"prompt_token_ids": prompts[i]} for i in chosen]
            return read_answers(llm.generate(inputs, params, use_tqdm=False))

        together = ask([0, 1, 2], extra_args={"deltamem_session": "talk"})
        assert together == [answer for i in range(3) for answer in ask([i])]
        assert session_of(llm, "talk") is not None


def test_a_slot_that_workers_elsewhere_save_is_not_given_to_others(folders):
    talks = [tokens(40 + 9 * i, seed=i) for i in range(6)]
    elsewhere = patch("vllm_deltamem.connector.has_kv_transfer_group", return_value=False)
    with elsewhere, engine(folders("llama"), settings=SMALL, max_num_seqs=2, num_gpu_blocks_override=3) as llm:
        for history in ("new", "restored"):
            named = [greedy(16 + 5 * i, extra_args={"deltamem_session": f"talk-{i}"}) for i in range(len(talks))]
            outs = llm.generate([{"prompt_token_ids": talk} for talk in talks], named, use_tqdm=False)
            answers = [list(out.outputs[0].token_ids) for out in outs]
            assert answers == generate(llm, talks, [greedy(16 + 5 * i) for i in range(len(talks))])
            assert {out.kv_transfer_params["deltamem_session"]["history"] for out in outs} == {history}
            talks = [talk + answer + tokens(7, seed=9) for talk, answer in zip(talks, answers, strict=True)]


def test_many_requests_start_from_one_session_that_stays(folders):
    """As questions on one document do, and conversations that part."""
    document, tails = tokens(200), [tokens(30 + i, seed=1 + i) for i in range(3)]

    def ask(llm, **names):
        options = [greedy(20, extra_args={f"deltamem_{k}": v.format(i) for k, v in names.items()}) for i in range(3)]
        outs = llm.generate([{"prompt_token_ids": document + t} for t in tails], options, use_tqdm=False)
        said = [out.kv_transfer_params["deltamem_session"] for out in outs]
        return [list(out.outputs[0].token_ids) for out in outs], said

    with engine(folders("llama"), settings=SMALL) as llm:
        answers = [slab_of(llm, document + tail, 20, f"fresh-{i}")[0] for i, tail in enumerate(tails)]
        generate(llm, [document], greedy(1, extra_args={"deltamem_session": "document"}))
        for _ in range(2):  # it has not changed
            restored = {"name": "document", "history": "restored", "restored_tokens": 200}
            assert ask(llm, session_from="document") == (answers, 3 * [restored])
        scored = greedy(20, prompt_logprobs=0, extra_args={"deltamem_session_from": "document"})
        out = llm.generate([{"prompt_token_ids": document + tails[0]}], scored, use_tqdm=False)[0]
        assert list(out.outputs[0].token_ids) == answers[0] and all(out.prompt_logprobs[1:])
        assert out.kv_transfer_params["deltamem_session"]["history"] == "prompt logprobs"
        texts, said = ask(llm, session_from="document", session="branch-{}")
        assert texts == answers and [s["name"] for s in said] == ["branch-0", "branch-1", "branch-2"]
        assert all(s["history"] == "restored" and s["saved_tokens"] >= 230 for s in said)
        for i, text in enumerate(answers):
            prompt = document + tails[i] + text
            again = slab_of(llm, prompt, 20, f"branch-{i}"), slab_of(llm, prompt, 20, f"fresh-{i}")
            assert again[0][0] == again[1][0] and torch.equal(again[0][1], again[1][1])
        assert ask(llm, session_from="nowhere") == (answers, 3 * [{"name": "nowhere", "history": "new"}])


def test_a_session_goes_on_with_its_own_pins_only(folders):
    with engine(folders("llama"), settings=SMALL) as llm:

        def turn(prompt, *pins, name="pinned"):
            """Answer, saved state, and what became of the session."""
            extra = {"deltamem_session": name} | ({"deltamem_pin_tokens": list(pins)} if pins else {})
            out = llm.generate([{"prompt_token_ids": prompt}], greedy(20, extra_args=extra), use_tqdm=False)[0]
            saved = session_of(llm, name).slab
            return list(out.outputs[0].token_ids), saved, out.kv_transfer_params["deltamem_session"]["history"]

        prompt = tokens(100)
        prompt += turn(prompt, 20, 23)[0] + tokens(30, seed=1)
        for i, (pins, history) in enumerate(
            [((20, 23), "restored"), ((20, 23, 140, 142), "restored"), ((), "other pins"), ((40, 42), "other pins")]
        ):
            turn(tokens(100), 20, 23, name=f"talk-{i}")
            again, fresh = turn(prompt, *pins, name=f"talk-{i}"), turn(prompt, *pins, name=f"fresh-{i}")
            assert (again[2], fresh[2]) == (history, "new")
            assert again[0] == fresh[0] and torch.equal(again[1], fresh[1]), f"pins {pins}"


def test_pins_past_the_end_that_a_session_goes_back_to_are_gone(folders):
    with engine(folders("llama"), settings=SMALL) as llm:
        pins = {"deltamem_session": "back", "deltamem_pin_tokens": [203, 206]}
        generate(llm, [tokens(206)], greedy(1, extra_args=pins))
        prompt = tokens(203) + tokens(60, seed=1)
        (again, slab), (fresh, expected) = (slab_of(llm, prompt, name=name) for name in ("back", "fresh"))
        assert again == fresh and torch.equal(slab, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="mends vLLM's CPU runner")
def test_a_seed_does_not_depend_on_chunks(folders):
    """Sampled tokens are those of the seed, in a prompt of one chunk or of many, alone, beside others or preempted."""
    from vllm import SamplingParams

    def seeded(n):
        return SamplingParams(seed=n, max_tokens=8, ignore_eos=True, detokenize=False)

    def sampled(llm, lengths):
        prompts = [tokens(n, seed=n) for n in lengths]
        return dict(zip(lengths, generate(llm, prompts, [seeded(n) for n in lengths]), strict=True))

    with engine(folders("llama"), settings=SMALL) as llm:
        whole = sampled(llm, [300]) | sampled(llm, [210]) | sampled(llm, [7])
    with engine(folders("llama"), settings=SMALL, max_num_batched_tokens=64) as llm:
        assert sampled(llm, [300, 7, 210]) == whole
        for after in (2, 8):  # in the prompt, while decoding
            assert preempted(llm, tokens(300, seed=300), seeded(300), after).outputs[0].token_ids == whole[300]


def test_slots_come_back(folders):
    """A pool of few slots serves many requests in turn, long and short ones."""
    with engine(folders("llama"), settings=SMALL, max_num_seqs=3) as llm:
        pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        results = generate(llm, [tokens(n, seed=n) for n in range(20, 420, 40)], greedy(10))
        assert [len(r) for r in results] == [10] * 10
        assert pool.get_num_free_blocks() == free


def test_a_dropped_cache_is_freed(folders):
    """vLLM captures graphs with a small cache before it makes the real one: nothing of ours may hold that."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from vllm_deltamem.pool import SlotPool

    with engine(folders("llama"), settings=SMALL) as llm:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        config, prompt = runner.kv_cache_config, tokens(200)
        expected = generate(llm, [prompt], greedy(20))
        held = StorageWeakRef(SlotPool.serving().whole.rows.untyped_storage())
        runner._cleanup_profiling_kv_cache()
        assert held.expired() and SlotPool.serving() is None
        runner.initialize_kv_cache(config)
        assert generate(llm, [prompt], greedy(20)) == expected
        assert (
            SlotPool.serving().whole.rows.untyped_storage().data_ptr()
            == runner.kv_caches[0].untyped_storage().data_ptr()
        )


def turn(llm, prompt, name="talk"):
    """What the response to a turn of a session says of it."""
    params = greedy(4, extra_args={"deltamem_session": name})
    out = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
    return (out.kv_transfer_params or {}).get("deltamem_session")


@pytest.mark.parametrize("kept", ["host", "directory"])
def test_a_reset_of_all_caches_leaves_no_session(folders, tmp_path, kept):
    """As after new weights. What is saved from then on is restored."""
    settings = SMALL | {"sessions": {"directory": str(tmp_path / "sessions")} if kept == "directory" else {}}
    prompt = tokens(60)
    with engine(folders("llama"), settings=settings) as llm:
        assert turn(llm, prompt)["history"] == "new" and turn(llm, prompt)["history"] == "restored"
        assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        assert turn(llm, prompt)["history"] in ("reset", "new"), "the note of one in host memory may be gone"
        assert turn(llm, prompt)["history"] == "restored"


def test_a_directory_that_is_gone_costs_sessions_only(folders, tmp_path):
    settings = SMALL | {"sessions": {"directory": str(tmp_path / "sessions")}}
    with engine(folders("llama"), settings=settings) as llm:
        assert turn(llm, tokens(60))["history"] == "new"
        session_of(llm, "talk")
        shutil.rmtree(tmp_path / "sessions")
        for _ in range(2):
            answered = turn(llm, tokens(60))
            assert not answered or "saved_tokens" not in answered


def test_a_session_in_use_outlasts_those_that_are_not(folders):
    settings = SMALL | {"sessions": {"max_sessions": 2}}
    with engine(folders("llama"), settings=settings) as llm:
        turn(llm, tokens(60), "document")
        for i in range(3):
            params = greedy(4, extra_args={"deltamem_session_from": "document"})
            out = llm.generate([{"prompt_token_ids": tokens(60) + [i]}], params, use_tqdm=False)[0]
            assert out.kv_transfer_params["deltamem_session"]["history"] == "restored"
            turn(llm, tokens(60, seed=i + 1), f"other-{i}")
            session_of(llm, f"other-{i}")  # written before the document is used again


def test_an_answer_that_repeats_itself_is_saved(folders):
    from vllm.sampling_params import RepetitionDetectionParams

    with engine(folders("llama"), settings=SMALL) as llm:
        params = greedy(40, extra_args={"deltamem_session": "talk"}, logit_bias={7: 100.0})
        params.repetition_detection = RepetitionDetectionParams(max_pattern_size=1, min_count=5)
        out = llm.generate([{"prompt_token_ids": tokens(60)}], params, use_tqdm=False)[0]
        assert out.outputs[0].finish_reason == "repetition"
        assert turn(llm, tokens(60) + [7, 7, 7, 1])["restored_tokens"] > 60


def test_sessions_of_an_idle_engine_expire(folders):
    from vllm_deltamem.enginestore import open_store
    from vllm_deltamem.sessionname import tenant_of

    settings = SMALL | {"sessions": {"max_age_s": 2}}
    with engine(folders("llama"), settings=settings) as llm:
        store = open_store(llm.llm_engine.vllm_config, 0)
        generate(llm, [tokens(50)], greedy(5, extra_args={"deltamem_session": "idle"}))
        session_of(llm, "idle")
        (header,) = store.list(tenant_of(None))
        assert header.n_tokens >= 54, "saved without another step"
        end = time.monotonic() + 20
        while store._host.headers() and time.monotonic() < end:
            time.sleep(0.1)
        assert not store._host.headers()
    assert all(thread.name != "deltamem-sweep" for thread in threading.enumerate())
