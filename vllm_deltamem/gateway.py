"""The HTTP side of the application on Ray Serve. Imports neither Ray nor vLLM before a request comes, vLLM never."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from vllm_deltamem.sessionname import NAME, SESSIONS_PATH

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from starlette.requests import Request
    from starlette.responses import Response

# How many replicas may die of one request: a prompt that crashes an engine must not take all of them along.
ATTEMPTS = 3

LOST = {"error": {"message": "the replica died while it was answering; send the request again", "code": 503}}


class Gateway:
    """Finds a request's session; sends it again when its replica died before it answered."""

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


def session_of(path: str, body: bytes) -> str:
    """The session that a request names in its path, or starts from by its `vllm_xargs`.

    '' where there is none, or none that could be one: the server app says what is wrong with it.
    """
    try:
        options = json.loads(body)["vllm_xargs"]
        name = options.get("deltamem_session_from") or options["deltamem_session"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        name = path.partition(f"{SESSIONS_PATH}/")[2]
    return name if isinstance(name, str) and NAME.fullmatch(name) else ""
