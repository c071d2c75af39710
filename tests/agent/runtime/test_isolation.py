"""Attacks from inside a real session: one run of them all, one test for each.

Beside the attacker live a victim session of another user and, on the host, what it would like to
find: files, a port, sockets, shared memory. Bombs have a session each, and the victim must still
be served while they go off.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from madang.agent import files
from madang.agent.launcher.offers import DOCKER, LACKS
from madang.agent.runtime.native import NativeRuntime
from madang.testing import attacks, evasions
from madang.testing.roots import FakeRootRuntime
from madang.testing.sessions import (
    PYTHON,
    ChosenRuntime,
    Launcher,
    Outcome,
    Sessions,
    choices,
    open_launcher,
    sessions,
    spec,
    warm_starts,
)
from madang.wire.kernel import RUNSC, KernelId
from madang.wire.session import Reason
from madang.wire.size import MIB

IS_ROOT = os.geteuid() == 0
ORDINARY = 2_000_072_000
FAKE_ROOT = "fake root"
"""Nor this: sessions whose programs believe they are root of a root of their own."""
WARM = "warm"
"""Not a runtime: the native one, whose sessions are forks of a warm interpreter."""
NESTED_UID = "NESTED_UID"
"""In the environment of an ordinary user's run: what sessions take themselves for."""
KEY = 0x6D61_0000 + os.getpid() % 0x10000
NAME = f"madang-test-{os.getpid()}"
SECURITY_PAGE = Path(__file__).parents[3] / "docs/explanation/security.md"
RUN = ("/usr/bin/python3", "-I", "-S", "attacks.py")
SLACK_BYTES = 4 * MIB
BATTLE_S = 120.0
GUEST_PATIENCE_S = 30
"""One attack walks through all folders, which takes gVisor long (so it goes less deep there)."""
LOG_BYTES = MIB

VICTIM = f"""
import ctypes, os, socket, time
open("mine", "w").write("secret\\n")
open("/dev/shm/{NAME}-victim", "w").write("secret")
hidden = socket.socket(socket.AF_UNIX); hidden.bind("\\0{NAME}-victim"); hidden.listen()
service = socket.create_server(("127.0.0.1", 0))
ctypes.CDLL(None).shmget({KEY + 1}, 4096, 0o1666)
print("on", service.getsockname()[1], flush=True)
while True: time.sleep(0.1)
"""


@dataclass
class Battle:
    """What came of it."""

    gained: dict[str, str | None]
    attacker: Outcome
    held: frozenset[str]
    """Limits that this machine holds, of those that some attacks need."""
    victim_lives: bool
    victim_says: bytes
    host_lives: bool
    clock_moved_s: float
    left: list[str]
    """Of the attacker, when it had ended."""


