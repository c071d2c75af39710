"""The server's user reaches what it needs through folders that are closed to it, and no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from madang.daemon import confine
from madang.daemon.state import born
from madang.testing.patience import PATIENCE_S

USER = 2_000_000_000
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


def in_child(action: Callable[[], None]) -> None:
    """Run in a fork, which keeps its namespaces and users to itself."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def make_closed(tmp_path: Path) -> tuple[Path, Path]:
    """A needed and a private folder below one that only its owner may enter."""
    closed = tmp_path / "home"
    needed, private = closed / "deep" / "needed", closed / "private"
    for folder in (needed, private):
        folder.mkdir(parents=True)
        (folder / "file").write_text("content")
    closed.chmod(0o700)
    return needed, private


@needs_root
def test_a_needed_folder_is_reached_through_a_closed_one_and_nothing_else(tmp_path: Path) -> None:
    needed, private = make_closed(tmp_path)
    closed = confine.closed_parents([str(needed)], USER)
    assert any(str(needed).startswith(top + "/") for top in closed)

    def check() -> None:
        confine.open_view([str(needed)], closed)
        confine.become(USER, USER)
        assert (needed / "file").read_text() == "content"
        assert not private.exists()
        with pytest.raises(PermissionError):
            (needed / "new").write_text("")

    in_child(check)
    assert (private / "file").read_text() == "content"


@needs_root
def test_who_became_the_server_has_no_way_back() -> None:
    def check() -> None:
        confine.become(USER, USER)
        assert os.getresuid() == (USER, USER, USER)
        assert os.getgroups() == []
        with pytest.raises(PermissionError):
            os.setuid(0)
        assert b"NoNewPrivs:\t1" in Path("/proc/self/status").read_bytes()

    in_child(check)


def test_only_outermost_folders_are_named(tmp_path: Path) -> None:
    needed, _ = make_closed(tmp_path)
    (tmp_path / "home" / "deep").chmod(0o700)
    closed = confine.closed_parents([str(needed), "/usr/lib/python3"], USER)
    assert len(closed) == len({os.path.commonpath([a, needed]) for a in closed})
    assert not any(a != b and b.startswith(a + "/") for a in closed for b in closed)
    assert confine.closed_parents(["/usr/lib/python3"], USER) == []


def test_a_child_ends_with_its_parent() -> None:
    script = (
        "import os, signal, sys, time\n"
        "from madang.daemon import confine\n"
        "me = os.getpid()\n"
        "if os.fork() == 0:\n"
        "    confine.die_with(me)\n"
        "    os.write(1, b'%d\\n' % os.getpid())\n"
        "    time.sleep(60)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    late = time.monotonic() + PATIENCE_S
    while born(child) is not None and time.monotonic() < late:
        time.sleep(0.01)
    assert born(child) is None, "the child outlived its parent"
