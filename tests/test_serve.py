"""The parts of the application on Ray Serve, without a cluster or an engine; test_serve_run.py has the whole."""

import asyncio
import json
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

pytest.importorskip("ray.serve")

from ray.exceptions import ActorDiedError
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_deltamem.gateway import ATTEMPTS, Gateway, session_of
from vllm_deltamem.replica import run_app
from vllm_deltamem.serve import app
from vllm_deltamem.serveoptions import command_line, parse
from vllm_deltamem.slotscaling import SlotScaling


def test_options_become_a_command_line():
    options = {
        "model": "m",
        "max-model-len": 8192,
        "enforce-eager": True,
        "enable-prefix-caching": False,
        "served_model_name": ["a", "b"],
        "additional-config": {"deltamem": {"memory": 64}},
        "chat-template": None,
        "allowed-origins": ["x"],
        "lora-modules": [{"name": "l", "path": "p"}],
        "middleware": ["m.n", "m.o"],
        "hf-token": "-k",
    }
    assert command_line(options, make_arg_parser(FlexibleArgumentParser())) == [
        *("--model", "m", "--max-model-len", "8192", "--enforce-eager", "--no-enable-prefix-caching"),
        *("--served_model_name", "a", "b", "--additional-config", '{"deltamem": {"memory": 64}}'),
        *("--allowed-origins", '["x"]', "--lora-modules", '{"name": "l", "path": "p"}'),
        *("--middleware", "m.n", "--middleware", "m.o", "--hf-token=-k"),
    ]


def test_a_model_must_be_named():
    with pytest.raises(ValueError, match="set `model`"):
        app({"max-model-len": 8192})


def test_options_are_those_of_vllm_serve(tmp_path):
    (tmp_path / "more.yaml").write_text("max-model-len: 777")
    options = {"model": "m", "served_model_name": ["a", "b"], "allowed-origins": ["x"], "middleware": ["m.n"]}
    args = parse(options | {"config": str(tmp_path / "more.yaml")})
    assert (args.served_model_name, args.allowed_origins, args.middleware) == (["a", "b"], ["x"], ["m.n"])
    assert args.max_model_len == 777
    with pytest.raises(ValueError, match="args of the application: argument --max-model-len.*many"):
        parse({"max-model-len": "many"})


@pytest.mark.parametrize(
    "body, session",
    [
        ({"vllm_xargs": {"deltamem_session": "chat-1"}}, "chat-1"),
        ({"vllm_xargs": {"deltamem_session": "chat-1", "deltamem_session_from": "doc"}}, "doc"),
        ({"vllm_xargs": {"deltamem_session_from": "doc"}}, "doc"),
        ({"vllm_xargs": {}}, ""),
        ({"vllm_xargs": ["deltamem_session"]}, ""),
        ({"vllm_xargs": None}, ""),
        ({"messages": []}, ""),
        ([1], ""),
        ({"vllm_xargs": {"deltamem_session": "\ud800"}}, ""),  # Ray's router cannot send it
        ({"vllm_xargs": {"deltamem_session": ["chat-1"]}}, ""),
    ],
)
def test_session_of_a_request(body, session):
    assert session_of("/v1/chat/completions", json.dumps(body).encode()) == session


@pytest.mark.parametrize(
    "path, session",
    [("/v1/deltamem/sessions/a:1", "a:1"), ("/v1/deltamem/sessions", ""), ("/v1/deltamem/sessions/a/b", "")],
)
def test_session_in_a_path(path, session):
    assert session_of(path, b"") == session


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_not_json_has_no_session(body):
    assert session_of("/v1/completions", body) == ""


def scaling_context(slots: dict, wanted: dict, queued: float = 0) -> SimpleNamespace:
    metrics = {"slots": slots, "slots_wanted": wanted} if slots else {}
    return SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=queued, target_num_replicas=3)


def test_scaling_follows_the_slots_in_use():
    policy = SlotScaling(target=0.5)
    assert policy(scaling_context({"a": 16, "b": 16}, {"a": 16, "b": 0}))[0] == 2
    assert policy(scaling_context({"a": 16, "b": 16}, {"a": 30, "b": 16}, queued=2))[0] == 6
    assert policy(scaling_context({"a": 16, "b": 16}, {"a": 0, "b": 0}))[0] == 0
    assert policy(scaling_context({}, {}))[0] == 3, "no replica reports yet: stay"


