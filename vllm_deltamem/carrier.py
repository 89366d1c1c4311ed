"""What brings memories from slots to the session store and back, on threads beside the worker's steps.

A slot is copied to host memory, which a step waits for on the CPU only, and may be used anew; one thread encrypts
and writes. Another reads: into host memory first where slots are on a device, and from there what still waits to be
written. What a step applies or reports is what is done by then. Only the worker's thread calls a Carrier.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from vllm.utils.platform_utils import is_pin_memory_available

from vllm_deltamem.sessions import SessionRefused, SessionStore
from vllm_deltamem.transfers import Transfer, Turn

SPARE = 2  # a slot, and the same from before its answer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copied:
    """A slot as it was, in host memory."""

    buffer: torch.Tensor  # uint8, at least as many as the slot takes
    n_bytes: int
    done: torch.cuda.Event | None  # until then the device is still filling it

    @classmethod
    @torch.inference_mode()  # a tensor made in it changes in it only
    def of(cls, rows: list[torch.Tensor], buffer: torch.Tensor | None = None) -> Copied:
        """Copy a slot, its parts uint8 [bytes] each, as the steps so far leave it: later ones may use it anew.

        buffer: to copy it to, of an earlier copy that is no longer needed.
        """
        n_bytes, device = sum(map(len, rows)), rows[0].device
        buffer = _host_memory(n_bytes, device) if buffer is None else buffer
        for copy, row in zip(buffer[:n_bytes].chunk(len(rows)), rows, strict=True):
            copy.copy_(row, non_blocking=True)
        if device.type == "cpu":
            return cls(buffer, n_bytes, None)
        done = torch.cuda.Event()
        done.record()
        return cls(buffer, n_bytes, done)

    def wait(self) -> torch.Tensor:
        """The bytes, once they are there."""
        if self.done is not None:
            self.done.synchronize()
        return self.buffer[: self.n_bytes]


@dataclass(eq=False)
class Write:
    """A session to save, and its memories; n_earlier of the transfer's tokens are what the earlier one had read."""

    transfer: Transfer
    slot: Copied
    earlier: Copied | None
    _zeroing: threading.Lock = field(default_factory=threading.Lock)
    _zeroed: bool = False

    @property
    def n_bytes(self) -> int:
        return sum(copied.n_bytes for copied in self.copies())

    @torch.inference_mode()  # as the copies were made
    def run(self, store: SessionStore) -> None:
        """Save it; a session that cannot be saved stays as it was, with a warning."""
        turn, n_earlier = self.transfer.turn, self.transfer.n_earlier
        saved = False
        try:
            slab, *others = (copied.wait() for copied in self.copies())
            earlier = (n_earlier, *others) if others else None
            parts = self.transfer.slot.parts
            store.save(turn.tenant, turn.name, self.transfer.tokens, slab, turn.save_id, earlier, parts)
            saved = True
        except SessionRefused as refused:
            logger.warning("deltamem could not save a session: %s", refused)
        finally:
            if store.directory is None or not saved:  # else other ranks may still be writing theirs
                end(store, turn)
            with self._zeroing:
                self._zeroed = True
                for copied in self.copies():
                    copied.wait().zero_()

    def take(self, out: torch.Tensor, earlier: bool) -> bool:
        """Copy a memory that waits to be written; False where it no longer does: the store has what became of it."""
        copied = self.earlier if earlier else self.slot
        with self._zeroing:
            if not self._zeroed:
                out.copy_(copied.wait())
            return not self._zeroed

    def copies(self) -> list[Copied]:
        return [self.slot] + ([self.earlier] if self.earlier else [])


