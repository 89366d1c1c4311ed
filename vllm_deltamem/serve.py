"""An OpenAI-compatible application on Ray Serve: `serve run serve.yaml`.

A `Gateway` takes the HTTP requests; each replica of `Engine` behind it is one vLLM engine, with slots of its
own, under vLLM's own OpenAI server app. The requests of a session go to the replica that Ray Serve's
consistent-hash router gives its name, as long as that replica lives; then another takes over, and restores
the session from the directory that the replicas share.

Why not `ray.serve.llm`: that of Ray 2.60 pins vLLM 0.29.0, and has routes, engine options and metrics of its
own. vLLM's app behind a handle keeps all of `vllm serve`: its options, routes, API keys and endpoint plugins.

Neither Ray nor vLLM is imported before `app` or a constructor needs it: the gateway never imports vLLM.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from vllm_deltamem.sessionname import NAME, SESSIONS

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.config import AutoscalingContext
    from ray.serve.handle import DeploymentHandle
    from starlette.requests import Request
    from starlette.responses import Response

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

# How many replicas may die of one request: a prompt that crashes an engine must not take all of them along.
ATTEMPTS = 3

# A replica takes whatever comes and lets vLLM queue it: a full replica would send sessions to another one.
QUEUE = 4096

# How long a replica that is stopped may go on to write sessions, in seconds; vLLM's own default is 5.
SAVING_S = 30

GUARD = """
import contextlib, os, signal, sys
children = [os.pidfd_open(int(pid)) for pid in sys.argv[1:]]
sys.stdin.read()
for child in children:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(child, signal.SIGKILL)
"""

LOST = {"error": {"message": "the replica died while it was answering; send the request again", "code": 503}}


def app(options: dict[str, Any]) -> "Application":
    """The application: a gateway in front of replicas of the engine.

    `options`, the `args` of the application in the YAML file, are those of `vllm serve`, named as on its
    command line without the dashes. Raises ValueError when they name no model.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    if not options.get("model"):
        raise ValueError("serve needs a model: set `model` in args to a folder or a name on Hugging Face")
    engines = serve.deployment(
        Engine,
        max_ongoing_requests=QUEUE,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=60,
    )
    gateway = serve.deployment(Gateway, max_ongoing_requests=QUEUE, ray_actor_options={"num_cpus": 0})
    return gateway.bind(engines.bind(options))


class Engine:
    """One replica: an engine with its slots, under vLLM's server app, called without a socket."""

    async def __init__(self, options: dict[str, Any]):
        from ray import serve
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        parser = make_arg_parser(FlexibleArgumentParser())
        parser.error = refuse
        args = parser.parse_args(command_line(options, several_of(parser)))
        validate_parsed_serve_args(args)
        self.engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs.from_cli_args(args), usage_context=UsageContext.OPENAI_API_SERVER
        )
        self.guard = guard_children()
        tasks = await self.engine.get_supported_tasks()
        self.app = build_app(args, tasks, self.engine.model_config)
        await init_app_state(self.engine, self.app.state, args, tasks)
        self.replica = serve.get_replica_context().replica_id.unique_id.encode()

    async def respond(self, scope: dict[str, Any], body: bytes) -> AsyncIterator:
        """Put one HTTP request through the app: yields (status, headers), then the body in pieces.

        `scope` is the request's ASGI scope. A caller that goes away aborts the request. With its engine dead
        the replica ends itself, as `vllm serve` does: the caller's retry must not come back to it.
        """
        try:
            async with aclosing(run_app(self.app, scope, body)) as messages:
                async for message in messages:
                    if self.engine.errored:
                        break
                    if message["type"] == "http.response.start":
                        yield message["status"], [*message["headers"], (b"x-deltamem-replica", self.replica)]
                    elif message.get("body"):
                        yield message["body"]
        finally:
            if self.engine.errored:
                os._exit(1)

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        await self.engine.check_health()

    def record_autoscaling_stats(self) -> dict[str, int]:
        """How many slots the replica has, and how many its requests hold or wait for: see `SlotScaling`."""
        config = self.engine.vllm_config
        slots = config.scheduler_config.max_num_seqs
        blocks = config.cache_config.num_gpu_blocks
        return {
            "slots": min(slots, blocks - 1) if blocks else slots,  # vLLM keeps one block for itself
            "slots_wanted": self.engine.get_num_unfinished_requests(),
        }

    def __del__(self) -> None:
        if engine := getattr(self, "engine", None):
            engine.shutdown(timeout=SAVING_S)


