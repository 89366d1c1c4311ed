"""One engine of the application on Ray Serve, under vLLM's own OpenAI server app."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from vllm_deltamem.plan import plan_memory
from vllm_deltamem.serveoptions import parse

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


class Engine:
    """One replica: an engine with its slots, under vLLM's server app, called without a socket."""

    async def __init__(self, options: dict[str, Any]):
        from ray import serve
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        args = parse(options)
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
            # vLLM keeps one block for itself.
            "slots": min(slots, (blocks - 1) // plan_memory(config).parts) if blocks else slots,
            "slots_wanted": self.engine.get_num_unfinished_requests(),
        }

    def __del__(self) -> None:
        if engine := getattr(self, "engine", None):
            engine.shutdown(timeout=SAVING_S)


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
