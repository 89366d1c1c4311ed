"""A real `vllm serve` of a tiny model: metrics, sessions over HTTP, clients that misbehave, kill -9."""

import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from benchmarks.server import VllmServer
from benchmarks.tiny_llama import save_tiny_llama
from vllm_deltamem import cli

SLOTS = 8
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
ANN, BOB = "key-of-ann", "key-of-bob"
STORY = "It was a bright cold day in April, and the clocks were striking thirteen. " * 10


def start_server(folder, sessions, *more):
    settings = {"memory": 160, "segment": 16, "window": 32, "pinned": 16, "sessions": sessions}
    options = ["--attention-backend", "deltamem", "--additional-config", json.dumps({"deltamem": settings})]
    options += ["--max-num-seqs", str(SLOTS), "--num-gpu-blocks-override", str(SLOTS + 1), "--enforce-eager"]
    options += ["--dtype", "float32", "--served-model-name", "tiny"]
    options += ["--api-key", ANN, BOB, "--disable-uvicorn-access-log", "--enable-prompt-tokens-details", *more]
    return VllmServer(save_tiny_llama(folder / "model"), options, folder / "log", ONE_THREAD).start()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "key").write_text("5a" * 32)
    # Host memory for three sessions: those before them come back from the directory.
    kept = {"directory": str(folder / "sessions"), "key_file": str(folder / "key"), "host_bytes": 500_000}
    server = start_server(folder, kept)
    server.sessions = folder / "sessions"
    yield server
    server.stop()


def complete(server, prompt, key=ANN, **body):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0} | body
    return server.call("POST", "/v1/completions", key, json=body)


def chat(server, messages, session=None, key=ANN, **body):
    """The answer and what the response says of the session; without one, and a cache_salt, all of it is computed."""
    body = {
        "model": "tiny",
        "messages": messages,
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        "cache_salt": uuid.uuid4().hex,
    } | body
    if session:
        body["vllm_xargs"] = {"deltamem_session": session}
    response = server.call("POST", "/v1/chat/completions", key, json=body)
    assert response.ok, response.text
    said = response.json()
    answer = said["choices"][0]["message"]["content"]
    return answer, (said.get("kv_transfer_params") or {}).get("deltamem_session")


def user(text):
    return {"role": "user", "content": text}


def two_turns(server, session, key=ANN, question="Why thirteen?"):
    """Messages up to the second question, after a first turn that saved a session."""
    first = [user(STORY[:300])]
    answer, said = chat(server, first, session, key)
    assert said["history"] == "new"
    return [*first, {"role": "assistant", "content": answer}, user(question)]


def assert_restored(server, messages, session):
    """A turn of a session whose first prompt was STORY[:300] goes on from it, and is answered as without one."""
    fresh, _ = chat(server, messages)
    answer, said = chat(server, messages, session)
    assert answer == fresh and said["history"] == "restored" and said["restored_tokens"] > 300


def listed(server, key, expected):
    """The sessions of a key by name, once `expected` is there: a save may end after its response."""
    for _ in range(100):
        found = {s["name"]: s for s in server.call("GET", "/v1/deltamem/sessions", key).json()["data"]}
        if expected in found:
            break
        time.sleep(0.1)
    return found


def the_file(server, others):
    """Of the one session that was saved since, once that of its turn before is gone."""
    for _ in range(100):
        found = set(server.sessions.rglob("*.safetensors")) - others
        if len(found) == 1:
            break
        time.sleep(0.1)
    return found.pop()


def slots_used(server):
    """Once nothing runs any more."""
    for _ in range(100):
        used = server.metrics()["slots_used"]
        if not used:
            break
        time.sleep(0.1)
    return used


def assert_serves(server):
    assert complete(server, "Hello").ok
    assert slots_used(server) == 0
    assert server.metrics()["slots_free"] == SLOTS


def test_gauges_before_any_request(server):
    metrics = server.metrics()
    assert metrics["slots_free"] == SLOTS and metrics["slots_used"] == 0
    assert metrics["bytes_per_sequence"] > 100_000


def test_bytes_per_sequence_do_not_grow(server):
    found = []
    for prompt in (STORY[:30], STORY):
        assert complete(server, prompt).ok
        found.append(server.metrics())
    short, long = found
    assert short["bytes_per_sequence"] == long["bytes_per_sequence"] > 0
    assert long["full_attention_bytes"] > 10 * short["full_attention_bytes"]
    assert long["full_attention_bytes"] > 3 * long["bytes_per_sequence"]
    assert long["tokens_written"] > short["tokens_written"] + 700 and long["tokens_merged"] > 0


