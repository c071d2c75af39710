"""Frozen sessions on a real platform, through the command line and the client."""

from __future__ import annotations

import json
import os
import time

import pytest

from madang.client import Client
from madang.client.streams import Run
from madang.testing.patience import PATIENCE_S, wait_until
from madang.testing.platform import Platform
from madang.wire.errors import SessionNotRunning
from madang.wire.log import LogRecord
from madang.wire.session import Reason, Session, SessionSpec, SessionStatus, SizeRequest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sessions of several users"),
]
COUNTS = """
import os, sys, threading
n = 0
def count():
    global n
    while True: n += 1
threading.Thread(target=count, daemon=True).start()
print("ready", flush=True)
for line in sys.stdin: print(n, flush=True)
os._exit(0)
"""


def start(client: Client, *argv: str, **more: object) -> Session:
    size = SizeRequest(cpu=0.5, mem_bytes=64 << 20, time_s=more.pop("time_s", None))  # type: ignore[arg-type]
    made = client.create_session(SessionSpec(argv=argv, size=size, **more))  # type: ignore[arg-type]
    return client.wait_session(made.id, until=[SessionStatus.RUNNING], timeout_s=PATIENCE_S)


def freeze(client: Client, ref: str) -> Session:
    """The answer may come before a busy machine has done it."""
    client.freeze(ref)
    return wait_until(lambda: client.get_session(ref), lambda seen: seen.frozen_since is not None)


def answer(run: Run) -> bytes:
    """The next piece of output."""
    return next(iter(run)).data


def ask(run: Run) -> tuple[int, float]:
    """The program's counter, and how long the answer took."""
    begin = time.perf_counter()
    run.write(b"?\n")
    found = answer(run)
    return int(found), time.perf_counter() - begin


def test_a_frozen_program_stands_still_and_input_wakes_it(client: Client) -> None:
    session = start(client, "python3", "-c", COUNTS, stdin=True)
    run = client.attach(session.id)
    assert answer(run) == b"ready\n"
    ask(run)

    frozen = freeze(client, session.name)
    before = client.get_session(session.id)
    time.sleep(1)  # what stands still must be watched for a while
    count, took_s = ask(run)
    deadline = time.monotonic() + PATIENCE_S
    while (again := ask(run)[0]) <= count and time.monotonic() < deadline:
        pass  # its other thread has its turn soon

    assert frozen.status is SessionStatus.RUNNING
    assert frozen.frozen_since is not None
    assert before.frozen_since == pytest.approx(frozen.frozen_since, abs=5)
    assert again > count
    assert took_s < PATIENCE_S  # how fast it is on a quiet machine: the figure ``thaw``
    wait_until(lambda: client.get_session(session.id), lambda seen: seen.frozen_since is None)
    run.close()


def test_a_counter_stands_still_while_it_is_frozen(client: Client) -> None:
    script = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.01; done"
    session = start(client, "sh", "-c", script)
    run = client.attach(session.id)
    answer(run)
    freeze(client, session.id)

    def written() -> list[bytes]:
        return b"".join(r.data for r in client.logs(session.id) if isinstance(r, LogRecord)).split()

    first: list[bytes] = []
    while (now := written()) != first:  # what was on its way arrives
        first = now
        time.sleep(0.1)
    time.sleep(1)  # a hundred lines, if it ran
    second = written()
    client.thaw(session.id)
    wait_until(written, lambda lines: len(lines) >= len(second) + 20)
    run.close()

    assert second == first


def test_the_command_line_says_what_is_frozen(platform: Platform, client: Client) -> None:
    start(client, name="ice-box")
    done = platform.madang("freeze", "ice-b")
    assert (done.returncode, done.stdout.startswith("ice-box frozen")) == (0, True), done.stderr
    assert "frozen" in platform.madang("ps").stdout
    assert "madang thaw ice-box" in platform.madang("show", "ice-box").stdout
    assert "frozen" in platform.madang("top", "--once").stdout

    inside = platform.madang("exec", "ice-box", "--", "echo", "inside")
    assert (inside.returncode, inside.stdout) == (0, "inside\n"), inside.stderr
    platform.madang("freeze", "ice-box")
    (thawed,) = json.loads(platform.madang("thaw", "ice-box", "--json").stdout)
    assert thawed["frozen_since"] is None
    platform.madang("stop", "ice-box")
    refused = platform.madang("freeze", "ice-box")
    assert refused.returncode != 0
    assert "has ended" in refused.stderr


def test_frozen_sessions_outlive_kills_of_server_and_launcher(
    platform: Platform, client: Client
) -> None:
    session = start(
        client, "sh", "-c", "echo ready; while read l; do echo got $l; done", stdin=True
    )
    since = freeze(client, session.id).frozen_since
    for victim in ("launcher", "server"):
        platform.kill(victim)
        wait_until(client.is_healthy)
        assert client.get_session(session.id).frozen_since == since

    run = client.attach(session.id)
    assert answer(run) == b"ready\n"
    run.write(b"one\n")
    assert answer(run) == b"got one\n"
    run.close()


def test_a_frozen_session_ends_by_stop_time_limit_and_removal(client: Client) -> None:
    stopped, late, removed = (
        start(client, "sleep", "1000"),
        start(client, "sleep", "1000", time_s=1.5),
        start(client, "sleep", "1000"),
    )
    for session in (stopped, late, removed):
        client.freeze(session.id)

    client.stop(stopped.id)
    client.remove(removed.id, force=True)

    for session, reason in ((stopped, Reason.USER), (late, Reason.TIMEOUT)):
        ended = client.wait_session(session.id, timeout_s=PATIENCE_S).ended
        assert ended is not None
        assert (ended.reason, ended.exit_code) == (reason, 143)
    with pytest.raises(SessionNotRunning):
        client.thaw(stopped.id)
