"""Two workers under vLLM's own executor, tensor-parallel or of two engines: sessions are theirs together.

test_ray.py has Ray's.
"""

import re

import pytest
import requests
from test_server import ANN, STORY, assert_restored, chat, complete, start_server, two_turns, user

pytestmark = pytest.mark.slow


def test_a_session_of_two_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    folder = tmp_path / "sessions"
    kept = {"directory": str(folder), "host_bytes": 0}
    server = start_server(tmp_path, kept, "--tensor-parallel-size", "2")
    try:
        messages = two_turns(server, "left")
        fresh, _ = chat(server, messages)
        assert len(list(folder.rglob("*-0of2.safetensors"))) == len(list(folder.rglob("*-1of2.safetensors"))) == 1
        two_turns(server, "whole")
        answer, said = chat(server, messages, "whole")
        assert answer == fresh and said["history"] == "restored"
        chat(server, messages)  # a step, in which what came before is saved
        others = set(folder.rglob("*"))
        two_turns(server, "half")
        chat(server, messages)
        (second,) = set(folder.rglob("*-1of2.safetensors")) - others
        second.write_bytes(second.read_bytes()[:-5] + b"other")
        answer, said = chat(server, messages, "half")
        assert answer == fresh and said["history"] == "altered", "the worker that could read its file forgets it"
    finally:
        server.stop()
    server = start_server(tmp_path, kept)
    try:
        answer, said = chat(server, messages, "left")
        assert answer == fresh and said["history"] == "fingerprint", "saved by two workers, refused by one"
    finally:
        server.stop()


def test_two_workers_go_back_behind_an_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    server = start_server(tmp_path, {"directory": str(tmp_path / "sessions")}, "--tensor-parallel-size", "2")
    try:
        messages = [user(STORY[:300])]
        answer, _ = chat(server, messages, "told", max_tokens=60)
        messages += [{"role": "assistant", "content": answer[20:]}, user("Go on.")]
        assert_restored(server, messages, "told")
    finally:
        server.stop()


def test_engines_take_turns_in_a_session(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    server = start_server(tmp_path, {"directory": str(tmp_path / "sessions")}, "--data-parallel-size", "2")
    try:
        messages, histories = [user("Why thirteen?")], []
        for turn in range(6):
            answer, said = chat(server, messages, "shared", max_tokens=5)
            if turn % 2:  # or each engine might have every second request
                assert answer == chat(server, messages, max_tokens=5)[0]
            histories.append(said["history"])
            messages += [{"role": "assistant", "content": answer}, user("And then?")]
        assert histories == ["new"] + 5 * ["restored"]
        text = requests.get(f"{server.url}/metrics", timeout=30).text
        saved = re.findall(r'^vllm:deltamem_sessions_saved_total{engine="(\d)".*} (\d)', text, re.M)
        assert [engine for engine, count in saved if int(count)] == ["0", "1"], "one engine had all turns"
        assert server.call("DELETE", "/v1/deltamem/sessions/shared", ANN).ok
        assert chat(server, messages, "shared")[1]["history"] == "new"
    finally:
        server.stop()


@pytest.mark.parametrize("option", ["--tensor-parallel-size", "--data-parallel-size"])
def test_two_workers_without_a_directory_keep_no_sessions(tmp_path, monkeypatch, option):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    server = start_server(tmp_path, {}, option, "2")
    try:
        answer, _ = chat(server, [user("Why thirteen?")])
        body = {"prompt": "Why?", "vllm_xargs": {"deltamem_session": "a"}}
        refused = complete(server, **body)
        assert refused.status_code == 400 and "sessions.directory" in refused.text
        assert chat(server, [user("Why thirteen?")])[0] == answer
    finally:
        server.stop()
