"""Tells the API keys of HTTP requests apart, so that the sessions of one are out of reach for another."""

from functools import wraps


def apply() -> None:
    """Wrap api_server.build_app: one more middleware, which notes whose request it is."""
    from vllm.entrypoints.openai import api_server

    original = api_server.build_app
    if hasattr(original, "deltamem"):
        return

    @wraps(original)
    def build_app(*args, **kwargs):
        app = original(*args, **kwargs)
        app.add_middleware(TenantMiddleware)
        return app

    build_app.deltamem = True
    api_server.build_app = build_app


class TenantMiddleware:
    """Sets options.tenant from the bearer token for the time of a request."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        from vllm_deltamem.options import tenant
        from vllm_deltamem.sessions import tenant_of

        key = None
        for name, value in scope.get("headers", []):
            if name == b"authorization":
                key = value.decode("latin-1").removeprefix("Bearer ").strip()
        token = tenant.set(tenant_of(key or None))
        try:
            await self.app(scope, receive, send)
        finally:
            tenant.reset(token)
