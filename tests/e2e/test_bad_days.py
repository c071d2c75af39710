"""kill -9 at random moments, full disks, many at once: nothing lost, nothing left."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from madang.agent.launcher import registry
from madang.agent.launcher.processes import ProcessId
from madang.client import Client
from madang.testing.books import check_books
from madang.testing.patience import PATIENCE_S, wait_until
from madang.testing.platform import Platform, start
from madang.wire.errors import PlatformError, StorageFull
from madang.wire.log import LogRecord
from madang.wire.session import Reason, Result, Session, SessionSpec, SessionStatus, SizeRequest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sessions of several users"),
]
TINY = SizeRequest(cpu=0.05, mem_bytes=32 << 20, pids=16, disk_bytes=8 << 20)
COUNT = "i=0; while [ $i -lt 60 ]; do echo $i; i=$((i+1)); sleep 0.03; done"


def processes_of(state: Path) -> list[ProcessId]:
    loaded = (registry.load(folder) for _, folder in registry.folders(str(state / "kernels")))
    pairs = (p for r in loaded if r for p in (r.keeper, r.init) if p)
    return [p for p in pairs if ProcessId.of(p.pid) == p]


def left_over(state: Path) -> list[str]:
    found = [str(p) for p in processes_of(state)]
    found += os.listdir(state / "kernels")
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(state) in line]
    return found


def create(client: Client, script: str, size: SizeRequest = TINY) -> Session:
    return client.create_session(SessionSpec(argv=("sh", "-c", script), size=size))


def text(client: Client, ref: str) -> bytes:
    return b"".join(r.data for r in client.logs(ref) if isinstance(r, LogRecord))


def settled(platform: Platform) -> None:
    """Kernels of removed sessions are gone soon after."""
    wait_until(lambda: left_over(platform.state), lambda left: not left)


def test_many_in_a_row_and_at_once_leave_nothing(platform: Platform) -> None:
    def one(number: int) -> None:
        with platform.client() as client:
            session = create(client, f"echo {number}")
            ended = client.wait_session(session.id, timeout_s=PATIENCE_S)
            assert (ended.result, text(client, session.id)) == (Result.SUCCESS, b"%d\n" % number)
            client.remove(session.id)

    for number in range(30):
        one(number)
    with ThreadPoolExecutor(40) as pool:
        list(pool.map(one, range(80)))
    settled(platform)


@pytest.fixture
def own_platform(tmp_path: Path) -> Iterator[Platform]:
    environment = {"MADANG_NODE_CPU_OVERCOMMIT": "50"}
    with start(tmp_path, environment=environment) as platform:
        yield platform


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.timeout(240)
def test_killing_our_processes_at_any_moment_loses_no_session(
    own_platform: Platform, seed: int
) -> None:
    chance = random.Random(seed)
    made: list[str] = []
    with own_platform.client() as client:
        for round_number in range(4):
            made += [create(client, COUNT).id for _ in range(5)]
            time.sleep(chance.uniform(0, 0.6))
            both = ["server", "launcher"]
            for victim in both if round_number == 3 else [chance.choice(both)]:
                own_platform.kill(victim)
            while not client.is_healthy():
                time.sleep(0.05)
        seen = []
        for ref in made:
            ended = client.wait_session(ref, timeout_s=PATIENCE_S)
            seen.append(ended)
            assert ended.status is SessionStatus.TERMINATED
            assert ended.ended is not None
            assert ended.result is Result.SUCCESS, ended.ended
            lines = text(client, ref).split()
            assert lines == [b"%d" % n for n in range(60)]
            client.remove(ref)
        check_books(client, seen)
    settled(own_platform)


def test_a_killed_keeper_or_init_is_told(own_platform: Platform) -> None:
    with own_platform.client() as client:
        for which in ("keeper", "init"):
            session = create(client, "echo on; sleep 1000")
            client.wait_session(session.id, until=[SessionStatus.RUNNING], timeout_s=PATIENCE_S)
            while text(client, session.id) != b"on\n":
                time.sleep(0.02)
            (folder,) = [f for n, f in registry.folders(str(own_platform.state / "kernels"))
                         if session.id in str(n)]  # fmt: skip
            record = registry.load(folder)
            assert record is not None
            process = record.keeper if which == "keeper" else record.init
            assert process is not None
            os.kill(process.pid, 9)
            ended = client.wait_session(session.id, timeout_s=PATIENCE_S)
            assert ended.ended is not None
            assert ended.ended.reason in {Reason.LOST, Reason.SIGNAL}
            assert text(client, session.id) == b"on\n"
            client.remove(session.id)
            check_books(client, [ended])
    settled(own_platform)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    mounted = subprocess.run(
        ["mount", "-o", "loop", image, folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no loop mounts here: {mounted.stderr.decode()}")
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_refuses_in_words_and_running_sessions_go_on(small_disk: Path) -> None:
    environment = {
        "MADANG_NODE_CPU_OVERCOMMIT": "50",
        "MADANG_NODE_DISK_RESERVE": "40m",
        "MADANG_NODE_SCRATCH_POOL": "1",
        "MADANG_DEFAULTS_DISK": "16m",
    }
    with start(small_disk, environment=environment) as platform, platform.client() as client:
        running = create(client, "read x < /dev/zero; i=0; while :; do echo $i; sleep 0.05; done")
        client.wait_session(running.id, until=[SessionStatus.RUNNING], timeout_s=PATIENCE_S)
        filler = small_disk / "filler"
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(b"\0" * (1 << 20))
                    file.flush()
            except OSError:
                pass
        try:
            session = create(client, "true")
            ended = client.wait_session(session.id, timeout_s=PATIENCE_S)
            assert ended.result is Result.FAILURE
            assert ended.ended is not None
            assert "disk" in ended.ended.text
        except StorageFull as full:
            assert "full" in str(full)
        except PlatformError as other:
            pytest.fail(f"not said in words: {other!r}")
        assert client.get_session(running.id).status is SessionStatus.RUNNING
        filler.unlink()
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                again = client.wait_session(create(client, "echo fine").id, timeout_s=PATIENCE_S)
            except PlatformError:
                time.sleep(0.2)
                continue
            if again.result is Result.SUCCESS:
                break
            time.sleep(0.2)
        else:
            pytest.fail("nothing runs although there is room again")