@pytest.fixture(scope="module")
def booty() -> Iterator[dict[str, Any]]:
    """What lies on the host to be found, by the names that attacks know it by."""
    libc = ctypes.CDLL(None, use_errno=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        (folder / "secret").write_text("host")
        (folder / "secret").chmod(0o644)
        port = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0{NAME}")
        abstract.listen()
        shared = Path(f"/dev/shm/{NAME}")
        shared.write_text("host")
        stack.callback(shared.unlink)
        for make, remove, arguments in (
            (libc.shmget, libc.shmctl, (4096, 0o1666)),
            (libc.msgget, libc.msgctl, (0o1666,)),
            (libc.semget, libc.semctl, (1, 0o1666)),
        ):
            number = make(KEY, *arguments)
            assert number != -1, os.strerror(ctypes.get_errno())
            zero = (0,) if remove is libc.semctl else ()
            stack.callback(remove, number, *zero, 0, None)
        queue = libc.mq_open(f"/{NAME}".encode(), os.O_CREAT | os.O_RDWR, 0o666, None)
        assert queue != -1, os.strerror(ctypes.get_errno())
        stack.callback(libc.mq_unlink, f"/{NAME}".encode())
        stack.callback(os.close, queue)
        other = subprocess.Popen(["/bin/sleep", "1000"])
        stack.callback(other.wait)
        stack.callback(other.kill)
        yield {
            "host_pid": other.pid,
            "host_files": [f"{folder}/secret", "/var/lib/apt", "/boot"],
            "host_port": port.getsockname()[1],
            "abstract_name": NAME,
            "shm_key": KEY,
            "queue": NAME,
            "shm_name": shared.name,
            "victim_name": f"{NAME}-victim",
            "victim_key": KEY + 1,
            "cpus": 1,
            "groups": "madang-",
        }


@pytest.fixture(scope="module", params=[*choices(), *[WARM, FAKE_ROOT] * IS_ROOT])
def chosen(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def launcher(chosen: str, request: pytest.FixtureRequest) -> Iterator[Launcher]:
    docker = request.getfixturevalue("docker").socket if chosen == DOCKER else ""
    warm_bytes = 512 * MIB if chosen == WARM else 0
    nested_uid = int(os.environ.get(NESTED_UID, "1000"))
    with open_launcher(nested_uid=nested_uid, warm_bytes=warm_bytes, docker_socket=docker) as found:
        for name in ("token", "madang.db", "journal"):
            (found.state / name).write_text("secret")
            (found.state / name).chmod(0o644)
        yield found


def runtime_of(launcher: Launcher, chosen: str) -> NativeRuntime:
    if chosen == FAKE_ROOT:
        return FakeRootRuntime(launcher)
    return launcher.runtime() if chosen == WARM else ChosenRuntime(launcher, chosen)


@pytest.fixture(scope="module")
def battle(launcher: Launcher, booty: dict[str, Any], chosen: str) -> Battle:
    return asyncio.run(fight(launcher, booty, chosen))


async def fight(launcher: Launcher, booty: dict[str, Any], chosen: str) -> Battle:
    before, boot = time.time(), time.monotonic()
    runtime = runtime_of(launcher, chosen)
    async with sessions(runtime, launcher) as found:
        victim = await found.start(*PYTHON, VICTIM, hostname="victim")
        port = int((await found.until(victim, b"\n")).split()[1])
        theirs = runtime.kernel_dir(victim)
        facts = booty | {
            "victim_port": port,
            "victim_files": [theirs, *(f"{theirs}/{n}" for n in ("scratch", "io", "kernel.json"))],
            "sockets": [launcher.socket, f"{theirs}/io/main/keeper.sock"],
            "platform_files": [f"{launcher.state}/{n}" for n in ("token", "madang.db", "journal")],
            "victim": str(victim),
        }
        if chosen == RUNSC:
            facts |= {"init": "/madang/gate/one", "patience_s": GUEST_PATIENCE_S, "depth": 2}
        attacker = await arm(found, facts)
        outcome = await found.outcome(attacker, patience_s=BATTLE_S)
        record = json.loads(Path(runtime.kernel_dir(attacker), "kernel.json").read_text())
        left = of_uid(record["uid"]) if IS_ROOT else []
        lives = next(each.running for each in await runtime.adopt() if each.kernel == victim)
        says = (await found.exec(victim, "look", "/bin/cat", "mine")).out if lives else b""
        if launcher.warm_bytes:
            assert await warm_starts(runtime) >= 2, "attacker and victim were warm"
        held = frozenset(limit for limit in attacks.NEEDS.values() if found.holds(limit))
    return Battle(
        gained=dict(json.loads(line) for line in outcome.out.splitlines()),
        attacker=outcome,
        held=held,
        victim_lives=lives,
        victim_says=says,
        host_lives=alive(facts["host_pid"]),
        clock_moved_s=(time.time() - before) - (time.monotonic() - boot),
        left=left,
    )


async def arm(found: Sessions, facts: dict[str, Any], *more: str, **size: Any) -> KernelId:
    """Start a session that runs the attacks, or the bomb that *more* names."""
    asked = spec(*RUN, json.dumps(facts), *more, hostname="attacker", **size)
    kernel = await found.prepare(asked)

    async def text() -> AsyncIterator[bytes]:
        yield Path(attacks.__file__).read_bytes()

    await files.write_file(await found.runtime.files(kernel), "attacks.py", text())
    await found.runtime.start(kernel, asked)
    return kernel


def of_uid(uid: int) -> list[str]:
    """Command lines of processes that run as this user."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid == uid:
                found.append(Path(f"/proc/{pid}/cmdline").read_text())
    return found


def alive(pid: int) -> bool:
    """Neither dead nor stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_an_attack_gains_nothing(battle: Battle, chosen: str, name: str) -> None:
    assert name in battle.gained, f"it was never tried: {battle.attacker}"
    if (limit := attacks.NEEDS.get(name)) and limit not in battle.held:
        pytest.skip(f"this machine does not hold {limit}, and says so")
    if why := LACKS.get(chosen, {}).get(attacks.PROMISES.get(name, "")):
        pytest.skip(f"{chosen} can't promise that: {why}")
    gained = battle.gained[name]
    allowed = {RUNSC: attacks.OF_GUEST, FAKE_ROOT: attacks.OF_FAKE_ROOT}.get(chosen, {})
    if gained and name in allowed:
        expected, why = allowed[name]
        if re.fullmatch(expected, gained):
            pytest.skip(f"{gained}: {why}")
    assert gained is None, f"{attacks.ATTACKS[name].__doc__}\ngained: {gained}"


def test_nobody_else_was_harmed(battle: Battle) -> None:
    assert battle.victim_lives
    assert battle.victim_says == b"secret\n"
    assert battle.host_lives
    assert abs(battle.clock_moved_s) < 1
    assert battle.left == []


@pytest.mark.parametrize("name", attacks.BOMBS)
async def test_a_bomb_harms_its_own_session_alone(
    launcher: Launcher, chosen: str, name: str
) -> None:
    runtime = runtime_of(launcher, chosen)
    async with sessions(runtime, launcher) as found:
        if (limit := attacks.NEEDS.get(name)) and not found.holds(limit):
            pytest.skip(f"this machine does not hold {limit}, and says so")
        size = {"mem_bytes": 64 * MIB, "pids": 30, "disk_bytes": 16 * MIB}
        facts = size | {"log_bytes": LOG_BYTES}
        victim = await found.start("/bin/sleep", "1000")
        kernel = await arm(found, facts, name, log_limit_bytes=LOG_BYTES, time_s=20.0, **size)

        # However busy it keeps the machine: others are served, and it can be ended.
        served = await found.exec(victim, "others", "/bin/echo", "served")
        done = await found.outcome(kernel)

        assert served.out == b"served\n"
        assert b"\ngained null" in done.out or done.ended.reason is not Reason.EXIT or done.code, (
            f"{attacks.BOMBS[name].__doc__}\n{done}"
        )
        if found.holds("mem"):
            assert (done.ended.mem_peak_bytes or 0) <= size["mem_bytes"] + SLACK_BYTES
        kept = sum(each.stat().st_size for each in Path(found.io(kernel), "log").iterdir())
        assert kept <= LOG_BYTES + SLACK_BYTES
        if (used := done.ended.disk_used_bytes) is not None:
            assert used <= size["disk_bytes"] + SLACK_BYTES
        image = Path(runtime.kernel_dir(kernel), "scratch.img")
        if image.exists():
            assert image.stat().st_blocks * 512 <= size["disk_bytes"] + 2 * SLACK_BYTES


def test_every_attack_says_what_it_would_gain() -> None:
    every = attacks.ATTACKS | attacks.BOMBS | attacks.WIRED
    assert len(every) >= 80
    assert all(each.__doc__ for each in every.values())


def test_the_page_on_security_lists_every_attack() -> None:
    """With what it would gain, in the order of the code: what is missing or gone is named here."""
    listed = re.findall(r"^- \*(.+?)\*: (.+)$", SECURITY_PAGE.read_text(), re.MULTILINE)
    known = [
        (name.replace("_s_", "'s ").replace("_", " "), " ".join(inspect.cleandoc(doc).split()))
        for name, doc in (
            (name, each.__doc__ or "")
            for tried in (attacks.ATTACKS, attacks.BOMBS, attacks.WIRED, evasions.EVASIONS)
            for name, each in tried.items()
        )
    ]
    lines = "\n".join(f"- *{name}*: {gain}" for name, gain in known)
    assert listed == known, f"the list should be\n{lines}"


OUTSIDE = (
    "change_processes_of_the_host find_message_queues find_secrets_in_what_is_mounted "
    "find_semaphores find_shared_memory open_a_host_process reach_abstract_sockets "
    "reach_the_host_by_loopback read_host_files read_the_platform_s_state "
    "signal_a_process_of_the_host use_leaked_descriptors"
).split()
WITH_POWER = (
    "become_another_user count_events_of_the_processor enter_namespaces find_devices "
    "gain_by_executing hear_the_kernel_s_events load_a_program_into_the_kernel make_namespaces "
    "open_strange_sockets read_key_rings read_the_wire read_password_hashes "
    "set_a_release_agent set_the_core_pattern set_the_kernel_s_helpers "
    "stall_the_kernel_by_page_faults uncover_what_is_masked use_capabilities write_kernel_settings"
).split()
UNFENCED = """
import json, os, sys
from madang.agent.launcher import syscalls
from madang.testing import attacks, evasions
attacks.FACTS.update(json.loads(sys.argv[2]), own_fds=[])
if sys.argv[3] == "apart":
    syscalls.unshare(0x20000 | 0x4000000 | 0x8000000 | 0x40000000 | 0x20000000)
    if child := os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    syscalls.mount(None, b"/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount(b"proc", b"/proc", b"proc")
print(attacks.attempt(attacks.ATTACKS[sys.argv[1]]))
"""


def attack_unfenced(name: str, facts: dict[str, Any], where: str) -> str:
    inherited = os.open("/", os.O_RDONLY)
    try:
        done = subprocess.run(
            [sys.executable, "-c", UNFENCED, name, json.dumps(facts), where],
            pass_fds=[inherited],
            capture_output=True,
            text=True,
        )
    finally:
        os.close(inherited)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_of_a_session_an_attack_succeeds(
    name: str, booty: dict[str, Any], tmp_path: Path
) -> None:
    """It can fail: what refuses it inside is the fence."""
    (tmp_path / "token").write_text("secret")
    facts = booty | {"platform_files": [f"{tmp_path}/token"], "victim": "/", "sockets": []}
    assert attack_unfenced(name, facts, "here") != "None"
    os.kill(booty["host_pid"], 18)  # One of them stops it.


@pytest.mark.skipif(not IS_ROOT, reason="what root may do without the fence")
@pytest.mark.parametrize("name", WITH_POWER)
def test_with_power_and_namespaces_alone_an_attack_succeeds(
    name: str, booty: dict[str, Any]
) -> None:
    """It can fail: without the filter, empty capabilities and the made root it does gain."""
    assert attack_unfenced(name, booty, "apart") != "None"


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user's run is this one")
@pytest.mark.timeout(200)
@pytest.mark.parametrize("nested_uid", [1000, 0])
def test_an_ordinary_user_s_launcher_isolates_too(nested_uid: int) -> None:
    """Its sessions are ordinary users of their own namespace; 0: or take themselves for root."""
    folder = Path(tempfile.mkdtemp(prefix="madang-rootless-"))
    try:
        os.chown(folder, ORDINARY, ORDINARY)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", __file__, "--basetemp", str(folder / "pytest"), "-rs"],
            user=ORDINARY, group=ORDINARY, extra_groups=[], timeout=190, capture_output=True,
            env={**os.environ, "HOME": str(folder), NESTED_UID: str(nested_uid)}, text=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