def test_start_says_what_a_sequence_takes(server):
    said = [line for line in server.log.read_text().splitlines() if "bytes per sequence" in line]
    assert len(said) == 1 and f"{SLOTS} sequences fit" in said[0]


def test_kernels_are_compiled_before_the_first_request(server):
    log = server.log.read_text()
    assert 0 < log.find("deltamem compiles its CPU kernels") < log.find("Application startup complete")


def test_a_conversation_goes_on_in_the_slot_of_its_last_turn(server):
    first = [user(STORY[:300])]
    answer, said = chat(server, first, cache_salt="ours")
    messages = [*first, {"role": "assistant", "content": answer}, user("Why thirteen?")]
    fresh, before = chat(server, messages)[0], server.metrics()
    assert (chat(server, messages, cache_salt="ours")[0], said) == (fresh, None)
    metrics = server.metrics()
    assert metrics["prompts_continued"] == before["prompts_continued"] + 1
    assert metrics["tokens_continued"] - before["tokens_continued"] > 300
    assert metrics["tokens_written"] - before["tokens_written"] < 100


def test_session_continues(server):
    messages = two_turns(server, "continued")
    fresh, said = chat(server, messages)
    assert said is None
    before = server.metrics()
    answer, said = chat(server, messages, "continued")
    after = server.metrics()
    assert answer == fresh and said["history"] == "restored"
    assert after["sessions_restored"] == before["sessions_restored"] + 1
    assert after["tokens_written"] - before["tokens_written"] < 60
    assert after["session_tokens_reused"] - before["session_tokens_reused"] > 300


def test_questions_start_from_a_session_that_stays(server):
    questions = [two_turns(server, "asked"), two_turns(server, "as-often", question="And who was it?")]
    kept = listed(server, ANN, "asked")["asked"]
    kept.pop("age_s")
    for messages in questions:
        fresh, _ = chat(server, messages)
        for key, history in ((ANN, "restored"), (BOB, "new")):  # Bob has none of that name
            answer, said = chat(server, messages, key=key, vllm_xargs={"deltamem_session_from": "asked"})
            restored = {"restored_tokens": kept["tokens"]} if key == ANN else {}
            assert answer == fresh and said == {"name": "asked", "history": history} | restored
    assert listed(server, ANN, "asked")["asked"].items() >= kept.items()


