"""Sessions: the memory of a conversation after N tokens, kept beyond its request.

    store = SessionStore(SessionSettings.from_dict(config.sessions), fingerprint)
    save_id = store.begin(tenant, name)     # a turn begins
    store.expect(tenant, name, save_id)     # it is over: who shares the directory may wait for the save
    store.save(tenant, name, tokens, slab, save_id)  # tokens: N ids; slab: uint8 [bytes], a slot or parts, opaque here
    store.save(tenant, name, tokens, slab, save_id, earlier=(n, other))  # and as it was after n of them
    store.end(tenant, name, save_id)
    session = store.peek(tenant, name)      # header and tokens only: does the prompt begin with them?
    session = store.restore(tenant, name, session.header.save_id, out=staging)

A save goes to the directory, if there is one, and a copy stays in host memory while it fits. The directory is
the truth: a copy counts only while its file is the newest save of the session, so the processes that share a
directory see one another's saves and erasures. What exists but must not be used raises SessionRefused with
the reason, and the caller computes the prompt anew. Of two saves at once, the one that began later stays.

A store may be shared by threads, its directory by processes: tensor-parallel ranks, replicas, a scheduler.
"""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch

from vllm_deltamem.sessiondirectory import Entry, Save, SessionDirectory, newest
from vllm_deltamem.sessionfile import Fingerprint, Header, SessionFile, SessionRefused
from vllm_deltamem.sessionhost import HostSessions
from vllm_deltamem.sessionname import check_name, check_tenant
from vllm_deltamem.sessionsettings import SessionSettings
from vllm_deltamem.sessionsweep import Sweeper

SAVE_ID = re.compile(r"[0-9a-f]{32}")
REPLACED_AT_MOST = 8  # times that a session may be replaced while it is being read

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Session:
    """What was saved; `slab` is None when it was only looked at."""

    header: Header
    tokens: torch.Tensor  # int32 [N]
    slab: torch.Tensor | None = None  # uint8 [n_bytes], the one that was asked for