@pytest.mark.parametrize("target", [0, 1.5])
def test_scaling_target_is_a_share(target):
    with pytest.raises(ValueError, match="share of the slots"):
        SlotScaling(target)


SCOPE = {
    "type": "http",
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/v1/completions",
    "query_string": b"",
    "root_path": "",
    "headers": [(b"content-type", b"application/json")],
}


async def collect(app, body: bytes) -> tuple[int, bytes]:
    messages = [message async for message in run_app(app, SCOPE, body)]
    return messages[0]["status"], b"".join(message["body"] for message in messages[1:])


def test_run_app_passes_the_request_and_the_answer():
    async def echo(scope, receive, send):
        body = await Request(scope, receive).body()
        await JSONResponse({"path": scope["path"], "body": body.decode()}, 201)(scope, receive, send)

    status, answer = asyncio.run(collect(echo, b"hello"))
    assert status == 201
    assert json.loads(answer) == {"path": "/v1/completions", "body": "hello"}


def test_run_app_raises_what_the_app_raises():
    async def broken(scope, receive, send):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        asyncio.run(collect(broken, b""))


def test_closing_the_answer_stops_the_app():
    stopped = []

    async def endless(scope, receive, send):
        async def tokens():
            try:
                yield b"first"
                await asyncio.sleep(3600)
            finally:
                stopped.append(True)

        await StreamingResponse(tokens())(scope, receive, send)

    async def leave_after_the_first_token():
        answer = run_app(endless, SCOPE, b"")
        assert (await anext(answer))["type"] == "http.response.start"
        assert (await anext(answer))["body"] == b"first"
        await answer.aclose()

    asyncio.run(leave_after_the_first_token())
    assert stopped


def test_children_of_a_killed_process_end():
    script = (
        "import subprocess, sys, time; from vllm_deltamem.replica import guard_children;"
        "child = subprocess.Popen(['sleep', '600']); guard = guard_children();"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
    child.wait(timeout=30)


class Replicas:
    """Stands for the handle of the replicas: each call yields the items of the next script."""

    def __init__(self, *scripts):
        self.scripts, self.sessions, self.calls = list(scripts), [], 0

    def options(self, session_id=None, **other):
        if session_id is not None:
            self.sessions.append(session_id)
        return self

    def remote(self, scope, body):
        self.calls += 1
        return Answer(self.scripts.pop(0))


class Answer:
    def __init__(self, script):
        self.script, self.cancelled = list(script), False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.script:
            raise StopAsyncIteration
        item = self.script.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self):
        self.cancelled = True


def ask(replicas: Replicas) -> tuple[int, bytes]:
    """Status and body that the gateway answers with."""
    body = json.dumps({"vllm_xargs": {"deltamem_session": "s"}}).encode()

    async def through():
        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        response = await Gateway(replicas)(Request(SCOPE, receive))
        messages = []

        async def send(message):
            messages.append(message)

        async def silent():
            await asyncio.Event().wait()

        await response({**SCOPE, "asgi": {"spec_version": "2.4"}}, silent, send)
        return messages[0]["status"], b"".join(m["body"] for m in messages[1:])

    return asyncio.run(through())


START = (200, [(b"content-type", b"text/event-stream")])


def test_gateway_passes_an_answer_on():
    replicas = Replicas([START, b"a", b"b"])
    assert ask(replicas) == (200, b"ab")
    assert replicas.sessions == ["s"]


@pytest.mark.parametrize("heard", [[], [START]])
def test_gateway_retries_until_the_first_byte(heard):
    replicas = Replicas([*heard, ActorDiedError()], [START, b"whole"])
    assert ask(replicas) == (200, b"whole")


def test_gateway_gives_up_on_a_request_that_kills():
    replicas = Replicas(*[[ActorDiedError()]] * (ATTEMPTS + 1))
    status, body = ask(replicas)
    assert (status, replicas.calls) == (503, ATTEMPTS)
    assert "send the request again" in json.loads(body)["error"]["message"]


def test_a_stream_that_breaks_off_says_so():
    status, body = ask(Replicas([START, b"data: 1\n\n", ActorDiedError()]))
    first, error = body.decode().split("\n\n")[:2]
    assert (status, first) == (200, "data: 1")
    assert "died" in json.loads(error.removeprefix("data: "))["error"]["message"]
