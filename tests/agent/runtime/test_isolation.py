"""Attacks from inside a real session: one run of them all, one test for each.

Beside the attacker live a victim session of another user and, on the host, what it would like to
find: files, a port, sockets, shared memory.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from madang.agent import files
from madang.agent.runtime.native import NativeRuntime
from madang.kit.clock import SystemClock
from madang.testing import attacks
from madang.testing.sessions import Launcher, Outcome, open_launcher, sessions, spec

IS_ROOT = os.geteuid() == 0
ORDINARY = 2_000_072_000
SHM_KEY = 0x6D61_6461 + os.getpid()
ROOTLESS_MAY = {"use_all_processors"}
"""Without a cpuset this is not held, and said so (``RuntimeFacts``)."""


@dataclass
class Battle:
    """What came of it."""

    gained: dict[str, str | None]
    attacker: Outcome
    victim_lives: bool
    victim_says: bytes
    host_lives: bool
    clock_moved_s: float


@pytest.fixture(scope="module")
def battle() -> Iterator[Battle]:
    with ExitStack() as stack:
        launcher = stack.enter_context(open_launcher())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        (folder / "secret").write_text("host")
        (folder / "secret").chmod(0o644)
        port = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0madang-test-{os.getpid()}")
        abstract.listen()
        shared = Path(f"/dev/shm/madang-test-{os.getpid()}")
        shared.write_text("host")
        stack.callback(shared.unlink)
        segment = ctypes.CDLL(None).shmget(SHM_KEY, 4096, 0o1666)
        stack.callback(ctypes.CDLL(None).shmctl, segment, 0, None)
        other = subprocess.Popen(["/bin/sleep", "1000"])
        stack.callback(other.wait)
        stack.callback(other.kill)
        facts = {
            "host_pid": other.pid,
            "host_files": [f"{folder}/secret", str(launcher.state), "/var/lib/apt", "/boot"],
            "host_port": port.getsockname()[1],
            "abstract_name": f"madang-test-{os.getpid()}",
            "shm_key": SHM_KEY,
            "shm_name": shared.name,
            "cpus": 1,
            "groups": "madang-",
        }
        yield asyncio.run(fight(launcher, facts, other))


async def fight(launcher: Launcher, facts: dict[str, Any], host: subprocess.Popen[bytes]) -> Battle:
    before, boot = time.time(), time.monotonic()
    runtime = NativeRuntime(launcher.socket, str(launcher.state), SystemClock())
    async with sessions(runtime, launcher) as found:
        script = "echo secret > mine; echo on; while :; do sleep 0.1; done"
        victim = await found.start("/bin/sh", "-c", script, hostname="victim")
        await found.until(victim, b"on")
        victim_files = [f"{runtime.kernel_dir(victim)}/{name}" for name in ("scratch", "io")]
        facts["host_files"] += victim_files
        asked = spec(
            *("/usr/bin/python3", "-I", "-S", "attacks.py", json.dumps(facts)), hostname="attacker"
        )
        attacker = await found.prepare(asked)

        async def script_text() -> Any:
            yield Path(attacks.__file__).read_bytes()

        await files.write_file(await runtime.files(attacker), "attacks.py", script_text())
        await runtime.start(attacker, asked)
        outcome = await found.outcome(attacker)
        lives = next(each.running for each in await runtime.adopt() if each.kernel == victim)
        says = (await found.exec(victim, "look", "/bin/cat", "mine")).out if lives else b""
    return Battle(
        gained=dict(json.loads(line) for line in outcome.out.splitlines()),
        attacker=outcome,
        victim_lives=lives,
        victim_says=says,
        host_lives=host.poll() is None,
        clock_moved_s=(time.time() - before) - (time.monotonic() - boot),
    )


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_an_attack_gains_nothing(battle: Battle, name: str) -> None:
    assert name in battle.gained, f"it was never tried: {battle.attacker}"
    if not IS_ROOT and name in ROOTLESS_MAY:
        pytest.skip("without control groups this is not held, and said so")
    gained = battle.gained[name]
    assert gained is None, f"{attacks.ATTACKS[name].__doc__}\ngained: {gained}"


def test_nobody_else_was_harmed(battle: Battle) -> None:
    assert battle.victim_lives
    assert battle.victim_says == b"secret\n"
    assert battle.host_lives
    assert abs(battle.clock_moved_s) < 1


def test_every_attack_says_what_it_would_gain() -> None:
    assert len(attacks.ATTACKS) >= 40
    assert all(function.__doc__ for function in attacks.ATTACKS.values())


@pytest.mark.parametrize(
    "name", ["use_leaked_descriptors", "reach_the_host_by_loopback", "read_host_files"]
)
def test_the_attacks_are_real(name: str) -> None:
    """Outside of a session they do gain something."""
    with socket.create_server(("127.0.0.1", 0)) as port, tempfile.NamedTemporaryFile() as file:
        facts = {"host_port": port.getsockname()[1], "host_files": [file.name]}
        code = (
            f"from madang.testing import attacks\nattacks.FACTS.update({facts!r}, own_fds=[])\n"
            f"print(attacks.attempt(attacks.ATTACKS[{name!r}]))"
        )
        inherited = os.open("/", os.O_RDONLY)
        done = subprocess.run(
            [sys.executable, "-c", code], pass_fds=[inherited], capture_output=True, text=True
        )
        os.close(inherited)
    assert done.stdout.strip() not in {"", "None"}, done.stderr


@pytest.mark.skipif(not IS_ROOT, reason="an ordinary user's run is this one")
@pytest.mark.timeout(200)
def test_an_ordinary_user_s_launcher_isolates_too() -> None:
    folder = Path(tempfile.mkdtemp(prefix="madang-rootless-"))
    try:
        os.chown(folder, ORDINARY, ORDINARY)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", __file__, "--basetemp", str(folder / "pytest"), "-rs"],
            user=ORDINARY, group=ORDINARY, extra_groups=[], timeout=190, capture_output=True,
            env={**os.environ, "HOME": str(folder)}, text=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
