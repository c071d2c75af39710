"""Run a command; fail if it leaves processes, mounts or loop devices behind.

``python contained.py COMMAND…``: adopts every process whose parent dies (as process 1 would), so
that daemons of a test are seen too. Temporary files go to a folder of its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from madang.daemon.confine import closed_parents, needed_paths, open_view

PR_SET_CHILD_SUBREAPER = 36
NOBODY = 65534
PATIENCE_S = float(os.environ.get("CONTAINED_PATIENCE_S", "10"))


def main() -> int:
    open_checkout()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Not below a private folder: processes of other users reach their files here. The names are
    # short: a Unix socket's path holds 107 bytes.
    with tempfile.TemporaryDirectory(
        prefix="mt-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        Path(folder).chmod(0o755)
        own = {"TMPDIR": folder, "HOME": folder, "PYTEST_ADDOPTS": f"--basetemp={folder}/t"}
        # Also where our own caller ignores it, as shells do for what runs in the background.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        command = subprocess.Popen(sys.argv[1:], env=os.environ | own)
        signal.signal(signal.SIGTERM, lambda *_: command.terminate())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        status = reap_until(command.pid)
        left = [*processes(), *mounts(folder), *loops(folder)]
    if left:
        print("\nleft behind:", *left, sep="\n  ")
    return status or bool(left)


def open_checkout() -> None:
    """Tests run processes of other users, who must reach this folder, also below ``/root``."""
    here = os.getcwd()
    if os.geteuid() == 0:
        paths = needed_paths([here])
        if closed := closed_parents(paths, NOBODY):
            open_view(paths, closed)
            os.chdir(here)


def reap_until(main_pid: int) -> int:
    """Reap adopted processes until the command has ended; its exit code."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == main_pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def processes() -> Iterator[str]:
    """End what is still there after a while, naming it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.05)
    for pid in map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()):
        yield f"process {pid}: {Path(f'/proc/{pid}/cmdline').read_text().replace(chr(0), ' ')}"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def mounts(folder: str) -> Iterator[str]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if folder in line:
            yield f"mount {line}"
            subprocess.run(["umount", "-l", line.split()[1]], check=False)


def loops(folder: str) -> Iterator[str]:
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = file.read_text().strip()
        except OSError:
            continue
        if folder in backing:
            yield f"loop device {file.parts[3]}: {backing}"


if __name__ == "__main__":
    sys.exit(main())