class SessionStore:
    """Saves, restores, lists and erases sessions.

    Tenants come from tenant_of(). A name has 1 to 128 characters of A-Z a-z 0-9 . _ : @ = + ~ - and begins
    with a letter, digit or underscore; every method raises ValueError for another one.
    Raises ValueError for a bad key or directory. The parts of tensor-parallel workers need a directory to meet in.
    """

    def __init__(self, settings: SessionSettings, fingerprint: Fingerprint):
        self.settings = settings
        self._fingerprint = fingerprint
        self._host = HostSessions(settings.max_sessions, settings.host_bytes)
        self.directory = SessionDirectory.of(settings)
        self.sweeper = Sweeper(settings, self.directory, self._host)
        if self.directory is not None:
            self.sweep()

    def begin(self, tenant: str, name: str, save_id: str | None = None) -> str:
        """Announce the save of a turn that begins now, for all ranks; returns its id. end() must follow.

        An erase() of the session from now on, by any process, is final: save() refuses then. save_id: 32 hex
        digits, chosen by the caller; only without a directory. Raises SessionRefused (unwritable).
        """
        tenant_tag, tag = self._tags(tenant, name)
        if self.directory is None:
            save_id = save_id or uuid.uuid4().hex
            self._host.begin((tenant, name), save_id)
            return save_id
        with _disk("unwritable", f"cannot begin session {name}"):
            return self.directory.begin(tenant_tag, tag, self._fingerprint.tp_size)

    def end(self, tenant: str, name: str, save_id: str) -> None:
        """A turn that begin() announced is over, saved or not. Raises SessionRefused (unwritable)."""
        tenant_tag, tag = self._tags(tenant, name)
        self._host.end((tenant, name), save_id)
        if self.directory:
            with _disk("unwritable", f"cannot end session {name}"):
                self.directory.end(tenant_tag, tag, save_id, self._fingerprint.tp_size)

    def expect(self, tenant: str, name: str, save_id: str) -> None:
        """Tell processes that share the directory that a turn is over and will be saved. Raises SessionRefused."""
        tenant_tag, tag = self._tags(tenant, name)
        if self.directory:
            with _disk("unwritable", f"cannot announce the save of session {name}"):
                self.directory.expect(tenant_tag, tag, save_id, self._fingerprint.tp_size)

    def expects(self, tenant: str, name: str) -> bool:
        """Whether a turn is over whose save is still being written, by any process. Raises SessionRefused."""
        tenant_tag, tag = self._tags(tenant, name)
        if self.directory is None:
            return False
        with _disk("unreadable", f"cannot look for saves of session {name}"):
            return self.directory.expects(tenant_tag, tag)

    def holds(self, tenant: str, name: str, save_id: str) -> bool:
        """Whether a save has begun or is there, and not erased since nor replaced. Raises SessionRefused."""
        tenant_tag, tag = self._tags(tenant, name)
        if self.directory is None:
            return self._host.holds((tenant, name), save_id)
        with _disk("unreadable", f"cannot look for session {name}"):
            return self.directory.holds(tenant_tag, tag, save_id)

    def save(
        self, tenant: str, name: str, tokens: Sequence[int] | torch.Tensor, slab: torch.Tensor,
        save_id: str | None = None, earlier: tuple[int, torch.Tensor] | None = None, parts: int = 0,
    ) -> Header:  # fmt: skip
        """Keep a session in place of the one of the same name; durable on return.

        tokens: N ids, 0 <= id < 2**31. slab: uint8 [bytes] on the CPU, contiguous; it is only read.
        save_id: from begin(), the same for all ranks; None, if there is one rank, for a turn that begins now.
        earlier: how many of the tokens another slab of the same size has read; left out where both are too large.
        parts: of slots that the slab is; 0: a whole slot.
        Raises SessionRefused: size or unwritable, and the session saved before is still there; erased.
        """
        tenant_tag, tag = self._tags(tenant, name)
        size = self._fingerprint.tp_size
        tokens = _token_ids(tokens)
        slabs = [slab, earlier[1]] if earlier else [slab]
        for x in slabs:
            _check_slab(x)
        if save_id is None and size == 1:
            save_id = self.begin(tenant, name)
            try:
                return self.save(tenant, name, tokens, slab, save_id, earlier, parts)
            finally:
                self.end(tenant, name, save_id)
        if not SAVE_ID.fullmatch(save_id or ""):
            raise ValueError(f"save_id must be 32 hex digits, the same for all ranks: {save_id!r}")
        limit = self.settings.max_bytes if self.directory else self.settings.host_bytes
        if (n_bytes := slab.numel() * size) > limit:
            raise SessionRefused("size", f"a session of {n_bytes} bytes exceeds the limit of {limit}")
        if earlier and 2 * n_bytes > limit:
            slabs, earlier = slabs[:1], None
        with _disk("unwritable", f"cannot save session {name}"):
            created = time.time_ns()
            if self.directory:
                # A clock behind the last saver's must not make this save the older one.
                before = self.directory.entries(tenant_tag, tag)
                created = max([created, *(entry.created_ns + 1 for entry in before)])
            n_earlier, made = earlier[0] if earlier else 0, self._fingerprint
            header = Header(tenant_tag, name, save_id, created, len(tokens), n_earlier, slab.numel(), parts, made)
            if self.directory:
                self.directory.publish(tag, header, tokens, slabs)
        self._host.put((tenant, name), header, tokens, slabs, begun=self.directory is None)
        if self.directory:
            try:
                self.sweeper.saved(tag, header)
            except OSError as error:
                logger.warning("deltamem sessions: cannot clean up %s: %s", self.settings.directory, error)
        return header

    def peek(self, tenant: str, name: str) -> Session | None:
        """Header and tokens of a session that every rank can restore; None if there is none.

        Raises SessionRefused; slabs are not read, so one that was altered is found by restore() only.
        """
        tenant_tag, tag = self._tags(tenant, name)
        if self.directory is None:
            self._expire_in_host((tenant, name))
            found = self._host.peek((tenant, name))
            return found and Session(*found)

        def read(save: Save) -> Session:
            sessions = []
            for _, entry in sorted(save.entries.items()):
                with self._open(entry, tenant_tag, name) as file:
                    sessions.append(Session(file.header, file.tokens()))
            if any(not torch.equal(session.tokens, sessions[0].tokens) for session in sessions):
                raise SessionRefused("altered", f"the ranks of session {name} hold different tokens")
            return sessions[self._fingerprint.tp_rank]

        return self._read_newest(tenant, name, read)

    def restore(
        self, tenant: str, name: str, save_id: str | None = None, out: torch.Tensor | None = None,
        earlier: bool = False,
    ) -> Session | None:  # fmt: skip
        """The session with its slab, or the earlier one; None if there is no such session.

        save_id: refuse any other save than this one, which peek() reported, or this rank's part of which is written.
        out: uint8 [n_bytes] on the CPU, receives the slab. Raises SessionRefused; out then holds zeros, or what it
        held before.
        """
        tenant_tag, tag = self._tags(tenant, name)
        if out is not None:
            _check_slab(out)
        if self.directory is None:
            self._expire_in_host((tenant, name))
            found = self._host.take((tenant, name), lambda held: _slab_for(held, save_id, out, earlier), earlier)
            return found and Session(*found)

        def read(save: Save) -> Session:
            entry = save.entries.get(self._fingerprint.tp_rank) or save.entries[0]
            with self._open(entry, tenant_tag, name) as file:
                slab = _slab_for(file.header, save_id, out, earlier)
                held = self._host.take((tenant, name), lambda held: slab if held == file.header else None, earlier)
                if held is None:
                    held = file.header, file.tokens(), slab
                    file.slab(slab, earlier)
            with suppress(OSError):  # only the order of eviction depends on it
                os.utime(entry.path)
            return Session(*held)

        return self._read_newest(tenant, name, read, save_id)

    def list(self, tenant: str) -> list[Header]:
        """The sessions of a tenant, newest first; files that cannot be read are left out."""
        tenant_tag, _ = self._tags(tenant, "any")
        if self.directory is None:
            headers = [header for (owner, _), header in self._host.headers().items() if owner == tenant]
        else:
            with _disk("unreadable", "cannot list the sessions"):
                headers = list(self._headers(tenant_tag))
        live = (header for header in headers if not self.settings.expired(header.created_ns))
        return sorted(live, key=lambda header: -header.created_ns)

    def summaries(self, tenant: str) -> list[dict]:
        """list() for people: name, tokens, bytes (all ranks together) and age in seconds of each session."""
        now = time.time_ns()
        return [
            {
                "name": header.name,
                "tokens": header.n_tokens,
                "bytes": header.rank_bytes * header.fingerprint.tp_size,
                "age_s": round(max(now - header.created_ns, 0) / 1e9, 1),
            }
            for header in self.list(tenant)
        ]

    def erase(self, tenant: str, name: str) -> bool:
        """Erase a session for good, of all ranks: memory zeroed, files overwritten; False if there was none.

        Turns that have begun are not saved any more. Copies in the memory of other processes can no longer be
        restored; their next sweep() zeroes them. Raises SessionRefused (unwritable).
        """
        tenant_tag, tag = self._tags(tenant, name)
        erased = self._host.erase((tenant, name))
        if self.directory:
            with _disk("unwritable", f"cannot erase session {name}"):
                erased = self.directory.erase(tenant_tag, tag) or erased
        return erased

    def sweep(self) -> None:
        """Apply expiry and quotas, wipe what dead writers left. Raises SessionRefused (unwritable)."""
        with _disk("unwritable", "cannot clean up the sessions"):
            self.sweeper.sweep()

    def _tags(self, tenant: str, name: str) -> tuple[str, str]:
        """The keyed hashes under which a session is filed."""
        check_tenant(tenant)
        check_name(name)
        if self.directory is None:
            return tenant, name
        return self.directory.tenant_tag(tenant), self.directory.name_tag(tenant, name)

    def _expire_in_host(self, key: tuple[str, str]) -> None:
        found = self._host.peek(key)
        if found and self.settings.expired(found[0].created_ns):
            self._host.drop(key)
            raise SessionRefused("expired", f"session {key[1]} has expired")

    def _read_newest(
        self, tenant: str, name: str, read: Callable[[Save], Session], save_id: str | None = None
    ) -> Session | None:
        """read() the newest complete save of a session, again if it is replaced meanwhile.

        save_id: of a save of which this rank's part will do, if that is there.
        """
        tenant_tag, tag = self._tags(tenant, name)
        for attempt in range(REPLACED_AT_MOST):
            with _disk("unreadable", f"cannot read session {name}"):
                entries = self.directory.entries(tenant_tag, tag)
                part = [e for e in entries if (e.save_id, e.rank) == (save_id, self._fingerprint.tp_rank)]
                save = Save({entry.rank: entry for entry in part}) if part else newest(entries)
                if (save is None or save.missing and not part) and attempt == 0:
                    continue  # a listing may show neither of two files when one replaces the other meanwhile
                if save is None or self.settings.expired(save.created_ns):
                    self._host.drop((tenant, name))
                    for entry in entries:
                        self.directory.wipe(entry.path)
                    if save is None:
                        return None
                    raise SessionRefused("expired", f"session {name} has expired")
                if save.missing and not part:
                    raise SessionRefused("incomplete", f"session {name} lacks ranks {save.missing}")
                try:
                    return read(save)
                except FileNotFoundError:
                    continue
                except SessionRefused:
                    if all(os.path.exists(entry.path) for entry in save.entries.values()):
                        raise
        raise SessionRefused("replaced", f"session {name} is being replaced all the time")

    @contextmanager
    def _open(self, entry: Entry, tenant_tag: str, name: str) -> Iterator[SessionFile]:
        """A file that is what its name says, of the session `name`, and made under our fingerprint."""
        with SessionFile(entry.path, tenant_tag, self.directory.seal) as file:
            header, made = file.header, file.header.fingerprint
            said = (name, entry.created_ns, entry.save_id, entry.rank, entry.size)
            if said != (header.name, header.created_ns, header.save_id, made.tp_rank, made.tp_size):
                raise SessionRefused("altered", f"the file of session {name} is another session's")
            if difference := replace(self._fingerprint, tp_rank=0).difference(replace(made, tp_rank=0)):
                raise SessionRefused("fingerprint", f"session {name} does not fit: {difference}")
            yield file

    def _headers(self, tenant_tag: str) -> Iterator[Header]:
        for entries in self.directory.sessions(tenant_tag).values():
            with suppress(SessionRefused, FileNotFoundError):
                save = newest(entries)
                if not save.missing:
                    with SessionFile(save.entries[0].path, tenant_tag, self.directory.seal) as file:
                        yield file.header


