"""Who owns a session and what it is called."""

import hashlib
import re

SESSIONS_PATH = "/v1/deltamem/sessions"  # path of their HTTP routes
NAME_LIMIT = 128  # characters, all of them ASCII
NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._:@=+~-]{{0,{NAME_LIMIT - 1}}}")
TENANT = re.compile(r"[0-9a-f]{64}")


def tenant_of(api_key: str | None) -> str:
    """The tenant that an API key stands for: 64 hex digits, a hash. None: the server asks for no key."""
    text = "" if api_key is None else f"key {api_key}"
    return hashlib.blake2b(text.encode(), digest_size=32, person=b"deltamem tenant").hexdigest()


def check_name(name: str) -> None:
    """Raise ValueError unless `name` can name a session."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"a session name has 1 to {NAME_LIMIT} characters of A-Z a-z 0-9 . _ : @ = + ~ - "
            f"and begins with a letter, digit or underscore: {name!r:.200}"
        )


def check_tenant(tenant: str) -> None:
    """Raise ValueError unless `tenant` comes from tenant_of()."""
    if not isinstance(tenant, str) or not TENANT.fullmatch(tenant):
        raise ValueError("a tenant is 64 hex digits, see tenant_of()")
