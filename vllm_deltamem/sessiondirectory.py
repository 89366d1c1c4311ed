"""The directory that processes share to keep sessions in: names, publishing, listing and wiping of files.

    store.json                                      salt of the names, id of the key
    WRITER.writer                                   locked as long as that process lives
    TENANT/NAME-CREATED-SAVE-RANKofSIZE.safetensors one rank of one save
    TENANT/NAME-SAVE-RANKofSIZE.tmp                 the same, begun: SAVE starts with WRITER; empty while the turn lasts
    TENANT/NAME-RANDOM.tmp                          being wiped

TENANT and NAME are keyed hashes, CREATED is hex nanoseconds. A file is begun, empty, when the turn begins that
will be saved in it, and published whole, by a rename; it is never changed afterwards. So whoever takes away
what has begun takes away what would have been published. A save does not replace the one before it: older
saves go once the newer one is there for every rank. So whenever a process dies, and whoever else is saving,
the newest complete save is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from vllm_deltamem.seal import Seal
from vllm_deltamem.sessionfile import HEADER_LIMIT, Header, SessionRefused, write_session
from vllm_deltamem.sessionsettings import SessionSettings

MARKER = "store.json"
FILE = re.compile(r"([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{32})-(\d{1,4})of(\d{1,4})\.safetensors")
TENANT = re.compile(r"[0-9a-f]{32}")
BEGUN = re.compile(r"[0-9a-f]{32}-([0-9a-f]{16})[0-9a-f]{16}-\d{1,4}of\d{1,4}\.tmp")
WRITER = re.compile(r"[0-9a-f]{16}\.writer")
YOUNG_S = 1.0  # a file this young may not have been locked yet by its writer
STUCK_S = 60.0  # nobody waits for a file that has not grown for so long


@dataclass(frozen=True)
class Entry:
    """One file, as far as its name tells."""

    path: str
    tag: str  # keyed hash of the session's name
    created_ns: int
    save_id: str
    rank: int
    size: int  # tensor-parallel size


@dataclass(frozen=True)
class Save:
    """The files of one save, by rank."""

    entries: dict[int, Entry]

    @property
    def created_ns(self) -> int:
        return min(entry.created_ns for entry in self.entries.values())

    @property
    def missing(self) -> list[int]:
        """The ranks whose file is not there."""
        size = next(iter(self.entries.values())).size
        return [rank for rank in range(size) if rank not in self.entries]


class SessionDirectory:
    """A directory of session files for one key, or for none.

    Raises ValueError if it was written with another key, or is not a directory that can be used.
    """

    def __init__(self, root: Path, seal: Seal | None):
        self.root = root
        self.seal = seal
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            salt, key_id = self._marker()
        except OSError as error:
            raise ValueError(f"sessions: cannot use the directory {root}: {error.strerror}") from None
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"sessions: {root / MARKER} is damaged; use another directory") from None
        if key_id != (seal.key_id if seal else None):
            raise ValueError(
                f"sessions: {root} was written with another key, or without one; give that key or another directory"
            )
        self._name_key = seal.derive("names", 32, salt) if seal else salt
        self._writer = secrets.token_hex(8)
        self._lock: BinaryIO | None = None  # on the file that says that this writer lives
        self._locking = threading.Lock()

    @classmethod
    def of(cls, settings: SessionSettings) -> SessionDirectory | None:
        """The directory of these settings, made if need be; None if they name none. Raises ValueError for a bad key."""
        return None if settings.directory is None else cls(Path(settings.directory), Seal.of(settings))

    def tenant_tag(self, tenant: str) -> str:
        return self._tag(f"tenant {tenant}")

    def name_tag(self, tenant: str, name: str) -> str:
        return self._tag(f"session {tenant} {name}")

    def tenants(self) -> Iterator[str]:
        with os.scandir(self.root) as found:
            yield from (item.name for item in found if TENANT.fullmatch(item.name))

    def entries(self, tenant: str, tag: str = "") -> list[Entry]:
        """The files of a tenant, or of one session of it; tenant and tag are keyed hashes."""
        entries = []
        for path in self._paths(tenant, f"{tag}-" if tag else "", ".safetensors"):
            if match := FILE.fullmatch(os.path.basename(path)):
                found, created, save, rank, size = match.groups()
                entries.append(Entry(path, found, int(created, 16), save, int(rank), int(size)))
        return entries

    def sessions(self, tenant: str) -> dict[str, list[Entry]]:
        """The files of every session of a tenant, by the tag of its name."""
        sessions: dict[str, list[Entry]] = {}
        for entry in self.entries(tenant):
            sessions.setdefault(entry.tag, []).append(entry)
        return sessions

    def begin(self, tenant: str, tag: str, size: int) -> str:
        """Begin the files of a save, one for each of `size` ranks; returns its id.

        end() must follow. Raises OSError where the disk fails, also where the directory was emptied or is gone: the
        next process to come chooses another salt then, and finds nothing of what this one saves.
        """
        os.stat(self.root / MARKER)
        with self._locking:
            if self._lock is None:
                self._lock = open(self.root / f"{self._writer}.writer", "xb")
                fcntl.flock(self._lock, fcntl.LOCK_EX)
        folder, save_id = self.root / tenant, self._writer + secrets.token_hex(8)
        if folder.exists():
            os.utime(folder)  # it is in use: see wipe_abandoned
        else:
            folder.mkdir(mode=0o700, exist_ok=True)
            _sync(self.root)
        try:
            for rank in range(size):
                path = _begun(folder, tag, save_id, rank, size)
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except BaseException:
            self.end(tenant, tag, save_id, size)
            raise
        return save_id

    def expect(self, tenant: str, tag: str, save_id: str, size: int) -> None:
        """Mark what has begun as being written from now on. Raises OSError where the disk fails."""
        for rank in range(size):
            with contextlib.suppress(FileNotFoundError):  # it was erased meanwhile
                begun = _begun(self.root / tenant, tag, save_id, rank, size)
                handle = os.open(begun, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                with open(handle, "wb") as file:
                    file.write(b" ")

    def expects(self, tenant: str, tag: str) -> bool:
        """Whether a file of a session is being written by a process that lives."""
        for path in self._paths(tenant, f"{tag}-", ".tmp"):
            begun = BEGUN.fullmatch(os.path.basename(path))
            if begun is None:
                continue
            with contextlib.suppress(FileNotFoundError):
                stat = os.stat(path, follow_symlinks=False)
                alive = stat.st_size and time.time() - stat.st_mtime < STUCK_S
                if alive and _locked(self.root / f"{begun[1]}.writer"):
                    return True
        return False

    def holds(self, tenant: str, tag: str, save_id: str) -> bool:
        """Whether a file of a save has begun or is there: looked for twice, for one that is renamed meanwhile."""
        kinds = (".safetensors", ".tmp")
        return any(save_id in os.path.basename(p) for _ in range(2) for p in self._paths(tenant, f"{tag}-", kinds))

    def end(self, tenant: str, tag: str, save_id: str, size: int) -> None:
        """Wipe what of a save has begun and was not published."""
        for rank in range(size):
            self.wipe(_begun(self.root / tenant, tag, save_id, rank, size))

    def publish(self, tag: str, header: Header, tokens: torch.Tensor, slabs: list[torch.Tensor]) -> None:
        """Write a session to the file that was begun for it and rename that, durably: see write_session().

        Raises SessionRefused if the session was erased since it was begun, OSError where the disk fails.
        """
        made, folder = header.fingerprint, self.root / header.tenant
        rank = f"{made.tp_rank}of{made.tp_size}"
        begun = _begun(folder, tag, header.save_id, made.tp_rank, made.tp_size)
        try:
            handle = os.open(begun, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(handle, "wb") as file:
                write_session(file, header, tokens, slabs, self.seal)
                file.flush()
                os.fsync(file.fileno())
                try:
                    os.rename(begun, folder / f"{tag}-{header.created_ns:016x}-{header.save_id}-{rank}.safetensors")
                except FileNotFoundError:  # wiped while it was being written
                    self._overwrite(file)
                    raise
            _sync(folder)
        except FileNotFoundError:
            raise SessionRefused("erased", f"session {header.name} was erased before it was saved") from None
        except BaseException:
            self.wipe(begun)
            raise

    def wipe(self, path: str) -> bool:
        """Take a file away, overwrite it and unlink it; False if it was already gone.

        Of an encrypted file only the header is overwritten: without the salt in it the rest is noise.
        """
        folder, name = os.path.split(path)
        gone = f"{folder}/{name.split('-')[0]}-{secrets.token_hex(8)}.tmp"
        try:
            os.rename(path, gone)
        except FileNotFoundError:
            return False
        with contextlib.suppress(FileNotFoundError):  # another process took it for abandoned and wipes it
            with open(os.open(gone, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "r+b", buffering=0) as file:
                self._overwrite(file)
            os.unlink(gone)
        return True

    def erase(self, tenant: str, tag: str) -> bool:
        """Wipe every file of a session, those that have begun too; False if there was none.

        Twice, since a file that is renamed during a listing may be missing from it: what was begun before the
        first has been wiped, or has been published before the second.
        """
        kinds = (".safetensors", ".tmp")
        return any([self.wipe(path) for _ in range(2) for path in self._paths(tenant, f"{tag}-", kinds)])

    def wipe_abandoned(self) -> None:
        """Wipe what dead writers have begun, or were wiping, and drop the folders of tenants that have nothing left."""
        for tenant in list(self.tenants()):
            for path in self._paths(tenant, "", ".tmp"):
                begun = BEGUN.fullmatch(os.path.basename(path))
                if _old(path) and not (begun and _locked(self.root / f"{begun[1]}.writer")):
                    self.wipe(path)
            if _old(self.root / tenant):
                with contextlib.suppress(OSError):  # it is not empty
                    os.rmdir(self.root / tenant)
        with os.scandir(self.root) as found:
            writers = [item.path for item in found if WRITER.fullmatch(item.name)]
        for path in writers:
            if _old(path) and not _locked(path):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def _overwrite(self, file: BinaryIO) -> None:
        """Put zeros in place of what the file holds, durably."""
        left = os.fstat(file.fileno()).st_size
        left = left if self.seal is None else min(left, HEADER_LIMIT)
        file.seek(0)
        while left > 0:
            left -= file.write(bytes(min(left, 1 << 20)))
        file.flush()
        os.fsync(file.fileno())

    def _paths(self, tenant: str, prefix: str, suffix: str | tuple[str, ...]) -> list[str]:
        try:
            with os.scandir(self.root / tenant) as found:
                return [i.path for i in found if i.name.startswith(prefix) and i.name.endswith(suffix)]
        except FileNotFoundError:
            return []

    def _marker(self) -> tuple[bytes, str | None]:
        """Salt and key id of the directory; the first process to come chooses the salt."""
        marker = self.root / MARKER
        if not marker.exists():
            key_id = self.seal.key_id if self.seal else None
            text = json.dumps({"salt": secrets.token_hex(32), "key_id": key_id})
            temporary = self.root / f"{MARKER}-{secrets.token_hex(8)}"
            with open(temporary, "x") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(temporary, marker)
            temporary.unlink()
            _sync(self.root)
        values = json.loads(marker.read_text())
        return bytes.fromhex(values["salt"]), values["key_id"]

    def _tag(self, text: str) -> str:
        return hashlib.blake2b(text.encode(), key=self._name_key, digest_size=16).hexdigest()


def newest(entries: Iterable[Entry]) -> Save | None:
    """The newest save that is complete, else the newest; None without entries."""
    saves: dict[tuple[str, int], Save] = {}
    for entry in sorted(entries, key=lambda entry: entry.created_ns):
        saves.setdefault((entry.save_id, entry.size), Save({})).entries[entry.rank] = entry
    return max(saves.values(), key=lambda save: (not save.missing, save.created_ns), default=None)


def superseded(entries: list[Entry], save: Save) -> list[Entry]:
    """The files of saves that began before the newest one, if that is complete."""
    if save.missing:
        return []
    began: dict[str, int] = {}
    for entry in entries:
        began[entry.save_id] = min(entry.created_ns, began.get(entry.save_id, entry.created_ns))
    kept = save.entries.values()
    return [entry for entry in entries if began[entry.save_id] < save.created_ns and entry not in kept]


def taken(entries: Iterable[Entry]) -> tuple[int, int]:
    """Bytes of the files that are still there, and when one was last saved or restored (ns)."""
    n_bytes = used_ns = 0
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):
            stat = os.stat(entry.path, follow_symlinks=False)
            n_bytes, used_ns = n_bytes + stat.st_size, max(used_ns, stat.st_mtime_ns)
    return n_bytes, used_ns


def _begun(folder: Path, tag: str, save_id: str, rank: int, size: int) -> str:
    return f"{folder}/{tag}-{save_id}-{rank}of{size}.tmp"


def _old(path: str | Path) -> bool:
    """Whether a file is there and was not changed just now."""
    with contextlib.suppress(FileNotFoundError):
        return time.time() - os.stat(path).st_mtime > YOUNG_S
    return False


def _locked(path: str | Path) -> bool:
    """Whether some process holds the lock of a file; False if there is no such file."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