@dataclass
class Read:
    """A session to restore into a slot, its parts uint8 [bytes] each, that no step uses meanwhile."""

    transfer: Transfer
    rows: list[torch.Tensor]  # no more parts than the session has
    waiting: Write | None = None  # the same save, where it has not been written yet
    staged: torch.Tensor | None = None  # what was read, where the slot is on a device or in parts
    refused: SessionRefused | None = None

    @torch.inference_mode()
    def run(self, store: SessionStore) -> None:
        """Read it, and note a refusal."""
        turn, reach, row = self.transfer.turn, self.transfer.reach, self.rows[0]
        direct = row.device.type == "cpu" and not reach.parts
        out = row if direct else _host_memory(len(row) * (reach.parts or 1), row.device)
        try:
            save, earlier = (turn.tenant, turn.name, turn.save_id), reach.earlier
            taken = self.waiting is not None and self.waiting.take(out, earlier) and store.holds(*save)
            if not taken and store.restore(*save, out, earlier) is None:
                raise SessionRefused("erased", f"session {turn.name} is gone")
            self.staged = None if direct else out
        except SessionRefused as refused:
            self.refused = refused

    def place(self) -> None:
        """Put what was read into the slot, where it was read elsewhere; raises what refused it."""
        if self.refused:
            raise self.refused
        if self.staged is not None:
            for row, read in zip(self.rows, self.staged.split(len(self.rows[0])), strict=False):
                row.copy_(read, non_blocking=True)


class Carrier:
    """Writes and reads the sessions of one worker; most_bytes: of copies that wait to be written."""

    def __init__(self, store: SessionStore, most_bytes: int):
        self._store, self._most_bytes = store, most_bytes
        self._writer = ThreadPoolExecutor(1, "deltamem-write", _settle)
        self._reader = ThreadPoolExecutor(1, "deltamem-read", _settle)
        self._writes: dict[Future, Write] = {}  # not reported yet, in order
        self._reads: dict[Future, Read] = {}
        self._spare: list[torch.Tensor] = []  # zeroed copies: fresh memory takes many times as long to write to

    def copy(self, rows: list[torch.Tensor]) -> Copied:
        """Copy a slot, see Copied."""
        fitting = [i for i, spare in enumerate(self._spare) if len(spare) >= sum(map(len, rows))]
        return Copied.of(rows, self._spare.pop(fitting[0]) if fitting else None)

    def write(self, write: Write) -> None:
        """Have a session saved. Waits while too much waits to be written."""
        while (left := self._left()) and sum(w.n_bytes for w in left.values()) + write.n_bytes > self._most_bytes:
            wait(left, return_when=FIRST_COMPLETED)
        self._writes[self._writer.submit(write.run, self._store)] = write

    def read(self, transfer: Transfer, rows: list[torch.Tensor]) -> None:
        """Have a session read into a slot, its parts uint8 [bytes] each."""
        same = (write for write in self._writes.values() if write.transfer.turn == transfer.turn)
        read = Read(transfer, rows, next(same, None))
        self._reads[self._reader.submit(read.run, self._store)] = read

    def written(self) -> list[Write]:
        """What was saved or refused since the last call."""
        done = _done(self._writes)
        left = [*self._spare, *(copied.buffer for write in done for copied in write.copies())]
        self._spare = sorted(left, key=len)[-SPARE:]  # smallest first, for those that it is enough for
        return done

    def arrived(self) -> list[Read]:
        """What was read or refused since the last call."""
        return _done(self._reads)

    def pause(self, seconds: float) -> None:
        """Wait until something is done, at most so long."""
        if self._writes or self._reads:
            wait([*self._writes, *self._reads], seconds, FIRST_COMPLETED)
        else:
            time.sleep(seconds)

    def finish(self) -> None:
        """Returns once all is written that write() was given."""
        wait(self._writes)

    def shutdown(self) -> None:
        """Write what is left, and end the threads."""
        for pool in (self._reader, self._writer):
            pool.shutdown()

    def _left(self) -> dict[Future, Write]:
        return {future: write for future, write in self._writes.items() if not future.done()}


def end(store: SessionStore, turn: Turn) -> None:
    """End a turn, in a store that may not be writable."""
    try:
        store.end(turn.tenant, turn.name, turn.save_id)
    except SessionRefused as refused:
        logger.warning("deltamem: %s", refused)


def _host_memory(n_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8, and for a slot on a device pinned where that can be, for it to read and to write by itself."""
    pinned = device.type != "cpu" and is_pin_memory_available()
    return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)


def _done(futures: dict[Future, Write] | dict[Future, Read]) -> list:
    done = [future for future in futures if future.done()]
    for future in done:
        future.result()  # raises what it raised
    return [futures.pop(future) for future in done]


def _settle() -> None:
    """One thread of PyTorch's for each of ours, on the cores of all threads here: vLLM may bind the caller's to one."""
    torch._C.set_num_threads(1)
    cores = set()
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended since
            cores |= os.sched_getaffinity(int(thread))
    os.sched_setaffinity(0, cores)
