"""Sessions in host memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_deltamem.sessionfile import Header, SessionRefused
from vllm_deltamem.sessionquota import Usage, victims


@dataclass
class _Copy:
    header: Header
    tokens: torch.Tensor  # int32 [n_tokens]
    slabs: list[torch.Tensor]  # uint8 [n_bytes], the earlier one last
    used_ns: int


class HostSessions:
    """Copies of slabs in host memory, bounded in number and bytes; what leaves is zeroed first. Thread-safe.

    Slabs are copied in and out under one lock, so nobody ever holds a buffer that another thread zeroes.
    """

    def __init__(self, max_sessions: int, max_bytes: int):
        self._max_sessions = max_sessions
        self._max_bytes = max_bytes
        self._copies: dict[tuple[str, str], _Copy] = {}
        self._bytes = 0  # of all copies
        self._begun: dict[tuple[str, str], set[str]] = {}  # announced saves
        self._lock = threading.Lock()

    def begin(self, key: tuple[str, str], save_id: str) -> None:
        """Announce a save, see SessionStore.begin()."""
        with self._lock:
            self._begun.setdefault(key, set()).add(save_id)

    def end(self, key: tuple[str, str], save_id: str) -> None:
        """Forget an announced save."""
        with self._lock:
            begun = self._begun.get(key, set())
            begun.discard(save_id)
            if not begun:
                self._begun.pop(key, None)

    def holds(self, key: tuple[str, str], save_id: str) -> bool:
        """See SessionStore.holds()."""
        with self._lock:
            copy = self._copies.get(key)
            return save_id in self._begun.get(key, ()) or copy is not None and copy.header.save_id == save_id

    @torch.inference_mode(False)  # vLLM's workers save in it, and such tensors change only in it
    def put(
        self, key: tuple[str, str], header: Header, tokens: torch.Tensor, slabs: list[torch.Tensor], begun: bool = False
    ) -> bool:
        """Copy a session in, under (tenant, name); False if it is too large to be held at all.

        begun: only a save that was announced. Raises SessionRefused (erased) if it was not, or erase() came since.
        """
        with self._lock:
            if begun and header.save_id not in self._begun.get(key, ()):
                raise SessionRefused("erased", f"session {key[1]} was erased before it was saved")
            held = self._copies.get(key)
            if held is None or [len(x) for x in held.slabs] != [len(x) for x in slabs]:
                self._drop(key)
                if header.rank_bytes > self._max_bytes:
                    return False
                self._make_room(key, header.rank_bytes)
                buffers = [torch.empty_like(slab) for slab in slabs]
                self._bytes += header.rank_bytes
            else:
                buffers = held.slabs  # faster than fresh pages
            copies = [buffer.copy_(slab) for buffer, slab in zip(buffers, slabs, strict=True)]
            self._copies[key] = _Copy(header, tokens.clone(), copies, time.monotonic_ns())
            return True

    def peek(self, key: tuple[str, str]) -> tuple[Header, torch.Tensor] | None:
        """Header and tokens."""
        with self._lock:
            copy = self._copies.get(key)
            return copy and (copy.header, copy.tokens.clone())

    def take(
        self, key: tuple[str, str], slab_for: Callable[[Header], torch.Tensor | None], earlier: bool = False
    ) -> tuple[Header, torch.Tensor, torch.Tensor] | None:
        """Header, tokens and a slab, None if not held. slab_for(header): where to copy to, None to decline."""
        with self._lock:
            copy = self._copies.get(key)
            slab = None if copy is None else slab_for(copy.header)
            if slab is None:
                return None
            copy.used_ns = time.monotonic_ns()
            return copy.header, copy.tokens.clone(), slab.copy_(copy.slabs[earlier])

    def drop(self, key: tuple[str, str]) -> bool:
        """Zero and forget a session; False if it is not held."""
        with self._lock:
            return self._drop(key)

    def erase(self, key: tuple[str, str]) -> bool:
        """drop(), and refuse the saves that were announced; False if there was neither."""
        with self._lock:
            begun = self._begun.pop(key, None)
            return self._drop(key) or begun is not None

    def headers(self) -> dict[tuple[str, str], Header]:
        with self._lock:
            return {key: copy.header for key, copy in self._copies.items()}

    def _make_room(self, key: tuple[str, str], n_bytes: int) -> None:
        if len(self._copies) < self._max_sessions and self._bytes + n_bytes <= self._max_bytes:
            return
        usages = [Usage(key, key[0], n_bytes, time.monotonic_ns())]
        usages += [Usage(k, k[0], copy.header.rank_bytes, copy.used_ns) for k, copy in self._copies.items()]
        for victim in victims(usages, self._max_sessions, self._max_bytes, keep=key):
            self._drop(victim)

    def _drop(self, key: tuple[str, str]) -> bool:
        copy = self._copies.pop(key, None)
        if copy is not None:
            self._bytes -= copy.header.rank_bytes
            for x in (copy.tokens, *copy.slabs):
                x.zero_()
        return copy is not None