class Gateway:
    """The HTTP side: finds a request's session; sends it again when its replica died before it answered."""

    def __init__(self, engines: "DeploymentHandle"):
        self.engines = engines.options(method_name="respond", stream=True)

    async def __call__(self, request: "Request") -> "Response":
        from ray.exceptions import RayActorError
        from starlette.responses import JSONResponse, StreamingResponse

        body = await request.body()
        keys = ("type", "http_version", "method", "scheme", "path", "query_string", "root_path", "headers")
        scope = {key: request.scope[key] for key in keys}
        engines = self.engines.options(session_id=session_of(request.url.path, body))
        for _ in range(ATTEMPTS):
            answer = engines.remote(scope, body)
            try:
                status, headers = await anext(answer)
                first = await anext(answer, b"")
            except RayActorError:
                continue
            except asyncio.CancelledError:
                answer.cancel()
                raise
            response = StreamingResponse(self._stream(first, answer, headers), status_code=status)
            response.raw_headers = headers
            return response
        return JSONResponse(LOST, status_code=503)

    async def _stream(self, first: bytes, answer, headers: list[tuple[bytes, bytes]]) -> AsyncIterator[bytes]:
        """The pieces of an answer; one whose replica dies in the middle ends with an error event."""
        from ray.exceptions import RayActorError

        yield first
        try:
            async for piece in answer:
                yield piece
        except RayActorError:
            if dict(headers).get(b"content-type", b"").startswith(b"text/event-stream"):
                yield b"data: " + json.dumps(LOST).encode() + b"\n\n"
        finally:
            answer.cancel()


async def run_app(app: Callable, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict]:
    """Call an ASGI app on one request and yield what it sends; closing the generator disconnects the client.

    Raises what the app raises. An app that ignores the disconnect for 5 seconds is cancelled.
    """
    messages: asyncio.Queue = asyncio.Queue()
    gone = asyncio.Event()
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def call() -> None:
        try:
            # Up to version 2.3 of ASGI a streaming response listens for the disconnect by itself.
            await app({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, messages.put)
        finally:
            messages.put_nowait(None)

    task = asyncio.create_task(call())
    try:
        while (message := await messages.get()) is not None:
            yield message
        await task
    finally:
        gone.set()
        await asyncio.wait({task}, timeout=5)
        task.cancel()


def guard_children() -> subprocess.Popen:
    """Start a process that kills this one's descendants when this one is gone, whatever ended it.

    vLLM's engine process does not notice, and would keep its memory from the replica that comes instead. The
    guard waits for the end of a pipe that only this process holds open: keep what is returned.
    """
    import psutil

    pids = [str(child.pid) for child in psutil.Process().children(recursive=True)]
    return subprocess.Popen([sys.executable, "-c", GUARD, *pids], stdin=subprocess.PIPE, start_new_session=True)


class SlotScaling:
    """Autoscaling policy: as many replicas as bring the share of slots in use to `target`.

    A request counts from its arrival, whether it holds a slot or waits for one.
    """

    def __init__(self, target: float = 0.8):
        if not 0 < target <= 1:
            raise ValueError(f"SlotScaling: target must be a share of the slots in (0, 1], not {target}")
        self.target = target

    def __call__(self, ctx: "AutoscalingContext") -> tuple[float, dict]:
        """Replicas wanted, before Ray Serve's bounds, factors and delays; no change while nothing reports."""
        metrics = ctx.aggregated_metrics or {}
        slots, wanted = metrics.get("slots"), metrics.get("slots_wanted")
        if not slots or not wanted:
            return ctx.target_num_replicas, {}
        demand = sum(wanted.values()) + (ctx.total_queued_requests or 0)
        return demand / (self.target * sum(slots.values()) / len(slots)), {}


def refuse(message: str) -> None:
    """In place of a parser's own, which would end the replica without a word to Ray."""
    raise ValueError(f"args of the application: {message}")


def several_of(parser: argparse.ArgumentParser) -> set[str]:
    """The options, without their dashes, that take several values."""
    return {name.lstrip("-") for name, action in parser._option_string_actions.items() if action.nargs in ("+", "*")}


def command_line(options: dict[str, Any], several: Collection[str]) -> list[str]:
    """Options as arguments of `vllm serve`: a truth value is a flag, nothing leaves the option out.

    A list is as many values as it has where an option takes several; other lists, and mappings, are JSON.
    """
    arguments = []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list) and name in several:
            arguments += [f"--{name}", *map(_argument, value)]
        elif value is not None:
            arguments.append(f"--{name}={_argument(value)}")
    return arguments


def _argument(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def session_of(path: str, body: bytes) -> str:
    """The session that a request names in its path, or starts from by its `vllm_xargs`.

    '' where there is none, or none that could be one: the server app says what is wrong with it.
    """
    try:
        options = json.loads(body)["vllm_xargs"]
        name = options.get("deltamem_session_from") or options["deltamem_session"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        name = path.partition(f"{SESSIONS}/")[2]
    return name if isinstance(name, str) and NAME.fullmatch(name) else ""
