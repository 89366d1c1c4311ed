"""The quotas of the session store: how full it is, and who makes room."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

SLACK = 64  # a store that overflows gives up this fraction more, so that not every save has to make room


@dataclass(frozen=True)
class Usage:
    """What one session takes."""

    key: Hashable
    tenant: str
    n_bytes: int
    used_ns: int  # any clock, the same for all that are compared


def victims(usages: Iterable[Usage], max_sessions: int, max_bytes: int, keep: Hashable) -> list[Hashable]:
    """The sessions to give up so that the others fit; `keep` is never among them.

    Room comes from the tenant that takes the most of what is short, its least recently used session first, so
    that who floods the store pushes out their own.
    """
    load, count, queues = Counter(), Counter(), {}
    for usage in sorted(usages, key=lambda usage: usage.used_ns):
        load[usage.tenant] += usage.n_bytes
        count[usage.tenant] += 1
        if usage.key != keep:
            queues.setdefault(usage.tenant, deque()).append(usage)
    sessions, n_bytes, chosen = count.total(), load.total(), []
    if sessions <= max_sessions and n_bytes <= max_bytes:
        return []
    max_sessions, max_bytes = (most - most // SLACK for most in (max_sessions, max_bytes))
    while queues and (sessions > max_sessions or n_bytes > max_bytes):
        weight = count if sessions > max_sessions else load
        tenant = max(queues, key=lambda tenant: (weight[tenant], -queues[tenant][0].used_ns))
        victim = queues[tenant].popleft()
        if not queues[tenant]:
            del queues[tenant]
        chosen.append(victim.key)
        count[tenant] -= 1
        load[tenant] -= victim.n_bytes
        sessions, n_bytes = sessions - 1, n_bytes - victim.n_bytes
    return chosen


class Tally:
    """Sessions and bytes of a store, counted along between two looks at all of it. Thread-safe."""

    def __init__(self, max_sessions: int, max_bytes: int):
        self._max = (max_sessions, max_bytes)
        self._taken = (0, 0)
        self._lock = threading.Lock()

    def found(self, sessions: int, n_bytes: int) -> None:
        """What a look has found."""
        with self._lock:
            self._taken = (sessions, n_bytes)

    def add(self, sessions: int, n_bytes: int) -> bool:
        """Count what came, or went; True when a quota is exceeded."""
        with self._lock:
            self._taken = (self._taken[0] + sessions, self._taken[1] + n_bytes)
            return any(taken > most for taken, most in zip(self._taken, self._max, strict=True))