def _token_ids(tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """int32 [N]."""
    ids = torch.as_tensor(tokens, dtype=torch.int64, device="cpu")
    if ids.dim() != 1 or not len(ids) or ids.min() < 0 or ids.max() >= 1 << 31:
        raise ValueError(f"tokens must be one row of ids from 0 to 2**31 - 1, got shape {list(ids.shape)}")
    return ids.to(torch.int32)


def _check_slab(slab: torch.Tensor) -> None:
    if slab.dtype != torch.uint8 or slab.dim() != 1 or not slab.is_contiguous() or slab.device.type != "cpu":
        raise ValueError(f"a slab is uint8 [bytes], contiguous, on the CPU: {slab.dtype} {list(slab.shape)}")


def _slab_for(header: Header, save_id: str | None, out: torch.Tensor | None, earlier: bool) -> torch.Tensor:
    """The tensor to read a slab of this session into."""
    if save_id not in (None, header.save_id) or earlier and not header.n_earlier:
        raise SessionRefused("replaced", f"session {header.name} was saved anew since it was looked up")
    if out is None:
        return torch.empty(header.n_bytes, dtype=torch.uint8)
    if len(out) != header.n_bytes:
        raise SessionRefused("size", f"session {header.name} has {header.n_bytes} bytes, the slot {len(out)}")
    return out


@contextmanager
def _disk(reason: str, message: str) -> Iterator[None]:
    """Turns what the disk raises into SessionRefused."""
    try:
        yield
    except OSError as error:
        raise SessionRefused(reason, f"{message}: {error.strerror}") from error
