"""Tells the API keys of HTTP requests apart, so that the sessions of one are out of reach for another."""

from functools import wraps


def apply() -> None:
    """Wrap init_entrypoints_middleware, which build_app calls: one more middleware, outermost."""
    from vllm.entrypoints.launchers import app as launcher

    original = launcher.init_entrypoints_middleware
    if hasattr(original, "deltamem"):
        return

    @wraps(original)
    def init_entrypoints_middleware(args, app, supported_tasks):
        original(args, app, supported_tasks)
        app.add_middleware(TenantMiddleware)

    init_entrypoints_middleware.deltamem = True
    launcher.init_entrypoints_middleware = init_entrypoints_middleware


class TenantMiddleware:
    """Sets options.tenant from the bearer token for the time of a request."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        from vllm_deltamem.options import tenant
        from vllm_deltamem.sessionname import tenant_of

        token = tenant.set(tenant_of(bearer_token(scope.get("headers", ()))))
        try:
            await self.app(scope, receive, send)
        finally:
            tenant.reset(token)


def bearer_token(headers) -> str | None:
    """The API key as vLLM's AuthenticationMiddleware reads it, of the first such header; None if none."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            return key or None if scheme.lower() == "bearer" else None
    return None
