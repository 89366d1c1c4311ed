"""Two tensor-parallel workers under vLLM's own executor: a session is theirs together; test_ray.py has Ray's."""

import pytest
from test_server import chat, complete, start_server, two_turns, user

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


def test_two_workers_without_a_directory_keep_no_sessions(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    server = start_server(tmp_path, {}, "--tensor-parallel-size", "2")
    try:
        answer, _ = chat(server, [user("Why thirteen?")])
        body = {"prompt": "Why?", "vllm_xargs": {"deltamem_session": "a"}}
        refused = complete(server, **body)
        assert refused.status_code == 400 and "sessions.directory" in refused.text
        assert chat(server, [user("Why thirteen?")])[0] == answer
    finally:
        server.stop()
