"""What keeps a session store within its quotas and lets go of what is too old, also while nobody saves."""

from __future__ import annotations

import logging
import threading

from vllm_deltamem.sessiondirectory import Entry, SessionDirectory, newest, superseded, taken
from vllm_deltamem.sessionfile import Header
from vllm_deltamem.sessionhost import HostSessions
from vllm_deltamem.sessionquota import Tally, Usage, victims
from vllm_deltamem.sessionsettings import SessionSettings

EVERY_S = 60.0  # how far apart the looks at the whole directory are, at most

logger = logging.getLogger(__name__)


class Sweeper:
    """Expiry and quotas of one process's store; the files of dead writers. Raises OSError where the disk fails.

    A save looks at the files of its own session only and counts along; all sessions are looked at when a quota
    is exceeded by that count, and regularly between start() and stop(), which sees what other processes saved.
    """

    def __init__(self, settings: SessionSettings, directory: SessionDirectory | None, host: HostSessions):
        self._settings, self._directory, self._host = settings, directory, host
        self._tally = Tally(settings.max_sessions, settings.max_bytes)
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def start(self) -> None:
        """Sweep regularly from now on, on a thread of its own; does nothing if it already does."""
        if self._thread is None:
            self._stopped.clear()
            self._thread = threading.Thread(target=self._run, name="deltamem-sweep", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Returns once the sweep at hand is done; start() works again afterwards."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None

    def saved(self, tag: str, header: Header) -> None:
        """Take away what a rank's save has superseded, and keep the quotas."""
        entries, made = self._directory.entries(header.tenant, tag), header.fingerprint
        gone = superseded(entries, newest(entries)) if entries else []
        freed, _ = taken(gone)
        added, _ = taken(e for e in entries if (e.save_id, e.rank) == (header.save_id, made.tp_rank))
        self._wipe(gone)
        is_new = all(entry.save_id == header.save_id for entry in entries)
        if self._tally.add(int(is_new), added * made.tp_size - freed):
            self.sweep(keep=tag)

    def sweep(self, keep: str | None = None) -> None:
        """Look at everything; the session of the tag `keep` is not given up for others."""
        held, usages, files = self._host.headers(), [], {}
        if self._directory:
            self._directory.wipe_abandoned()
        for tenant in self._directory.tenants() if self._directory else ():
            for tag, entries in self._directory.sessions(tenant).items():
                save = newest(entries)
                gone = entries if self._settings.expired(save.created_ns) else superseded(entries, save)
                self._wipe(gone)
                files[tag] = [entry for entry in entries if entry not in gone]
                n_bytes, used_ns = taken(files[tag])
                if n_bytes:
                    usages.append(Usage(tag, tenant, n_bytes, used_ns))
        given_up = set(victims(usages, self._settings.max_sessions, self._settings.max_bytes, keep))
        for tag in given_up:
            self._wipe(files.pop(tag))
        left = [usage.n_bytes for usage in usages if usage.key not in given_up]
        self._tally.found(len(left), sum(left))
        live = {(tag, entry.save_id) for tag, kept in files.items() for entry in kept}
        for key, header in held.items():
            filed = self._directory is None or (self._directory.name_tag(*key), header.save_id) in live
            if self._settings.expired(header.created_ns) or not filed:
                self._host.drop(key)

    def _wipe(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._directory.wipe(entry.path)

    def _run(self) -> None:
        while not self._stopped.wait(min(EVERY_S, self._settings.max_age_s)):
            try:
                self.sweep()
            except OSError as error:
                logger.warning("deltamem sessions: cannot clean up %s: %s", self._settings.directory, error)
