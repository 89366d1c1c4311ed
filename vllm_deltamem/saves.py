"""The saves of sessions as the scheduler knows them: those that workers are at, and the last one of every session."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from vllm_deltamem.plan import MemoryPlan
from vllm_deltamem.sessionfile import Header, SessionRefused
from vllm_deltamem.sessions import SessionStore
from vllm_deltamem.transfers import Note, Transfer


@dataclass
class _Open:
    save: Transfer
    workers: int  # that are not done with it


class Saves:
    """The store's directory tells what was saved. Host memory is the worker's, so notes of it are kept."""

    def __init__(self, store: SessionStore, plan: MemoryPlan, workers: int):
        self._store, self._plan, self._workers = store, plan, workers
        self._open: dict[str, _Open] = {}  # by save, in their order
        self._notes: dict[tuple[str, str], Note] = {}  # by tenant and name, of what is in host memory
        self._reset_ns = 0
        self._stale: set[str] = set()  # saves that workers were at then

    def add(self, save: Transfer) -> None:
        """Workers are told to save. Raises SessionRefused where other processes can't be told to wait for it."""
        self._open[save.turn.save_id] = _Open(save, self._workers)
        self._store.expect(save.turn.tenant, save.turn.name, save.turn.save_id)

    def written(self, counts: Counter[str]) -> None:
        """So many workers are done with these saves."""
        for save_id, workers in counts.items():
            self._open[save_id].workers -= workers
            if not self._open[save_id].workers:
                self._keep(self._open.pop(save_id).save)

    def reset(self) -> None:
        """Restore nothing from before: the model's weights may have changed."""
        self._reset_ns = time.time_ns()
        self._stale |= self._open.keys()
        self._notes.clear()

    def last(self, tenant: str, name: str) -> Note | None:
        """The last save of a session. Raises SessionRefused where it can't be read.

        A note may outlive its session: the worker then reports that it could not load it.
        """
        if self._store.directory is None:
            if (tenant, name) in self._notes:  # the worker's host memory, too, lets go of what was not used for longest
                self._notes[tenant, name] = self._notes.pop((tenant, name))
            return self._notes.get((tenant, name))
        session = self._store.peek(tenant, name)
        if session is None:
            return None
        self._check_reset(name, session.header.save_id, session.header.created_ns)
        self._check_size(session.header)
        return self._note(session.header.save_id, session.tokens, session.header.n_earlier, session.header.parts)

    def unwritten(self, tenant: str, name: str) -> Note | None:
        """The last save of a session, as long as workers are at it. Raises SessionRefused."""
        for held in reversed(self._open.values()):
            save, turn = held.save, held.save.turn
            if (turn.tenant, turn.name) == (tenant, name):
                erased = self._store.directory is not None and not self._store.holds(tenant, name, turn.save_id)
                if erased:
                    return None
                self._check_reset(name, turn.save_id)
                return self._note(turn.save_id, save.tokens, save.n_earlier, save.slot.parts)
        return None

    def _check_reset(self, name: str, save_id: str, created_ns: float = inf) -> None:
        if save_id in self._stale or created_ns < self._reset_ns:
            raise SessionRefused("reset", f"session {name} is from before vLLM's caches were reset")

    def _check_size(self, header: Header) -> None:
        """That the bytes are what so many tokens take: a clear file may say anything."""
        plan, parts, tokens = self._plan, header.parts, header.n_tokens
        fits = header.n_bytes == (parts * plan.block_bytes if parts else plan.worker_bytes)
        if parts:
            fits &= tokens <= plan.part_tokens and 0 <= parts * plan.part.cells - tokens < plan.part.cells
        if not fits:
            said = f"{header.n_bytes} bytes in {parts} parts for {tokens} tokens"
            raise SessionRefused("size", f"session {header.name} has {said}, which no slot here has")

    def _keep(self, save: Transfer) -> None:
        if self._store.directory is None:
            session = save.turn.tenant, save.turn.name
            self._notes.pop(session, None)
            if save.turn.save_id in self._stale:
                return
            self._notes[session] = self._note(save.turn.save_id, save.tokens, save.n_earlier, save.slot.parts)
            if len(self._notes) > self._store.settings.max_sessions:
                del self._notes[next(iter(self._notes))]

    def _note(self, save_id: str, tokens: Sequence[int], n_earlier: int, parts: int) -> Note:
        return Note.of(save_id, tokens, n_earlier, parts, self._plan.grain)
