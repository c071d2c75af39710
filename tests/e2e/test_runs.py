"""What people do, through the real command line and client, on a real platform."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from madang.client import Client
from madang.testing.patience import PATIENCE_S, wait_until
from madang.testing.platform import MADANG, Platform
from madang.wire.errors import (
    Conflict,
    IdempotencyMismatch,
    ImageUnknown,
    InvalidRequest,
    PlatformError,
    SizeImpossible,
    TooLarge,
)
from madang.wire.log import LogRecord, Stream
from madang.wire.session import Reason, Result, Session, SessionSpec, SessionStatus, SizeRequest

pytestmark = pytest.mark.slow
SMALL = {"cpu": 0.2, "mem": "64m"}


def output(client: Client, ref: str, stream: Stream) -> bytes:
    records = client.logs(ref)
    return b"".join(r.data for r in records if isinstance(r, LogRecord) and r.stream is stream)


def test_a_project_runs_and_its_outputs_come_back(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, data\n"
        "print('epoch 1', data.X, flush=True)\n"
        "open(os.environ['MADANG_OUTPUTS'] + '/model.bin', 'wb').write(bytes(range(256)))\n"
    )
    (tmp_path / "data.py").write_text("X = 5\n")
    (tmp_path / "secret.txt").write_text("not sent")
    (tmp_path / ".madangignore").write_text("secret.*\n")
    done = platform.madang(
        "run", "--name", "my-run", "--", "python3", "train.py", cwd=tmp_path
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "epoch 1 5\n"), done.stderr
    assert (tmp_path / "runs/my-run/model.bin").read_bytes() == bytes(range(256))
    listed = platform.madang("ls", "my-run:/work", "--json")
    assert {f["path"] for f in json.loads(listed.stdout)} >= {"train.py", "data.py"}
    assert "secret" not in listed.stdout
    again = platform.madang("run", "--", "ls", cwd=tmp_path)
    assert "runs" not in again.stdout.split()


def test_stdout_stderr_stdin_and_exit_code_are_the_programs(
    platform: Platform, tmp_path: Path
) -> None:
    script = (
        "import sys; sys.stderr.write('to err\\n')\n"
        "sys.stdout.write(sys.stdin.read().upper()); sys.exit(7)"
    )
    done = platform.madang("run", "-q", "--", "python3", "-c", script, input="typed", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (7, "TYPED")
    assert "to err" in done.stderr


def test_arguments_that_are_no_utf8_arrive_byte_for_byte(
    platform: Platform, tmp_path: Path
) -> None:
    argument = bytes(range(1, 256))
    shown = "import os,sys; print(os.fsencode(sys.argv[1]).hex())"
    command = [
        *map(os.fsencode, MADANG),
        b"run",
        b"--",
        b"python3",
        b"-c",
        shown.encode(),
        argument,
    ]
    done = subprocess.run(
        command, env=platform.environment, capture_output=True, check=True, timeout=60, cwd=tmp_path
    )
    assert done.stdout.strip() == argument.hex().encode()


def test_binary_output_survives_byte_for_byte(platform: Platform, tmp_path: Path) -> None:
    script = (
        "import os,random; r=random.Random(1)\n"
        "for _ in range(200): os.write(1, r.randbytes(r.randrange(1, 70000)))\n"
    )
    command = [*MADANG, "run", "--", "python3", "-c", script]
    ours = subprocess.run(
        command, env=platform.environment, capture_output=True, check=True, timeout=60, cwd=tmp_path
    ).stdout
    theirs = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    assert hashlib.sha256(ours).digest() == hashlib.sha256(theirs).digest()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cpu", "0"], "cpu"),
        (["--cpu", "-1"], "cpu"),
        (["--mem", "1e30"], "mem"),
        (["--mem", "0"], "mem"),
        (["--cpu", "4096"], "the largest machine has"),
        (["--image", "nope"], "no image"),
        (["--name", "../x"], "name"),
        (["--time", "-5s"], "time"),
        (["-e", "=x"], ""),
    ],
)
def test_nonsense_is_refused_in_words_with_a_code_of_ours(
    platform: Platform, tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = platform.madang("run", *arguments, "--", "true", cwd=tmp_path)
    assert done.returncode in {2, 122}, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_bad_specs_are_errors_with_codes(client: Client) -> None:
    def refused(spec: SessionSpec) -> type[PlatformError]:
        with pytest.raises(PlatformError) as caught:
            client.create_session(spec)
        return type(caught.value)

    assert refused(SessionSpec(argv=("true",), image="nope")) is ImageUnknown
    assert refused(SessionSpec(argv=("a\0b",))) is InvalidRequest
    assert refused(SessionSpec(argv=("x" * (10 << 20),))) in {TooLarge, InvalidRequest}
    size = SizeRequest(mem_bytes=1 << 50)
    assert refused(SessionSpec(argv=("true",), size=size)) is SizeImpossible
    assert refused(SessionSpec(argv=("true",), name="..")) is InvalidRequest
    assert refused(SessionSpec(argv=("true",), env={"A=B": "c"})) is InvalidRequest


def test_a_run_that_is_refused_fails_at_once_and_a_closed_one_goes_on(client: Client) -> None:
    with pytest.raises(ImageUnknown):
        client.run(["true"], image="nope")
    run = client.run(["sh", "-c", "sleep 0.2; echo done"], cpu=0.2, mem="64m")
    run.close()
    with pytest.raises(Conflict):
        run.wait()
    ended = client.wait_session(run.session.id, timeout_s=PATIENCE_S)
    assert (ended.result, output(client, ended.id, Stream.STDOUT)) == (Result.SUCCESS, b"done\n")


def test_a_repeated_create_makes_one_session(client: Client, platform: Platform) -> None:
    spec = SessionSpec(argv=("true",), size=SizeRequest(cpu=0.1, mem_bytes=64 << 20))

    def create(_: int) -> str:
        with platform.client() as own:
            return own.create_session(spec, key="once").id

    with ThreadPoolExecutor(10) as pool:
        assert len(set(pool.map(create, range(10)))) == 1
    with pytest.raises(IdempotencyMismatch):
        client.create_session(SessionSpec(argv=("false",)), key="once")


def test_who_does_not_fit_now_waits_and_says_for_what(client: Client) -> None:
    node = client.list_nodes()[0]
    most = node.capacity.mem_bytes
    size = SizeRequest(cpu=0.1, mem_bytes=int(most * 0.7))
    first = client.create_session(SessionSpec(argv=("sleep", "100"), size=size))
    client.wait_session(first.id, until=[SessionStatus.RUNNING], timeout_s=PATIENCE_S)
    second = client.create_session(SessionSpec(argv=("true",), size=size))
    waiting = wait_until(
        lambda: client.get_session(second.id),
        lambda seen: seen.pending is not None and seen.pending.code == "capacity.mem",
    )
    assert waiting.status is SessionStatus.PENDING
    assert waiting.pending is not None
    assert first.name in waiting.pending.text
    client.stop(first.id, grace_s=0)
    ended = client.wait_session(second.id, timeout_s=PATIENCE_S)
    assert (ended.status, ended.result) == (SessionStatus.TERMINATED, Result.SUCCESS)


def test_every_end_is_explained(client: Client) -> None:
    def end(*argv: str, **sizes: object) -> tuple[Session, str]:
        sizes = {**SMALL, **sizes}
        session = client.run(list(argv), **sizes).wait()  # type: ignore[arg-type]
        assert session.ended is not None
        return session, session.ended.text

    session, _ = end("sh", "-c", "exit 3")
    assert session.ended is not None
    assert (session.result, session.ended.exit_code) == (Result.FAILURE, 3)
    session, text = end("sh", "-c", "kill -USR1 $$")
    assert session.ended is not None
    assert session.ended.reason is Reason.SIGNAL
    assert "SIGUSR1" in text
    session, text = end("python3", "-c", "x = bytearray(200 << 20)")
    assert session.ended is not None
    assert session.ended.reason is Reason.OOM
    assert "64 MiB" in text
    assert "peak" in text
    child = "import subprocess; subprocess.run(['python3', '-c', 'x = bytearray(200 << 20)'])"
    session, text = end("python3", "-c", child)
    assert session.result is Result.SUCCESS
    assert "1 child process was killed for the memory limit" in text
    session, text = end("sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 5 & done; wait", pids=4)
    assert session.ended is not None
    assert session.ended.reason is Reason.PIDS
    session, text = end("sh", "-c", "cat /dev/zero > /work/x", disk="20m")
    assert session.ended is not None
    assert session.ended.reason is Reason.DISK
    assert "--disk" in text
    session, text = end("sleep", "100", time_limit=0.3)
    assert session.ended is not None
    assert session.ended.reason is Reason.TIMEOUT


def test_hostile_programs_end_and_are_contained(client: Client) -> None:
    bomb = "import os\nwhile 1:\n try: os.fork()\n except OSError: pass"
    with client.run(["python3", "-c", bomb], cpu=0.3, mem="64m", pids=30) as run:
        run.stop(grace_s=0.2)
        ended = run.wait()
    assert ended.ended is not None
    assert ended.ended.reason is Reason.USER
    stubborn = "trap '' TERM; echo ready; while :; do sleep 1; done"
    run = client.run(["sh", "-c", stubborn], **SMALL)  # type: ignore[arg-type]
    next(iter(run))
    run.stop(grace_s=0.3)
    assert run.wait().result is Result.CANCELLED
    detached = "(setsid sleep 1000 </dev/null >/dev/null 2>&1 &) ; echo main ends"
    run = client.run(["sh", "-c", detached], **SMALL)  # type: ignore[arg-type]
    assert run.wait().result is Result.SUCCESS


def test_a_flood_of_output_is_bounded_and_the_gap_is_said(client: Client) -> None:
    script = (
        "import os; b = b'x' * 65536\nfor i in range(1600): os.write(1, b)\nos.write(1, b'END')"
    )
    size = SizeRequest(cpu=1, mem_bytes=64 << 20)
    session = client.create_session(SessionSpec(argv=("python3", "-c", script), size=size))
    # Nobody reads: the program must end all the same.
    ended = client.wait_session(session.id, timeout_s=PATIENCE_S)
    assert ended.result is Result.SUCCESS
    kept = output(client, ended.id, Stream.STDOUT)
    assert kept.endswith(b"END")
    assert 32 << 20 < len(kept) <= 64 << 20
    assert [r for r in client.logs(ended.id) if not isinstance(r, LogRecord)]


def test_an_idle_session_takes_execs_files_and_a_stop(client: Client, tmp_path: Path) -> None:
    size = SizeRequest(cpu=0.1, mem_bytes=64 << 20)
    name = client.create_session(SessionSpec(size=size)).name
    client.wait_session(name, until=[SessionStatus.RUNNING], timeout_s=PATIENCE_S)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a b\n.txt").write_bytes(b"\0content")
    client.put(name, [str(tmp_path / "in")], "/work")
    done = client.exec(name, ["sh", "-c", "cat /work/in/a*; exit 4"])
    assert b"".join(r.data for r in done) == b"\0content"
    assert done.wait().exit_code == 4
    client.get(name, "/work/in", str(tmp_path / "out"))
    with pytest.raises(Conflict):
        client.remove(name)
    client.stop(name)
    ended = client.wait_session(name, timeout_s=PATIENCE_S)
    assert ended.ended is not None
    assert ended.ended.reason is Reason.USER
    assert client.read_file(name, "/work/in/a b\n.txt") == b"\0content"
