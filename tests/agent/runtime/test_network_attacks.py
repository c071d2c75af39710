"""Attacks from sessions that have a network, beside a victim that has one too; see ``world``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from madang.agent import files
from madang.agent.launcher import registry
from madang.agent.launcher.network import rules
from madang.agent.runtime.native import NativeRuntime
from madang.kit.clock import SystemClock
from madang.testing import attacks
from madang.testing import world as places
from madang.testing.sessions import PYTHON, Launcher, Sessions, open_launcher, sessions, spec
from madang.testing.world import World, open_world
from madang.wire.kernel import KernelId
from madang.wire.network import Network, NetworkMode

pytestmark = pytest.mark.skipif(bool(places.missing()), reason=places.missing() or "it can")

RUN = ("/usr/bin/python3", "-I", "-S", "attacks.py")
FULL = Network(mode=NetworkMode.FULL)
ALLOW = Network(mode=NetworkMode.ALLOW, allow=("good.example:7", "evil.example"))
ONLY_ALLOW = {
    "reach_what_is_not_allowed",
    "ask_other_name_servers",
    "carry_data_out_by_names",
    "forge_answers_to_the_warden",
}
"""What a full network lets through, and may."""
NEEDS_FULL = {"fill_the_table_of_connections"}
TABLE = "/proc/sys/net/netfilter/nf_conntrack_count"

VICTIM = """
import socket, threading
def echo():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.bind(("0.0.0.0", 7777))
        while True:
            data, sender = link.recvfrom(100)
            link.sendto(data, sender)
threading.Thread(target=echo, daemon=True).start()
listener = socket.create_server(("0.0.0.0", 8888))
print("listens", flush=True)
while True:
    listener.accept()[0].close()
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world() as found:
        yield found


@pytest.fixture(scope="module")
def launcher(world: World) -> Iterator[Launcher]:
    modes = [mode.value for mode in NetworkMode]
    config = {"namespace": world.machine, "modes": modes, "resolvers": [places.RESOLVER]}
    with open_launcher(network=config) as found:
        yield found


@pytest.fixture(scope="module")
def gained(launcher: Launcher, world: World) -> dict[str, dict[str, str | None]]:
    """What came of it, under each kind of network."""
    return {
        str(network.mode): asyncio.run(fight(launcher, world, network)) for network in (FULL, ALLOW)
    }


async def fight(launcher: Launcher, world: World, network: Network) -> dict[str, str | None]:
    runtime = NativeRuntime(launcher.socket, str(launcher.state), SystemClock())
    async with sessions(runtime, launcher) as found:
        victim = await found.start(*PYTHON, VICTIM, network=FULL)
        await found.until(victim, b"listens")
        number = number_of(found, victim)
        full = network.mode is NetworkMode.FULL
        facts = {
            "machine": [places.MACHINE, f"10.213.0.{2 * number}", f"10.213.0.{2 * number + 2}"],
            "machine_port": places.MACHINE_PORT,
            "echoes": [places.ECHO, 7777],
            "private": [places.PRIVATE],
            "victim": f"10.213.0.{2 * number + 1}",
            "victim_port": 8888,
            "broadcast": "10.213.255.255",
            "resolver": places.RESOLVER,
            "open": places.GOOD,
            "not_allowed": [places.OTHER, places.RESOLVER],
            "attacks": [name for name in attacks.WIRED if (name in tried(full=full))],
        }
        attacker = await arm(found, facts, network)
        outcome = await found.outcome(attacker)
        assert outcome.code == 0, outcome
        with world.inside(world.machine):
            assert int(Path(TABLE).read_text()) < 3 * rules.MAX_CONNECTIONS
        lives = [each.running for each in await runtime.adopt() if each.kernel == victim]
        assert lives == [True]
    return dict(json.loads(line) for line in outcome.out.splitlines())


def tried(*, full: bool) -> set[str]:
    return set(attacks.WIRED) - (ONLY_ALLOW if full else NEEDS_FULL)


def number_of(found: Sessions, kernel: KernelId) -> int:
    record = registry.load(found.runtime.kernel_dir(kernel))
    assert record is not None and record.connection is not None
    return record.connection.number


async def arm(found: Sessions, facts: dict[str, Any], network: Network) -> KernelId:
    asked = spec(*RUN, json.dumps(facts), "wired", hostname="attacker", network=network)
    kernel = await found.prepare(asked)

    async def text() -> AsyncIterator[bytes]:
        yield Path(attacks.__file__).read_bytes()

    await files.write_file(await found.runtime.files(kernel), "attacks.py", text())
    await found.runtime.start(kernel, asked)
    return kernel


@pytest.mark.parametrize("mode", ["full", "allow"])
@pytest.mark.parametrize("name", attacks.WIRED)
def test_an_attack_by_the_network_gains_nothing(
    gained: dict[str, dict[str, str | None]], name: str, mode: str
) -> None:
    if name not in tried(full=mode == "full"):
        assert name not in gained[mode]
        return
    assert name in gained[mode], "it was never tried"
    assert gained[mode][name] is None, f"{attacks.WIRED[name].__doc__}\ngained: {gained[mode]}"


@pytest.mark.parametrize(
    "name",
    [
        *("reach_the_machine_s_services", "read_metadata", "reach_private_addresses"),
        *("reach_what_is_not_allowed", "ask_other_name_servers"),
    ],
)
def test_from_the_machine_itself_an_attack_succeeds(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can fail: what refuses it inside is the fence."""
    facts = {
        "machine": [places.MACHINE],
        "machine_port": places.MACHINE_PORT,
        "echoes": [places.ECHO],
        "private": [places.PRIVATE],
        "resolver": places.RESOLVER,
        "not_allowed": [places.OTHER],
    }
    monkeypatch.setattr(attacks, "FACTS", facts)
    with world.inside(world.machine):
        assert attacks.WIRED[name]() is not None
