"""The application on Ray Serve as a whole: two replicas with a tiny model, of which one gets killed."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from urllib.request import urlopen

import psutil
import pytest
import requests

pytest.importorskip("ray.serve")
pytest.importorskip("vllm")

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.ray_application import Application
from benchmarks.tiny_llama import save_tiny_llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`serve run` on the repository's serve.yaml, with a tiny model and two to three replicas."""
    sessions = {"directory": str(tmp_path_factory.mktemp("sessions"))}
    options = {
        "model": str(save_tiny_llama(tmp_path_factory.mktemp("model"))),
        "served-model-name": "tiny",
        "attention-backend": "deltamem",
        "additional-config": {"deltamem": {"sessions": sessions}},
        "enable-prompt-tokens-details": True,
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
            "policy": {"policy_function": "vllm_deltamem.slotscaling:SlotScaling"},
        },
    }
    with Application(options, engine) as application:
        yield Server(application)


class Answer(NamedTuple):
    text: str
    replica: str
    restored: int
    """Tokens of the prompt that came from the session."""


class Server:
    """A running application and a client of it."""

    def __init__(self, application: Application):
        from openai import OpenAI

        self.engines = application.engines
        self.client = OpenAI(base_url=application.url, api_key="none", max_retries=0, timeout=300)

    def request(self, session: str, tokens: int, first: str | None = None) -> dict:
        """The first turn of a conversation, or, given the answer to it, the second. Equal in all `*-NUMBER`."""
        question = f"Tell story {session.rpartition('-')[2]}."
        messages = [{"role": "user", "content": question}]
        if first is not None:
            messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Go on."}]
        return {
            "model": "tiny",
            "messages": messages,
            "max_tokens": tokens,
            "temperature": 0,
            "extra_body": {"vllm_xargs": {"deltamem_session": session}, "ignore_eos": True},
        }

    def ask(self, session: str, tokens: int = 8, first: str | None = None, **options) -> Answer:
        request = self.request(session, tokens, first)
        response = self.client.chat.completions.with_raw_response.create(**request, **options)
        answer = response.parse()
        details = answer.usage.prompt_tokens_details
        return Answer(
            answer.choices[0].message.content,
            response.headers["x-deltamem-replica"],
            details.cached_tokens if details else 0,
        )

    def ask_all(self, tokens: int, firsts: list[Answer] | None = None, name: str = "chat") -> list[Answer]:
        """Twelve sessions at once: their first turns, or, given the answers to those, their second."""
        firsts = [answer.text for answer in firsts] if firsts else [None] * 12
        sessions = [f"{name}-{number}" for number in range(12)]
        with ThreadPoolExecutor(12) as threads:
            return list(threads.map(self.ask, sessions, [tokens] * 12, firsts))

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


def test_an_openai_client_is_served(served):
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    request = served.request("stream", 16)
    chunks = list(served.client.chat.completions.create(**request, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == served.ask("stream", 16).text and len(streamed) == 16
    completion = served.client.completions.create(model="tiny", prompt="Once", max_tokens=4)
    assert completion.usage.completion_tokens == 4


def test_vllm_reports_a_bad_request(served):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="1024"):
        served.ask("long", 5000)


def test_a_session_name_that_is_no_text_is_a_bad_request(served):
    body = rb'{"model": "tiny", "prompt": "Once", "vllm_xargs": {"deltamem_session": "\ud800"}}'
    url, headers = f"{served.client.base_url}completions", {"Content-Type": "application/json"}
    response = requests.post(url, body, headers=headers, timeout=60)
    assert response.status_code == 400 and "a session name has" in response.text


def test_the_answer_to_a_client_that_left_is_not_finished(served):
    from openai import APITimeoutError

    replica = served.ask("leaves", 1).replica
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


def test_a_session_stays_with_its_replica(served):
    first = served.ask_all(4)
    second = served.ask_all(4, first)
    assert len({answer.replica for answer in first}) == 2
    assert [answer.replica for answer in second] == [answer.replica for answer in first]


def test_a_killed_replica_loses_no_request(served):
    firsts = served.ask_all(60, name="undisturbed")
    expected = served.ask_all(300, firsts, name="undisturbed")
    assert [answer.text for answer in served.ask_all(60)] == [answer.text for answer in firsts]
    victim, *_ = served.engines()
    family = [victim, *victim.children(recursive=True)]
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(served.ask_all, 300, firsts)
        time.sleep(1)
        assert not answers.done(), "too fast to be disturbed"
        victim.kill()
        answers = answers.result()
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    assert len({answer.replica for answer in answers}) == 1, "the survivor answers all"
    # Not of all: the text of some answers is not read as the tokens that it was made of.
    restored = [answer.restored for answer in answers]
    assert restored == [answer.restored for answer in expected], "from the directory that the replicas share"
    assert sum(count > 60 for count in restored) > 6, "more than the survivor's own"
    assert not psutil.wait_procs(family, timeout=30)[1], "the engine of a dead replica lives on"
    wait_for(lambda: len({answer.replica for answer in served.ask_all(1)}) == 2)


def test_slots_in_use_start_another_replica(served):
    def crowd():
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(lambda name: served.ask_all(300, name=name), ("a", "b", "c")))
        return len(served.engines()) == 3

    wait_for(crowd)
