"""Conversations on Ray Serve: throughput with one and two replicas, and what a killed replica costs.

    python -m benchmarks.ray_serve --model FOLDER [--backend CPU_ATTN]

Three runs of the same conversations: with one replica, with two, and with two of which one is killed when
half of the turns are answered. Even clients stream their answers and send a turn again whose stream broke
off; odd clients do not stream, and never send anything twice.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import openai
from openai.types import CompletionUsage

from . import common
from .ray_application import Application

REPLICA = "x-deltamem-replica"  # the header that names who answered
WITH_USAGE = {"include_usage": True}
TOPICS = (
    "rain bread glass salt maps clocks bees iron chess paper bridges soap tea snow silk coal ink rope wax ice"
).split()
TURNS = (
    "How did {} come to be used by people?",
    "Which of these facts would surprise a child most?",
    "What is the opposite of what you just said?",
    "Sum up our conversation in one sentence.",
)


@dataclass
class Turn:
    """One answered turn; times in seconds of time.monotonic()."""

    client: int
    began: float
    ended: float
    answer: str
    replica: str
    usage: CompletionUsage


@dataclass
class Conversations:
    """All clients talk at once, each in a session of its own, through `rounds` turns."""

    url: str
    model: str
    name: str  # of the run: sessions of different runs never meet
    clients: int
    rounds: int
    max_tokens: int
    turns: list[Turn] = field(default_factory=list)
    broken: list[float] = field(default_factory=list)  # when a stream broke off
    half_done: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> float:
        """Returns the seconds it took."""
        began = time.monotonic()
        async with openai.AsyncOpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=600) as api:
            await asyncio.gather(*(self._talk(api, client) for client in range(self.clients)))
        return time.monotonic() - began

    async def _talk(self, api: openai.AsyncOpenAI, client: int) -> None:
        messages = []
        for question in TURNS[: self.rounds]:
            messages.append({"role": "user", "content": question.format(TOPICS[client % len(TOPICS)])})
            turn = await self._ask(api, client, messages)
            messages.append({"role": "assistant", "content": turn.answer})
            self.turns.append(turn)
            if 2 * len(self.turns) >= self.clients * self.rounds:
                self.half_done.set()

    async def _ask(self, api: openai.AsyncOpenAI, client: int, messages: list[dict]) -> Turn:
        request = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "extra_body": {"vllm_xargs": {"deltamem_session": f"{self.name}-{client}"}},
        }
        completions = api.chat.completions.with_raw_response
        began = time.monotonic()
        while True:
            try:
                if client % 2:
                    response = await completions.create(**request)
                    completion = response.parse()
                    answer, usage = completion.choices[0].message.content, completion.usage
                else:
                    response = await completions.create(**request, stream=True, stream_options=WITH_USAGE)
                    answer, usage = await read(response.parse())
            except openai.APIError:
                if client % 2:
                    raise
                self.broken.append(time.monotonic())
                continue
            return Turn(client, began, time.monotonic(), answer, response.headers[REPLICA], usage)

    def tokens(self) -> int:
        """Of all answers."""
        return sum(turn.usage.completion_tokens for turn in self.turns)

    def answers(self) -> list[list[str]]:
        """The answers of every client, in order."""
        return [[turn.answer for turn in self.turns if turn.client == c] for c in range(self.clients)]


async def read(stream) -> tuple[str, CompletionUsage]:
    """A streamed answer and its usage."""
    words = []
    async for chunk in stream:
        words += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage
    return "".join(words), usage


async def kill_at_half(application: Application, conversations: Conversations) -> float:
    """Kill a replica when half of the turns are answered; returns when, in seconds of time.monotonic()."""
    await conversations.half_done.wait()
    victim = application.engines()[0]
    victim.kill()
    return time.monotonic()


async def disturbed(application: Application, conversations: Conversations) -> tuple[float, dict[str, float]]:
    """Run the conversations through the death of a replica: seconds they took, and what the death cost."""
    killer = asyncio.create_task(kill_at_half(application, conversations))
    seconds = await conversations.run()
    killed = await killer
    before = [turn for turn in conversations.turns if turn.ended < killed]
    after = [turn for turn in conversations.turns if turn.ended >= killed]
    names = {turn.replica for turn in before}
    (dead,) = names - {turn.replica for turn in after}
    orphans = {turn.client for turn in before if turn.replica == dead}
    next_turns = {turn.client: turn for turn in reversed(after) if turn.client in orphans}.values()
    while application.ask_for_a_replica() in names:
        await asyncio.sleep(0.2)
    return seconds, {
        "orphaned_conversations": len(orphans),
        "streams_broken": len(conversations.broken),
        "noticed_s": max(conversations.broken, default=killed) - killed,
        "recovery_s": max(turn.ended for turn in next_turns) - killed,
        "recovery_restored_share": restored_share(next_turns),
        "replacement_s": time.monotonic() - killed,
    }


def restored_share(turns: Iterable[Turn]) -> float:
    """Which share of the prompts' tokens was not computed: it came from a session, or vLLM's prefix cache."""
    usages = [turn.usage for turn in turns]
    cached = sum(usage.prompt_tokens_details.cached_tokens for usage in usages if usage.prompt_tokens_details)
    return cached / sum(usage.prompt_tokens for usage in usages)


def serve(arguments: argparse.Namespace, sessions: str, replicas: int) -> Application:
    options = {
        "model": str(arguments.model),
        "served-model-name": arguments.model.name,
        "attention-backend": arguments.backend,
        "dtype": "float32",  # so that who else is in the batch does not change an answer
        "max-model-len": 1024,
        "max-num-seqs": arguments.clients,
        "kv-cache-memory-bytes": "2G",
        "enforce-eager": True,
        "enable-prompt-tokens-details": True,
    }
    if arguments.backend == "DELTAMEM":
        settings = {"memory": arguments.memory, "sessions": {"directory": sessions}}
        options["additional-config"] = {"deltamem": settings}
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    engine = {
        "num_replicas": replicas,
        "ray_actor_options": {"num_cpus": 0.5, "runtime_env": {"env_vars": environment}},
    }
    return Application(options, engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a small model")
    parser.add_argument("--backend", default="DELTAMEM", help="attention backend (%(default)s)")
    parser.add_argument("--memory", type=int, default=256, help="of deltamem, tokens per head (%(default)s)")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=len(TURNS), help="turns of a conversation (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer (%(default)s)")
    arguments = parser.parse_args()
    rows, reference = [], None

    def measured(replicas: int, talk: Conversations, values: dict[str, float]) -> None:
        values |= {
            "turn_median_s": median(turn.ended - turn.began for turn in talk.turns),
            "restored_share": restored_share(talk.turns),
            "conversations_unchanged": sum(map(list.__eq__, talk.answers(), reference)),
        }
        shape = {
            "model": arguments.model.name,
            "backend": arguments.backend,
            "context": max(turn.usage.total_tokens for turn in talk.turns),
            "batch": arguments.clients,
            "memory_tokens": arguments.memory if arguments.backend == "DELTAMEM" else None,
            "replicas": replicas,
            "n": len(talk.turns),
        }
        for metric, value in values.items():
            print(f"{talk.name:12} {metric:24} {value:10.2f}", flush=True)
            rows.append(shape | {"metric": metric, "value": round(value, 3)})

    with tempfile.TemporaryDirectory() as sessions:
        for replicas in (1, 2):
            with serve(arguments, sessions, replicas) as application:

                def conversations(name: str, application=application) -> Conversations:
                    sizes = arguments.clients, arguments.rounds, arguments.max_tokens
                    return Conversations(application.url, arguments.model.name, name, *sizes)

                talk = conversations(f"undisturbed-{replicas}")
                seconds = asyncio.run(talk.run())
                reference = reference or talk.answers()
                measured(replicas, talk, {"tokens_per_s": talk.tokens() / seconds})
                if replicas == 2:
                    talk = conversations("killed")
                    seconds, costs = asyncio.run(disturbed(application, talk))
                    costs["tokens_per_s"] = talk.tokens() / seconds
                    measured(replicas, talk, costs)
    common.append(rows, "ray")


if __name__ == "__main__":
    main()