def test_an_answer_that_a_stop_string_ends_is_saved(server):
    """vLLM aborts such a request, as it does those whose clients have gone."""
    first = [user(STORY[:300])]
    answer, _ = chat(server, first, max_tokens=40)
    stop = answer[len(answer) // 2 :][:3]
    shorter, _ = chat(server, first, "stopped", max_tokens=40, stop=[stop])
    assert shorter == answer[: answer.find(stop)] and "stopped" in listed(server, ANN, "stopped")
    messages = [*first, {"role": "assistant", "content": shorter}, user("Go on.")]
    assert_restored(server, messages, "stopped")


def test_a_history_may_tell_an_answer_otherwise(server):
    """As templates do that leave out reasoning, or write tool calls anew."""
    first = [user(STORY[:300])]
    answer, _ = chat(server, first, "told", max_tokens=60)
    messages = [*first, {"role": "assistant", "content": answer[len(answer) // 3 :]}, user("Go on.")]
    assert_restored(server, messages, "told")


def test_other_history_is_computed_anew(server):
    messages = two_turns(server, "changed")
    messages[0] = user(messages[0]["content"].replace("April", "March"))
    fresh, _ = chat(server, messages)
    answer, said = chat(server, messages, "changed")
    assert answer == fresh and said["history"] == "other history"


DAMAGES = {
    "altered": lambda raw: raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:],  # what only the worker reads
    "truncated": lambda raw: raw[:-100],
    "foreign": lambda raw: b"no session " * 99,
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_file_is_computed_anew(server, reason):
    chat(server, [user("Hello")])  # a step, in which what came before is saved
    others = set(server.sessions.rglob("*.safetensors"))
    messages = two_turns(server, reason)
    path = the_file(server, others)
    for i in range(4):  # push it out of host memory
        chat(server, [user("Hello")], f"pushing-{i}")
    path.write_bytes(DAMAGES[reason](path.read_bytes()))
    fresh, _ = chat(server, messages)
    before = server.metrics()
    answer, said = chat(server, messages, reason)
    after = server.metrics()
    assert answer == fresh and said["history"] == reason
    counters = ("sessions_saved", "sessions_refused", "sessions_restored", "session_tokens_reused")
    assert [after[name] - before[name] for name in counters] == [1, 1, 0, 0]
    messages += [{"role": "assistant", "content": answer}, user("And then?")]
    assert chat(server, messages, reason)[1]["history"] == "restored", "the turn has healed it"


def test_a_stream_says_what_was_restored(server):
    """vLLM's streams carry no kv_transfer_params."""
    messages = two_turns(server, "streamed")
    saved = listed(server, ANN, "streamed")["streamed"]["tokens"]
    body = {"model": "tiny", "messages": messages, "max_tokens": 4, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "vllm_xargs": {"deltamem_session": "streamed"}}
    text = server.call("POST", "/v1/chat/completions", ANN, json=body).text
    usage = json.loads(text.split("data: ")[-2])["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == saved > 300


def test_session_is_out_of_reach_for_another_key(server):
    messages = two_turns(server, "private")
    assert chat(server, messages, "private", BOB)[1]["history"] == "new"
    assert list(listed(server, BOB, "private")) == ["private"], "Bob's own of that name, and none of Ann's"
    assert server.call("DELETE", "/v1/deltamem/sessions/private", BOB).ok
    assert chat(server, messages, "private")[1]["history"] == "restored", "Ann's is still there"
    assert server.call("DELETE", "/v1/deltamem/sessions/private", BOB).status_code == 404
    assert server.call("GET", "/v1/deltamem/sessions").status_code == 401


def test_list_and_erase(server, capsys):
    messages = two_turns(server, "listed")
    found = listed(server, ANN, "listed")["listed"]
    assert found["tokens"] > 300 and 0 <= found["age_s"] < 60
    assert found["bytes"] == server.metrics()["bytes_per_sequence"]
    files = set(server.sessions.rglob("*.safetensors"))
    assert server.call("DELETE", "/v1/deltamem/sessions/listed", ANN).ok
    assert len(files - set(server.sessions.rglob("*.safetensors"))) == 1
    assert server.call("DELETE", "/v1/deltamem/sessions/listed", ANN).status_code == 404
    assert server.call("DELETE", "/v1/deltamem/sessions/.hidden", ANN).status_code == 400
    assert chat(server, messages, "listed")[1]["history"] == "new", "erased in host memory too"
    listed(server, ANN, "listed")

    login = ["--url", server.url, "--api-key", ANN]
    assert cli.main(["sessions", "list", *login]) == 0
    assert "listed " in capsys.readouterr().out
    assert cli.main(["sessions", "erase", "listed", *login]) == 0
    assert cli.main(["sessions", "erase", "listed", *login]) == 2
    assert "there is no session listed" in capsys.readouterr().err


def erased_while_running(server, session):
    """Erase a session in the middle of a streamed turn of it; nothing of that turn may be kept."""
    messages = two_turns(server, session)
    body = {"model": "tiny", "messages": messages, "max_tokens": 200, "ignore_eos": True, "stream": True}
    body |= {"vllm_xargs": {"deltamem_session": session}, "stream_options": {"include_usage": True}}
    with requests.post(
        f"{server.url}/v1/chat/completions", json=body, stream=True, timeout=120,
        headers={"Authorization": f"Bearer {ANN}"},
    ) as response:  # fmt: skip
        lines = response.iter_lines()
        next(lines)
        assert server.call("DELETE", f"/v1/deltamem/sessions/{session}", ANN).ok
        events = [line.removeprefix(b"data: ") for line in lines if line]
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 200, "the answer itself goes on"
    chat(server, [user("Hello")], "after-the-erasure")
    assert session not in listed(server, ANN, "after-the-erasure")
    assert chat(server, messages, session)[1]["history"] != "restored"
    assert session in listed(server, ANN, session), "a later turn is kept again"


def test_erased_while_running(server):
    erased_while_running(server, "erased-running")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"deltamem_sesion": "a"}, "Unknown option 'deltamem_sesion'"),
        ({"deltamem_session": "../a"}, "a session name has"),
        ({"deltamem_session": 3}, "a session name has"),
        ({"deltamem_pin": 3}, "must be a text or a list of texts"),
        ({"deltamem_pin": "not in there"}, "the prompt does not contain"),
        ({"deltamem_pin": STORY[:60]}, "this server allows 16 tokens"),
        ({"deltamem_pin_tokens": [0, 4, 9]}, "first, end, first, end"),
        ({"deltamem_pin_tokens": [0, 9000]}, "is not a range in a prompt"),
    ],
)
def test_malformed_options(server, options, message):
    response = complete(server, STORY[:100], vllm_xargs=options)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert complete(server, "Hello").ok


def test_prompts_past_the_limit(server):
    for session in ({}, {"vllm_xargs": {"deltamem_session": "long"}}):
        response = complete(server, STORY * 2, **session)
        assert response.status_code == 400 and "1024" in response.json()["error"]["message"]
    assert_serves(server)


def test_aborts_mid_stream(server):
    def abort(i):
        body = {"model": "tiny", "prompt": STORY[i : i + 99], "max_tokens": 900, "ignore_eos": True, "stream": True}
        if i % 2:
            body["vllm_xargs"] = {"deltamem_session": f"aborted-{i}"}
        with requests.post(
            f"{server.url}/v1/completions", json=body, stream=True, timeout=120,
            headers={"Authorization": f"Bearer {ANN}"},
        ) as response:  # fmt: skip
            next(response.iter_lines())

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(abort, range(12)))
    assert_serves(server)
    chat(server, [user("Hello")], "after-the-aborts")
    assert not any(name.startswith("aborted") for name in listed(server, ANN, "after-the-aborts"))


