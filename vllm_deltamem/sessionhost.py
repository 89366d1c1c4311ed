"""Sessions in host memory, and the rule by which a full store makes room."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch

from vllm_deltamem.sessionfile import Header


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
    left, chosen = list(usages), []
    load, count = Counter(), Counter()
    for usage in left:
        load[usage.tenant] += usage.n_bytes
        count[usage.tenant] += 1
    left.sort(key=lambda usage: usage.used_ns)
    while len(left) > max_sessions or load.total() > max_bytes:
        weight = count if len(left) > max_sessions else load
        victim = max((u for u in left if u.key != keep), key=lambda usage: weight[usage.tenant], default=None)
        if victim is None:
            break
        left.remove(victim)
        load[victim.tenant] -= victim.n_bytes
        count[victim.tenant] -= 1
        chosen.append(victim.key)
    return chosen


@dataclass
class _Copy:
    header: Header
    tokens: torch.Tensor  # int32 [n_tokens]
    slab: torch.Tensor  # uint8 [n_bytes]
    used_ns: int


class HostSessions:
    """Copies of slabs in host memory, bounded in number and bytes; what leaves is zeroed first. Thread-safe.

    Slabs are copied in and out under one lock, so nobody ever holds a buffer that another thread zeroes.
    """

    def __init__(self, max_sessions: int, max_bytes: int):
        self._max_sessions = max_sessions
        self._max_bytes = max_bytes
        self._copies: dict[tuple[str, str], _Copy] = {}
        self._lock = threading.Lock()

    def put(self, key: tuple[str, str], header: Header, tokens: torch.Tensor, slab: torch.Tensor) -> bool:
        """Copy a session in, under (tenant, name); False if it is too large to be held at all."""
        with self._lock:
            held = self._copies.get(key)
            if held is None or held.header.n_bytes != header.n_bytes:
                self._drop(key)
                if header.n_bytes > self._max_bytes:
                    return False
                self._make_room(key, header.n_bytes)
                buffer = torch.empty_like(slab)
            else:
                buffer = held.slab  # faster than fresh pages
            self._copies[key] = _Copy(header, tokens.clone(), buffer.copy_(slab), time.monotonic_ns())
            return True

    def peek(self, key: tuple[str, str]) -> tuple[Header, torch.Tensor] | None:
        """Header and tokens."""
        with self._lock:
            copy = self._copies.get(key)
            return copy and (copy.header, copy.tokens.clone())

    def take(
        self, key: tuple[str, str], slab_for: Callable[[Header], torch.Tensor | None]
    ) -> tuple[Header, torch.Tensor, torch.Tensor] | None:
        """Header, tokens and slab, None if not held. slab_for(header): where to copy to, None to decline."""
        with self._lock:
            copy = self._copies.get(key)
            slab = None if copy is None else slab_for(copy.header)
            if slab is None:
                return None
            copy.used_ns = time.monotonic_ns()
            return copy.header, copy.tokens.clone(), slab.copy_(copy.slab)

    def drop(self, key: tuple[str, str]) -> bool:
        """Zero and forget a session; False if it is not held."""
        with self._lock:
            return self._drop(key)

    def headers(self) -> dict[tuple[str, str], Header]:
        with self._lock:
            return {key: copy.header for key, copy in self._copies.items()}

    def _make_room(self, key: tuple[str, str], n_bytes: int) -> None:
        usages = [Usage(key, key[0], n_bytes, time.monotonic_ns())]
        usages += [Usage(k, k[0], copy.header.n_bytes, copy.used_ns) for k, copy in self._copies.items()]
        for victim in victims(usages, self._max_sessions, self._max_bytes, keep=key):
            self._drop(victim)

    def _drop(self, key: tuple[str, str]) -> bool:
        copy = self._copies.pop(key, None)
        if copy is not None:
            with torch.inference_mode():  # vLLM's workers save in it, and such tensors change only in it
                copy.tokens.zero_()
                copy.slab.zero_()
        return copy is not None
