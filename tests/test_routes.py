"""The session routes over a store of this process; test_server.py has them in a real server."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_deltamem.patches.http_tenant import TenantMiddleware, bearer_token
from vllm_deltamem.routes import ServerSessions, SessionRoutes
from vllm_deltamem.sessionname import tenant_of
from vllm_deltamem.sessions import Fingerprint, SessionRefused, SessionStore
from vllm_deltamem.sessionsettings import SessionSettings

PATH = "/v1/deltamem/sessions"


class Engine:
    """Two workers, the first of which keeps sessions in its host memory."""

    vllm_config = SimpleNamespace(additional_config={})

    def __init__(self):
        self.store = SessionStore(SessionSettings(), Fingerprint("m", "p", "s", "1", "d", "v"))

    async def collective_rpc(self, method, args):
        if method == "deltamem_list":
            return [self.store.summaries(*args), []]
        return [self.store.erase(*args), False]


@pytest.fixture
def engine():
    engine = Engine()
    for key, name in (("ann", "one"), ("ann", "two"), ("bob", "three")):
        engine.store.save(tenant_of(key), name, range(5), torch.full((64,), 7, dtype=torch.uint8))
    return engine


@pytest.fixture
def client(engine):
    app = FastAPI()
    SessionRoutes().attach_router(app)
    app.state.deltamem_sessions = ServerSessions(engine)
    app.add_middleware(TenantMiddleware)
    return TestClient(app)


def login(key):
    return {"Authorization": f"Bearer {key}"}


def names(client, key):
    return [session["name"] for session in client.get(PATH, headers=login(key)).json()["data"]]


def test_list_has_the_sessions_of_the_key(client):
    assert names(client, "ann") == ["two", "one"]
    assert names(client, "bob") == ["three"]
    assert client.get(PATH).json() == {"object": "list", "data": []}
    session = client.get(PATH, headers=login("bob")).json()["data"][0]
    assert (session["tokens"], session["bytes"]) == (5, 64) and session["age_s"] >= 0


def test_erase(client, engine):
    held = engine.store._host._copies[tenant_of("ann"), "one"].slabs[0]
    assert client.delete(f"{PATH}/one", headers=login("bob")).status_code == 404
    assert held.any()
    assert client.delete(f"{PATH}/one", headers=login("ann")).json()["deleted"]
    assert not held.any(), "the bytes are gone, not only the name"
    assert names(client, "ann") == ["two"]
    assert client.delete(f"{PATH}/one", headers=login("ann")).status_code == 404


def test_bad_names_and_failing_disks(client, engine, monkeypatch):
    assert client.delete(f"{PATH}/.one", headers=login("ann")).status_code == 400

    def fail(*args):
        raise SessionRefused("unwritable", "the disk is gone")

    monkeypatch.setattr(engine.store, "erase", fail)
    response = client.delete(f"{PATH}/one", headers=login("ann"))
    assert response.status_code == 500 and "the disk is gone" in response.text


def test_without_the_backend(client):
    plugin = SessionRoutes()
    asyncio.run(plugin.init_state(None, client.app.state, None))
    assert client.get(PATH).status_code == 501


@pytest.mark.parametrize(
    "headers, key",
    [
        ([], None),
        ([(b"authorization", b"Bearer k")], "k"),
        ([(b"authorization", b"bearer k")], "k"),
        ([(b"authorization", b"Bearer ")], None),
        ([(b"authorization", b"Basic k")], None),
        ([(b"x", b"y"), (b"authorization", b"Bearer first"), (b"authorization", b"Bearer second")], "first"),
    ],
)
def test_bearer_token_is_read_as_vllm_reads_it(headers, key):
    assert bearer_token(headers) == key


def test_the_middleware_is_in_every_app_that_vllm_builds():
    from fastapi import FastAPI
    from vllm.entrypoints.launchers import app as launcher

    from vllm_deltamem.patches import http_tenant

    http_tenant.apply()
    http_tenant.apply()
    args = SimpleNamespace(
        allowed_origins=["*"], allow_credentials=False, allowed_methods=["*"], allowed_headers=["*"],
        api_key=["k"], enable_request_id_headers=False, middleware=[],
    )  # fmt: skip
    app = FastAPI()
    launcher.init_entrypoints_middleware(args, app, ("generate",))
    kinds = [middleware.cls for middleware in app.user_middleware]
    assert kinds.count(TenantMiddleware) == 1 and kinds[0] is TenantMiddleware, "once, outermost"
