"""The agent's memory across restarts: an SQLite file of its own.

Intents are written before they are acted on. A transaction reaches the file system before the call
returns, so the death of any process loses nothing. ``synchronous=NORMAL`` leaves the sync to the
disk to the checkpoints: a power cut may lose the last moments (0.02 ms instead of 0.55 ms for each
write, measured), and costs nothing, because every session ends with the machine: what ran in an
earlier boot is never started again (see ``Journal.boot_changed``).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from madang.agent.reconcile import Phase
from madang.kit.codec import from_json, to_json
from madang.wire.errors import RuntimeFailed, StateVersion, StorageFull
from madang.wire.kernel import Assignment, KernelId, KernelReport

FORMAT: Final = 1
_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE kernel (
    id TEXT PRIMARY KEY, phase TEXT NOT NULL, assignment BLOB, report BLOB NOT NULL
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is remembered of one kernel."""

    kernel: KernelId
    phase: Phase
    assignment: Assignment | None
    """None for one that was found and nobody named yet."""
    report: KernelReport


class Journal:
    """Calls are short and block; used by the agent's event loop alone."""

    def __init__(self, path: str, boot_id: str, now: float) -> None:
        """Open or make the file; counts up the incarnation, whatever *now* (Unix time) says."""
        with _errors(path):
            self._db = sqlite3.connect(path, isolation_level=None, timeout=10)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
        try:
            self._path = path
            self._prepare()
            last = int(self._meta("incarnation", "0"))
            # From the time, so that it grows also when the file was lost.
            self.incarnation = max(last + 1, int(now))
            self.boot_changed = self._meta("boot_id", boot_id) != boot_id
            """The machine was restarted since: nothing of what was running can be."""
            self.revision = int(self._meta("revision", "0"))
            """Newest desired state that was taken in, from whatever link."""
            with self._transaction():
                self._set_meta("incarnation", str(self.incarnation))
                self._set_meta("boot_id", boot_id)
        except BaseException:
            self._db.close()
            raise

    def records(self) -> list[Record]:
        """All kernels, in no order."""
        with _errors(self._path):
            rows = self._db.execute("SELECT id, phase, assignment, report FROM kernel").fetchall()
        return [
            Record(
                kernel=KernelId.parse(name),
                phase=Phase(phase),
                assignment=None if assignment is None else from_json(Assignment, assignment),
                report=from_json(KernelReport, report),
            )
            for name, phase, assignment, report in rows
        ]

    def save(self, records: Iterable[Record], revision: int | None = None) -> None:
        """Write all or nothing. Raises StorageFull."""
        with self._transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO kernel VALUES (?, ?, ?, ?)",
                [
                    (
                        str(record.kernel),
                        record.phase.value,
                        None if record.assignment is None else to_json(record.assignment),
                        to_json(record.report),
                    )
                    for record in records
                ],
            )
            if revision is not None:
                self._set_meta("revision", str(revision))
        if revision is not None:
            self.revision = revision

    def forget(self, kernel: KernelId) -> None:
        """Its removal is complete."""
        with self._transaction():
            self._db.execute("DELETE FROM kernel WHERE id = ?", (str(kernel),))

    def close(self) -> None:
        self._db.close()

    def _prepare(self) -> None:
        with _errors(self._path):
            found = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if found > FORMAT:
            raise StateVersion(f"{self._path} has format {found}; this Madang knows {FORMAT}.")
        if found == 0:
            with self._transaction():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={FORMAT}")

    def _meta(self, key: str, default: str) -> str:
        with _errors(self._path):
            row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return default if row is None else str(row[0])

    def _set_meta(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with _errors(self._path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
        if code in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}:
            raise StorageFull(f"the agent's journal {path} can't be written: {exc}.") from exc
        raise RuntimeFailed(f"the agent's journal {path} is unusable: {exc}.") from exc


def boot_id() -> str:
    """The kernel's name for this boot of the machine."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def ensure_folder(path: str) -> None:
    """Make the folder of the file *path*, private."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
