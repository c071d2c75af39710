"""``madang up`` and ``down`` for real: who dies, what goes on, what is left."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from madang.agent.launcher import offers, registry
from madang.agent.launcher.processes import ProcessId
from madang.client import Client
from madang.daemon import confine
from madang.daemon.state import born, read_running
from madang.testing import docker
from madang.testing.patience import PATIENCE_S
from madang.testing.platform import MADANG, Platform, begin, launch, start
from madang.wire import exits
from madang.wire.session import SessionStatus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sessions of several users"),
]

USER = 54321
COUNT = "i=0; while [ $i -lt 100000 ]; do echo $i; i=$((i+1)); sleep 0.05; done"


def gone(pid: int, within_s: float = PATIENCE_S) -> bool:
    """Whether the process ends in time."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], within_s)[0])
    finally:
        os.close(fd)


def alive_kernels(state: Path) -> list[ProcessId]:
    found = (registry.load(folder) for _, folder in registry.folders(str(state / "kernels")))
    pairs = [process for r in found if r for process in (r.keeper, r.init) if process]
    return [process for process in pairs if ProcessId.of(process.pid) == process]


def left_over(state: Path) -> list[str]:
    """Whatever on this machine still bears the name of the folder."""
    found = [f"process {p}" for p in alive_kernels(state)]
    found += [line for line in Path("/proc/self/mounts").read_text().splitlines()
              if str(state) in line]  # fmt: skip
    for loop in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if str(state) in loop.read_text():
                found.append(str(loop))
        except OSError:
            continue
    return found


def failed_up(folder: Path, *arguments: str) -> str:
    """The words of an ``up`` that must fail."""
    process = launch(folder, *arguments)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == exits.REFUSED, out + err
    assert out == ""
    return err


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    with start(tmp_path) as platform:
        yield platform
    assert left_over(platform.state) == []


def environ(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


def counting(client: Client) -> str:
    """A session that prints numbers, with a few of them printed."""
    run = client.run(["sh", "-c", COUNT], cpu=0.2, mem="64m")
    next(iter(run))
    run.close()
    return run.session.id


def numbers(client: Client, session: str) -> list[int]:
    """What it printed so far."""
    data = b"".join(r.data for r in client.logs(session) if hasattr(r, "data"))
    return [int(line) for line in data.split(b"\n")[:-1]]


def assert_goes_on(client: Client, session: str) -> None:
    """It prints on, and nothing of what it printed is missing."""
    before = numbers(client, session)
    run = client.attach(session, tail_bytes=0)
    next(iter(run))
    run.close()
    after = numbers(client, session)
    assert len(after) > len(before)
    assert after == list(range(len(after)))
    assert client.get_session(session).status is SessionStatus.RUNNING


def test_a_session_runs_and_down_leaves_nothing(tmp_path: Path) -> None:
    platform = begin(tmp_path)
    with platform.client() as client:
        ended = client.run(["sh", "-c", "echo hello; exit 3"]).wait().ended
        assert ended is not None
        assert ended.exit_code == 3
        endless = client.run(["sleep", "1000"])
        next(iter(endless.events()))
        endless.close()
    children = platform.running().children
    platform.stop()

    assert all(gone(pid) for pid, _ in children)
    assert left_over(platform.state) == []
    assert read_running(str(platform.state)) is None


def test_the_server_may_be_killed_and_the_session_goes_on(platform: Platform) -> None:
    with platform.client() as client:
        session = counting(client)
        old = platform.kill("server")
        assert_goes_on(client, session)
        assert platform.child("server") != old


def test_the_launcher_may_be_killed_and_sessions_go_on_and_start(platform: Platform) -> None:
    with platform.client() as client:
        session = counting(client)
        pid = platform.kill("launcher")
        assert gone(pid)
        ended = client.run(["echo", "new"]).wait().ended
        assert ended is not None
        assert ended.exit_code == 0, ended.text
        assert_goes_on(client, session)


def test_the_supervisor_may_be_killed_and_the_next_finds_the_session(tmp_path: Path) -> None:
    first = begin(tmp_path)
    with first.client() as client:
        session = counting(client)
    children = first.running().children
    first.process.kill()
    first.process.communicate()
    assert all(gone(pid) for pid, _ in children)
    assert alive_kernels(first.state)

    with start(tmp_path) as second, second.client() as client:
        assert_goes_on(client, session)
    assert left_over(second.state) == []


def test_down_ends_sessions_that_no_supervisor_watches(tmp_path: Path) -> None:
    platform = begin(tmp_path)
    with platform.client() as client:
        counting(client)
    children = platform.running().children
    platform.process.kill()
    platform.process.communicate()
    assert all(gone(pid) for pid, _ in children)

    platform.stop()

    assert alive_kernels(platform.state) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_it_but_no_session(tmp_path: Path, signum: signal.Signals) -> None:
    platform = begin(tmp_path)
    with platform.client() as client:
        session = counting(client)
    platform.process.send_signal(signum)
    platform.process.communicate(timeout=PATIENCE_S)
    assert platform.process.returncode == 0
    assert alive_kernels(platform.state)

    with start(tmp_path) as again, again.client() as client:
        assert_goes_on(client, session)


def test_two_on_one_folder_are_refused(platform: Platform) -> None:
    words = failed_up(platform.folder)
    assert "in use by another `madang up`" in words
    assert platform.url in words
    assert "madang explain state.locked" in words
    with platform.client() as client:
        assert client.is_healthy()


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        words = failed_up(tmp_path, "--port", str(port))
    assert f"port {port}" in words
    assert "--port N" in words


def test_a_state_folder_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "VERSION").write_text("99\n")
    assert "format '99'" in failed_up(tmp_path)


