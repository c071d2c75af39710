"""The server's log stays small while it is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging, os, sys
from functools import partial
from madang.daemon.logfile import redirect
from madang.kit import logs
path, lines, most = sys.argv[1], int(sys.argv[2]), 10_000
redirect(path)
turn_over = partial(redirect, path, max_bytes=most)
logging.getLogger().handlers[:] = [logs.LogFile(sys.stderr, most, turn_over)]
for number in range(lines):
    logging.error("line %06d", number)
os.write(2, b"printed to the descriptor\\n")
"""


def write(log: Path, lines: int) -> list[str]:
    """What the file holds after *lines* lines of a process that logs there."""
    command = [sys.executable, "-c", PROGRAM, str(log), str(lines)]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    return log.read_text().splitlines()


def test_an_over_long_log_becomes_dot_one_while_its_process_writes(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    newest = write(log, 5000)

    older = (tmp_path / "server.log.1").read_text().splitlines()
    numbers = [int(line.split()[1]) for line in older + newest[:-1]]
    assert numbers == list(range(numbers[0], 5000))
    assert newest[-1] == "printed to the descriptor"
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) < 10_100


def test_a_short_log_is_one_file_that_a_new_start_continues(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    write(log, 3)
    assert len(write(log, 3)) == 8
    assert [file.name for file in tmp_path.iterdir()] == ["server.log"]


def test_a_log_that_can_not_be_turned_over_is_written_on(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    (tmp_path / "server.log.1").mkdir()
    assert len(write(log, 5000)) == 5001
