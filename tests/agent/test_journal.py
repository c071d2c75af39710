"""The agent's memory."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from madang.agent.journal import Journal, Record, boot_id
from madang.agent.kernel import new_record
from madang.agent.reconcile import Phase
from madang.testing.simulation import assignment
from madang.wire.errors import RuntimeFailed, StateVersion, StorageFull
from madang.wire.session import Ended, Reason


def record(name: str = "s") -> Record:
    return new_record(assignment(name))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "journal.db")


def reopened(path: str, boot: str = "boot", now: float = 0.0) -> Journal:
    return Journal(path, boot, now)


def test_what_is_saved_is_there_again(path: str) -> None:
    one, two = record("one"), record("two")
    ended = replace(two.report, ended=Ended(reason=Reason.EXIT, exit_code=3))
    two = replace(two, phase=Phase.ENDED, report=ended)
    unknown = replace(record("unknown"), assignment=None)
    journal = reopened(path)
    journal.save([one, two, unknown], revision=7)
    journal.save([replace(one, phase=Phase.RUNNING)])
    journal.forget(unknown.kernel)
    journal.close()

    again = reopened(path)

    found = {each.kernel: each for each in again.records()}
    assert found == {one.kernel: replace(one, phase=Phase.RUNNING), two.kernel: two}
    assert again.revision == 7
    again.close()


def test_each_opening_is_a_later_incarnation(path: str) -> None:
    seen = []
    for now in (1000.0, 1000.0, 5.0, 2000.0):
        journal = reopened(path, now=now)
        seen.append(journal.incarnation)
        journal.close()

    assert seen == [1000, 1001, 1002, 2000]


def test_a_reboot_is_noticed_once(path: str) -> None:
    changed = []
    for boot in ("one", "one", "two", "two"):
        journal = reopened(path, boot=boot)
        changed.append(journal.boot_changed)
        journal.close()

    assert changed == [False, False, True, False]
    assert len(boot_id()) == 36


def test_a_newer_format_is_refused_and_left_alone(path: str) -> None:
    reopened(path).close()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("PRAGMA user_version=99")
    database.close()

    with pytest.raises(StateVersion):
        reopened(path)


def test_a_file_that_is_no_journal_is_said(path: str) -> None:
    Path(path).write_bytes(b"this is no database" * 1000)

    with pytest.raises(RuntimeFailed, match="journal"):
        reopened(path)


_WRITER = """
import sys
from madang.agent.journal import Journal
from madang.agent.kernel import new_record
from madang.testing.simulation import assignment
journal = Journal(sys.argv[1], "boot", 0.0)
for number in range(10**6):
    journal.save([new_record(assignment(f"s{number}"))], revision=number)
    print(number, flush=True)
"""


def test_what_was_saved_before_a_kill_is_there(path: str) -> None:
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, path], stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout is not None
        said = [int(writer.stdout.readline()) for _ in range(50)]
        writer.send_signal(signal.SIGKILL)
        said += [int(line) for line in writer.stdout.read().split()]

    journal = reopened(path)

    names = {each.kernel.session for each in journal.records()}
    assert {f"s{number}" for number in said} <= names
    assert journal.revision >= said[-1]
    assert len(names) == journal.revision + 1, "a record and its revision come together"
    journal.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.root
def test_a_full_disk_is_said_and_what_was_there_stays(small_disk: Path) -> None:
    journal = reopened(str(small_disk / "journal.db"))
    journal.save([record("kept")], revision=1)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="space"), filler.open("wb") as file:
        file.write(b"x" * 10**6)

    with pytest.raises(StorageFull):
        for number in range(1000):
            journal.save([record(f"s{number}" + "x" * 1000)])
    filler.unlink()
    journal.save([record("after")])

    names = {each.kernel.session for each in journal.records()}
    assert {"kept", "after"} <= names
    journal.close()