def test_it_goes_to_the_background_once_ready(tmp_path: Path) -> None:
    process = launch(tmp_path, "--detach")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    found = re.search(r"is ready: (\S+)", out)
    assert found
    running = read_running(str(tmp_path / "state"))
    assert running is not None
    try:
        assert running.url == found[1]
        token = (tmp_path / "state" / "token").read_text().strip()
        with Client(found[1], token) as client:
            assert client.whoami().role == "admin"
    finally:
        madang = Platform(folder=tmp_path, url=found[1], process=process)
        done = madang.madang("down", "--state", str(tmp_path / "state"))
    assert "nothing is left" in done.stdout
    assert gone(running.pid)


def test_a_failure_in_the_background_is_a_failure_of_the_command(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        words = failed_up(tmp_path, "--detach", "--port", str(other.getsockname()[1]))
    assert "is in use" in words


def test_a_lost_token_is_made_anew_and_the_old_one_still_counts(tmp_path: Path) -> None:
    with start(tmp_path) as first:
        old = first.token
        (first.state / "token").unlink()
    with start(tmp_path) as second:
        assert second.token != old
        assert (second.state / "token").stat().st_mode & 0o777 == 0o600
        for token in (second.token, old):
            with Client(second.url, token) as client:
                assert client.whoami().user == "admin"


def test_a_server_that_can_not_open_its_database_says_so(tmp_path: Path) -> None:
    process = launch(
        tmp_path, environment={"MADANG_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}
    )
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == exits.INTERNAL
    assert out == ""
    assert "database" in err.lower()
    assert "Traceback" not in err


def test_the_server_is_nobody_and_sees_little(platform: Platform) -> None:
    server = platform.child("server")
    status = Path(f"/proc/{server}/status").read_text()
    assert re.search(
        r"^Uid:\s+2000000000\s+2000000000\s+2000000000\s+2000000000$", status, re.MULTILINE
    )
    assert re.search(r"^Groups:\s*$", status, re.MULTILINE)
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    environment = Path(f"/proc/{server}/environ").read_bytes()
    assert b"MADANG_CONFIG" not in environment


def test_doctor_and_config_answer(platform: Platform) -> None:
    done = platform.madang("doctor", "--state", str(platform.state))
    assert f"ready at {platform.url}" in done.stdout
    assert done.returncode == 0
    shown = platform.madang("config", "show", "--json")
    assert '"name":"server.port"' in shown.stdout
    wrong = platform.madang("config", "check", env=platform.environment | {"MADANG_NODE_X": "1"})
    assert wrong.returncode != 0
    assert "MADANG_NODE_X" in wrong.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="OCI runtimes need root")
@pytest.mark.parametrize("name", offers.PACKAGES)
def test_a_session_chooses_its_runtime(platform: Platform, name: str) -> None:
    if why := offers.find(name)[1]:
        pytest.skip(f"{name}: {why}")
    chooses(platform, name)


@pytest.mark.skipif(bool(docker.missing()), reason=docker.missing())
def test_a_session_chooses_docker(tmp_path: Path) -> None:
    with docker.docker_daemon() as engine:
        with start(tmp_path, environment={"MADANG_NODE_DOCKER_SOCKET": engine.socket}) as platform:
            chooses(platform, offers.DOCKER)
            shell = platform.madang(
                "run", "--no-sync", "--runtime", "docker", "--", "sh", "-c", "read x; echo $x",
                input="fed\n",
            )  # fmt: skip
            assert (shell.returncode, shell.stdout) == (0, "fed\n"), shell.stderr
        assert left_over(platform.state) == []


def chooses(platform: Platform, name: str) -> None:
    done = platform.madang(
        "run", "--no-sync", "--runtime", name, "--name", f"by-{name}", "--", "id"
    )
    shown = platform.madang("show", f"by-{name}")

    assert done.returncode == 0, done.stderr
    assert "(user)" in done.stdout
    assert re.search(rf"^runtime +{name}$", shown.stdout, re.MULTILINE)
    with platform.client() as client:
        assert set(client.get_info().runtimes) >= {"native", name}
        assert client.get_session(f"by-{name}").runtime == name
        assert client.run(["true"], runtime=name).wait().runtime == name
    doctor = platform.madang("doctor", "--state", str(platform.state)).stdout
    assert re.search(rf"sessions can choose [^;]*\b{name}\b", doctor), doctor


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_runtime_that_nobody_offers_is_refused_at_once(
    platform: Platform, more: tuple[str, ...]
) -> None:
    done = platform.madang("run", "--no-sync", *more, "--runtime", "podman", "--", "true")

    assert done.returncode not in {0, 1}
    assert "no machine offers it. Offered: native" in done.stderr
    assert "runtime.not_offered" in done.stderr


def test_the_server_alone_has_no_node_and_sessions_wait(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*MADANG, "server", "--port", "0", "--state", str(tmp_path / "state")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found
        token = (tmp_path / "state" / "token").read_text().strip()
        with Client(found[0], token) as client:
            assert client.get_info().node_count == 0
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0


def test_an_ordinary_user_has_a_platform_of_their_own(open_folder: Path) -> None:
    closed = confine.closed_parents(confine.needed_paths([]), USER)
    if closed:
        pytest.skip(f"an ordinary user can't reach the interpreter: {closed} is closed")
    os.chown(open_folder, USER, USER)
    with start(open_folder, user=USER) as platform, platform.client() as client:
        run = client.run(["sh", "-c", "id -u; touch /work/file && echo made"])
        output = b"".join(record.data for record in run)
        assert output.endswith(b"made\n")
        assert run.wait().warnings is not None
        assert Path(f"/proc/{platform.child('server')}").stat().st_uid == USER
    assert not [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc")))
                if born(pid) and str(open_folder) in environ(pid)]  # fmt: skip


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="madang-open-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
