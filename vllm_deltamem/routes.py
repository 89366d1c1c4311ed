"""HTTP routes of the sessions, an endpoint plugin of vLLM's: `VLLM_PLUGINS=deltamem,deltamem_sessions`.

    GET    /v1/deltamem/sessions         the sessions of the caller's API key, newest first
    DELETE /v1/deltamem/sessions/NAME    erase one for good; 404 if the caller has none of that name

The API server is not the process that keeps the sessions. A directory it opens itself, so that neither
reading nor overwriting files holds up the engine; what lies in host memory it asks the workers for.
"""

import asyncio

from fastapi import APIRouter, FastAPI, HTTPException, Request

from vllm_deltamem.config import DeltaMemConfig
from vllm_deltamem.options import tenant
from vllm_deltamem.sessionname import SESSIONS_PATH, check_name
from vllm_deltamem.sessions import SessionRefused, SessionStore

router = APIRouter(prefix=SESSIONS_PATH)


class SessionRoutes:
    """The plugin: see vllm.plugins.endpoint_plugins.interface.EndpointPlugin."""

    name = "deltamem_sessions"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client, state, args) -> None:
        from vllm_deltamem.startup import is_chosen

        chosen = engine_client is not None and is_chosen(engine_client.vllm_config)
        state.deltamem_sessions = ServerSessions(engine_client) if chosen else None


class ServerSessions:
    """All sessions of a server, from its API process. Raises what SessionStore raises."""

    def __init__(self, engine_client):
        from vllm_deltamem.enginestore import open_store

        config = engine_client.vllm_config
        self._engine = engine_client
        self._directory: SessionStore | None = None
        if DeltaMemConfig.from_vllm(config).sessions.get("directory"):
            self._directory = open_store(config, 0)

    async def list(self, tenant: str) -> list[dict]:
        if self._directory:
            return await asyncio.to_thread(self._directory.summaries, tenant)
        return (await self._engine.collective_rpc("deltamem_list", args=(tenant,)))[0]

    async def erase(self, tenant: str, name: str) -> bool:
        """The files first: without them no worker restores its copy any more."""
        filed = bool(self._directory) and await asyncio.to_thread(self._directory.erase, tenant, name)
        return any([filed, *await self._engine.collective_rpc("deltamem_erase", args=(tenant, name))])


def _sessions(request: Request) -> ServerSessions:
    sessions = request.app.state.deltamem_sessions
    if sessions is None:
        raise HTTPException(501, "this server runs without --attention-backend deltamem")
    return sessions


@router.get("")
async def list_sessions(request: Request) -> dict:
    try:
        return {"object": "list", "data": await _sessions(request).list(tenant.get())}
    except SessionRefused as refused:
        raise HTTPException(500, str(refused)) from refused


@router.delete("/{name}")
async def erase_session(name: str, request: Request) -> dict:
    try:
        check_name(name)
        erased = await _sessions(request).erase(tenant.get(), name)
    except SessionRefused as refused:
        raise HTTPException(500, str(refused)) from refused
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    if not erased:
        raise HTTPException(404, f"there is no session {name}")
    return {"object": "deltamem.session", "name": name, "deleted": True}