def test_200_requests_at_once(server):
    prompts = [STORY[i % 5 : 20 + i % 10] for i in range(200)]
    xargs = [{"vllm_xargs": {"deltamem_session": f"crowd-{i % 5}"}} if i % 4 == 0 else {} for i in range(200)]
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda p, x: complete(server, p, max_tokens=4, **x), prompts, xargs))
    assert [answer.status_code for answer in answers] == [200] * 200
    texts = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        texts.setdefault(prompt, set()).add(answer.json()["choices"][0]["text"])
    assert all(len(found) == 1 for found in texts.values()), "equal prompts, equal answers"
    assert_serves(server)


def killed_during_saves(server, turns: float):
    """kill -9 while turns are being saved, restart, and check what is restored."""
    kept = {name: two_turns(server, name) for name in (f"kept-{turns}", f"other-{turns}")}
    answers = {name: chat(server, messages)[0] for name, messages in kept.items()}
    with ThreadPoolExecutor(8) as pool:

        def save(i):
            for turn in range(100):
                chat(server, [user(f"{turn} {STORY[:200]}")], f"saving-{turns}-{i}")

        saving = [pool.submit(save, i) for i in range(6)]
        time.sleep(turns)
        server.kill()
        assert all(isinstance(future.exception(), requests.RequestException) for future in saving)
    server.start()
    for name, messages in kept.items():
        answer, said = chat(server, messages, name)
        assert said["history"] == "restored" and answer == answers[name]
    for i in range(6):
        assert chat(server, [user("Hello")], f"saving-{turns}-{i}")[1]["history"] in ("new", "other history")
    assert_serves(server)
    listed(server, ANN, f"saving-{turns}-5")
    assert not list(server.sessions.rglob("*.tmp")), "what was being written is wiped"


def test_kill_during_saves(server):
    killed_during_saves(server, turns=1.0)


@pytest.mark.slow
def test_kill_during_saves_again_and_again(server):
    for turns in (0.05, 0.2, 0.4, 0.8, 1.6, 3.2):
        killed_during_saves(server, turns)


def test_sessions_in_host_memory_alone(server, tmp_path):
    """Without a directory the API server, the scheduler and the worker are three processes."""
    server.stop()
    server = start_server(tmp_path, {})
    try:
        messages = two_turns(server, "held")
        fresh, _ = chat(server, messages)
        assert list(listed(server, ANN, "held")) == ["held"]
        answer, said = chat(server, messages, "held")
        assert answer == fresh and said["history"] == "restored"
        assert server.call("DELETE", "/v1/deltamem/sessions/held", BOB).status_code == 404
        assert server.call("DELETE", "/v1/deltamem/sessions/held", ANN).ok
        assert not server.call("GET", "/v1/deltamem/sessions", ANN).json()["data"]
        before = server.metrics()["tokens_written"]
        messages += [{"role": "assistant", "content": answer}, user("And then?")]
        fresh, _ = chat(server, messages)
        answer, _ = chat(server, messages, "held")
        assert answer == fresh and server.metrics()["tokens_written"] - before > 700, "computed anew, twice"
        server.call("DELETE", "/v1/deltamem/sessions/held", ANN)
        erased_while_running(server, "erased-running")
        assert_serves(server)
    finally:
        server.stop()
