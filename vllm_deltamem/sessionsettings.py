"""Settings of the session store: deltamem's "sessions" object."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, fields
from pathlib import Path

HOST_BYTES = 1 << 30
HOST_MEMORIES = 4  # that there is room for in any case, if nothing else is said


@dataclass(frozen=True)
class SessionSettings:
    """Validated once. Raises ValueError, naming the setting. The key itself is never one of them."""

    host_bytes: int = HOST_BYTES  # of host memory, in every process that saves
    directory: str | None = None
    key_file: str | None = None  # file with 64 hex digits, the key that encrypts the directory
    key_env: str | None = None  # or the name of an environment variable that holds them
    max_sessions: int = 1000
    max_bytes: int = 100 << 30  # of the directory, all ranks together
    max_age_s: float = 30 * 86400  # since the last save

    def __post_init__(self):
        for name, least in (("host_bytes", 0), ("max_sessions", 1), ("max_bytes", 1), ("max_age_s", 1)):
            value, kinds = getattr(self, name), (int, float) if name == "max_age_s" else int
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < 1 << 62:
                raise ValueError(f"deltamem setting 'sessions.{name}' must be a number >= {least}: {value!r}")
        for name in ("directory", "key_file", "key_env"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value or "\0" in value):
                raise ValueError(f"deltamem setting 'sessions.{name}' must be a non-empty string: {value!r}")
        if self.directory is None and self.host_bytes == 0:
            raise ValueError("deltamem sessions are kept nowhere: set 'sessions.directory' or 'host_bytes'.")
        if self.key_file and self.key_env:
            raise ValueError("deltamem sessions have one key: set 'sessions.key_file' or 'key_env'.")
        if self.directory is None and (self.key_file or self.key_env):
            raise ValueError("deltamem sessions: a key encrypts a directory, set 'sessions.directory' too.")

    @classmethod
    def from_dict(cls, settings: dict, memory_bytes: int = 0) -> SessionSettings:
        """memory_bytes: of one slot, of which host memory holds a few if nothing else is said.

        Raises ValueError for an unknown setting, naming it, and where sessions have no place that one fits into.
        """
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise ValueError(f"Unknown deltamem setting 'sessions.{name}'; known: {', '.join(known)}.")
        made = cls(**{"host_bytes": max(HOST_BYTES, HOST_MEMORIES * memory_bytes)} | settings)
        if made.directory is None and made.host_bytes < memory_bytes:
            raise ValueError(
                f"deltamem sessions are kept nowhere: a memory takes {memory_bytes:,} bytes, 'sessions.host_bytes' is "
                f"{made.host_bytes:,}. Raise it, or set 'sessions.directory'."
            )
        return made

    def expired(self, created_ns: int) -> bool:
        """Whether a session saved at that time, in nanoseconds since the epoch, is too old to be kept."""
        return time.time_ns() - created_ns > self.max_age_s * 1e9

    def key(self) -> bytes | None:
        """The key, 32 bytes, or None. Raises ValueError, never quoting what it read."""
        source = self.key_file or self.key_env
        if source is None:
            return None
        try:
            text = Path(source).read_text() if self.key_file else os.environ[source]
            key = bytes.fromhex(text.strip())
        except (OSError, KeyError, ValueError):
            key = b""
        if len(key) != 32:
            raise ValueError(f"deltamem sessions: {source} must hold 64 hex digits (openssl rand -hex 32).")
        return key
