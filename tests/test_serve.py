"""The application on Ray Serve: its parts alone, and, marked slow, two replicas of which one is killed."""

import asyncio
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from urllib.request import urlopen

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("ray.serve")

from ray.exceptions import ActorDiedError
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from tiny_llama import save_tiny_llama

from benchmarks.ray_application import Application
from vllm_deltamem.serve import ATTEMPTS, Gateway, SlotScaling, app, command_line, run_app, session_of


def test_options_become_a_command_line():
    options = {
        "model": "m",
        "max-model-len": 8192,
        "enforce-eager": True,
        "enable-prefix-caching": False,
        "served-model-name": ["a", "b"],
        "additional-config": {"deltamem": {"memory": 64}},
    }
    assert command_line(options) == [
        *("--model", "m", "--max-model-len", "8192", "--enforce-eager", "--no-enable-prefix-caching"),
        *("--served-model-name", "a", "b", "--additional-config", '{"deltamem": {"memory": 64}}'),
    ]


def test_a_model_must_be_named():
    with pytest.raises(ValueError, match="set `model`"):
        app({"max-model-len": 8192})


@pytest.mark.parametrize(
    "body, session",
    [
        ({"vllm_xargs": {"deltamem_session": "chat-1"}}, "chat-1"),
        ({"vllm_xargs": {}}, ""),
        ({"vllm_xargs": None}, ""),
        ({"messages": []}, ""),
        ([1], ""),
    ],
)
def test_session_of_a_request(body, session):
    assert session_of(json.dumps(body).encode()) == session


@pytest.mark.parametrize("body", [b"", b"{", b"\xff"])
def test_what_is_not_json_has_no_session(body):
    assert session_of(body) == ""


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
        "import subprocess, sys, time; from vllm_deltamem.serve import guard_children;"
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


SESSIONS = [f"chat-{number}" for number in range(12)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`serve run` on the repository's serve.yaml, with a tiny model and two to three replicas."""
    options = {
        "model": str(save_tiny_llama(tmp_path_factory.mktemp("model"))),
        "served-model-name": "tiny",
        "dtype": "float32",
        "max-model-len": 1024,
        "max-num-seqs": 16,
        "enforce-eager": True,
        "kv-cache-memory-bytes": "64M",
    }
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    engine = {
        "ray_actor_options": {"num_cpus": 0.1, "runtime_env": {"env_vars": environment}},
        "autoscaling_config": {
            "min_replicas": 2,
            "max_replicas": 3,
            "upscale_delay_s": 1,
            "look_back_period_s": 2,
            "policy": {"policy_function": "vllm_deltamem.serve:SlotScaling"},
        },
    }
    with Application(options, engine) as application:
        yield Server(application)


class Server:
    """A running application and a client of it."""

    def __init__(self, application: Application):
        from openai import OpenAI

        self.engines = application.engines
        self.client = OpenAI(base_url=application.url, api_key="none", max_retries=0, timeout=300)

    def request(self, session: str, tokens: int) -> dict:
        return {
            "model": "tiny",
            "messages": [{"role": "user", "content": f"Tell {session} a story."}],
            "max_tokens": tokens,
            "temperature": 0,
            "extra_body": {"vllm_xargs": {"deltamem_session": session}, "ignore_eos": True},
        }

    def ask(self, session: str, tokens: int = 8, **options) -> tuple[str, str]:
        """The answer, and the replica that gave it."""
        request = self.request(session, tokens)
        answer = self.client.chat.completions.with_raw_response.create(**request, **options)
        return answer.parse().choices[0].message.content, answer.headers["x-deltamem-replica"]

    def ask_all(self, tokens: int, sessions: list[str] = SESSIONS) -> list[tuple[str, str]]:
        """The same of several sessions at once."""
        with ThreadPoolExecutor(len(sessions)) as threads:
            return list(threads.map(lambda session: self.ask(session, tokens), sessions))

    def generated(self, replica: str) -> float:
        """Tokens that a replica has generated so far."""
        while True:
            with urlopen(f"{self.client.base_url.join('/metrics')}") as response:
                if response.headers["x-deltamem-replica"] == replica:
                    return sum(
                        sample.value
                        for family in text_string_to_metric_families(response.read().decode())
                        for sample in family.samples
                        if sample.name == "vllm:generation_tokens_total"
                    )


def wait_for(condition, seconds: float = 240) -> None:
    """Until the condition is true; fails when time is up."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.5)


@pytest.mark.slow
def test_an_openai_client_is_served(served):
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    request = served.request("stream", 16)
    chunks = list(served.client.chat.completions.create(**request, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == served.ask("stream", 16)[0] and len(streamed) == 16
    completion = served.client.completions.create(model="tiny", prompt="Once", max_tokens=4)
    assert completion.usage.completion_tokens == 4


@pytest.mark.slow
def test_vllm_reports_a_bad_request(served):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="1024"):
        served.ask("long", 5000)


@pytest.mark.slow
def test_the_answer_to_a_client_that_left_is_not_finished(served):
    from openai import APITimeoutError

    _, replica = served.ask("leaves", 1)
    before = served.generated(replica)
    with pytest.raises(APITimeoutError):
        served.ask("leaves", 900, timeout=0.5)
    with served.client.chat.completions.create(**served.request("leaves", 900), stream=True) as stream:
        next(iter(stream))

    def at_rest():
        count = served.generated(replica)
        time.sleep(1)
        return served.generated(replica) == count

    wait_for(at_rest)
    assert served.generated(replica) - before < 900


@pytest.mark.slow
def test_a_session_stays_with_its_replica(served):
    before = served.ask_all(4)
    assert len({replica for _, replica in before}) == 2
    assert served.ask_all(4) == before


@pytest.mark.slow
def test_a_killed_replica_loses_no_request(served):
    expected = served.ask_all(300)
    first, *_ = served.engines()
    family = [first, *first.children(recursive=True)]
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(served.ask_all, 300)
        time.sleep(1)
        assert not answers.done(), "too fast to be disturbed"
        first.kill()
        answers = answers.result()
    assert [text for text, _ in answers] == [text for text, _ in expected]
    replicas = {replica for _, replica in answers}
    assert len(replicas) == 1, "the survivor answers all"
    assert not psutil.wait_procs(family, timeout=30)[1], "the engine of a dead replica lives on"
    wait_for(lambda: len({replica for _, replica in served.ask_all(1)}) == 2)


@pytest.mark.slow
def test_slots_in_use_start_another_replica(served):
    wait_for(lambda: served.ask_all(300, SESSIONS * 3) and len(served.engines()) == 3)
