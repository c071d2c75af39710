"""Sessions with a network: a machine and an internet of the tests' own, in namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from madang.agent.launcher import registry
from madang.agent.launcher.network import rules
from madang.agent.launcher.offers import DOCKER
from madang.agent.runtime import layout
from madang.agent.runtime.native import NativeRuntime
from madang.kit.clock import SystemClock
from madang.testing import world as places
from madang.testing.docker import missing
from madang.testing.patience import PATIENCE_S
from madang.testing.sessions import (
    PYTHON,
    ChosenRuntime,
    Launcher,
    Sessions,
    open_launcher,
    sessions,
)
from madang.testing.world import World, open_world
from madang.wire.errors import HostLacks, NetworkRefused, RuntimeFailed
from madang.wire.kernel import NATIVE, KernelId
from madang.wire.network import Network, NetworkMode, NetworkUse

pytestmark = pytest.mark.skipif(bool(places.missing()), reason=places.missing() or "it can")

FULL = Network(mode=NetworkMode.FULL)
GOOD, OTHER, MACHINE, PRIVATE = places.GOOD, places.OTHER, places.MACHINE, places.PRIVATE
MODES = ("none", "allow", "full")

TRY = """
import json, socket, sys
def connect(to):
    host, _, port = to.rpartition(":")
    with socket.socket() as link:
        link.settimeout(30)
        try:
            link.connect((host, int(port)))
            return link.recv(100).decode().strip()
        except OSError as exc:
            return type(exc).__name__
def send(to):
    host, _, port = to.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.settimeout(30)
        try:
            link.sendto(b"echo", (host, int(port)))
            return link.recv(100).decode()
        except OSError as exc:
            return type(exc).__name__
def name(host):
    try:
        return sorted(socket.gethostbyname_ex(host)[2])
    except OSError as exc:
        return type(exc).__name__
print(json.dumps({to: globals()[what](to) for what, to in (a.split("=") for a in sys.argv[1:])}))
"""


def allow(*targets: str, **more: Any) -> Network:
    return Network(mode=NetworkMode.ALLOW, allow=targets, **more)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world() as found:
        yield found


def config(world: World, **more: Any) -> dict[str, Any]:
    found = {"namespace": world.machine, "modes": MODES, "resolvers": [places.RESOLVER]}
    return found | more


@pytest.fixture(scope="module")
def launcher(world: World, docker_socket: str) -> Iterator[Launcher]:
    with open_launcher(network=config(world), docker_socket=docker_socket) as found:
        yield found


@pytest.fixture
async def own(world: World) -> AsyncIterator[Sessions]:
    """With a launcher that may be killed."""
    with open_launcher(network=config(world, addresses="10.214.0.0/24")) as launcher:
        async with opened(launcher) as found:
            yield found


@pytest.fixture
async def net(launcher: Launcher) -> AsyncIterator[Sessions]:
    async with opened(launcher) as found:
        yield found


@pytest.fixture(params=[NATIVE, DOCKER])
async def each(
    launcher: Launcher, docker_socket: str, request: pytest.FixtureRequest
) -> AsyncIterator[Sessions]:
    """Docker's own networks are not used: a session's is the same in every runtime."""
    if request.param == DOCKER and not docker_socket:
        pytest.skip(missing())
    async with sessions(ChosenRuntime(launcher, request.param), launcher) as found:
        yield found


def opened(launcher: Launcher) -> contextlib.AbstractAsyncContextManager[Sessions]:
    runtime = NativeRuntime(launcher.socket, str(launcher.state), SystemClock())
    return sessions(runtime, launcher)


async def tries(found: Sessions, network: Network, *what: str) -> dict[str, Any]:
    """``connect=ADDRESS:PORT``, ``send=…``, ``name=HOST`` → what came of each."""
    outcome = await found.python(TRY, *what, network=network)
    assert outcome.code == 0, (outcome, log(found))
    result: dict[str, Any] = json.loads(outcome.out)
    return result


def log(found: Sessions) -> str:
    assert found.launcher is not None
    return Path(found.launcher.state, "launcher.log").read_text()


def use_of(found: Sessions, kernel: KernelId) -> NetworkUse:
    use = layout.read_network(found.runtime.kernel_dir(kernel))
    assert use is not None
    return use


def hello(here: str, port: int = 80) -> str:
    """By the machine's address: nobody outside sees that of a session."""
    return f"hello {MACHINE}, here is {here}:{port}"


def record_of(found: Sessions, kernel: KernelId) -> registry.Record:
    record = registry.load(found.runtime.kernel_dir(kernel))
    assert record is not None
    return record


async def warden_of(found: Sessions, kernel: KernelId, *, but: int = 0) -> int:
    """Its pid, once there is one that is not *but*."""
    late = time.monotonic() + PATIENCE_S
    while time.monotonic() < late:
        connection = record_of(found, kernel).connection
        if connection and connection.warden and connection.warden.pid != but:
            return connection.warden.pid
        await asyncio.sleep(0.01)
    raise AssertionError(log(found))


# -- full ----------------------------------------------------------------------------------------


async def test_a_full_network_reaches_the_internet_by_the_machines_address(each: Sessions) -> None:
    got = await tries(
        each,
        FULL,
        f"connect={GOOD}:80",
        f"connect={OTHER}:443",
        f"send={GOOD}:{places.ECHO}",
        "name=good.example",
        "connect=good.example:8080",
        "name=nothing.example",
    )

    assert got == {
        f"{GOOD}:80": hello(GOOD),
        f"{OTHER}:443": hello(OTHER, 443),
        f"{GOOD}:{places.ECHO}": "echo",
        "good.example": [GOOD],
        "good.example:8080": hello(GOOD, 8080),
        "nothing.example": "gaierror",
    }


async def test_what_no_session_may_reach_is_refused_at_once(each: Sessions) -> None:
    got = await tries(
        each,
        FULL,
        f"connect={MACHINE}:{places.MACHINE_PORT}",
        f"connect={PRIVATE}:80",
        f"connect={places.METADATA}:80",
        f"send={PRIVATE}:{places.ECHO}",
    )

    # Who waits for an answer gets a TimeoutError.
    assert set(got.values()) == {"ConnectionRefusedError", "PermissionError"}


async def test_refusals_are_told_with_the_end(net: Sessions) -> None:
    kernel = await net.start(*PYTHON, TRY, f"connect={PRIVATE}:80", network=FULL)
    await net.outcome(kernel)

    ended = layout.read_main(net.runtime.kernel_dir(kernel))

    assert ended is not None and ended.network is not None
    assert [(r.target, r.count) for r in ended.network.refused] == [(f"{PRIVATE}:80/tcp", 1)]
    assert ended.network.refused_count == 1


async def test_the_machines_rules_hold_without_the_sessions(each: Sessions, world: World) -> None:
    """Whatever became of the table in the session's namespace."""
    kernel = await each.start("/bin/sleep", "1000", network=FULL)
    init = record_of(each, kernel).init
    assert init is not None

    with world.inside(f"/proc/{init.pid}/ns/net"):
        rules.load("flush ruleset\n")
        connection = record_of(each, kernel).connection
        assert connection is not None
        gateway = f"10.213.0.{2 * connection.number}"
        for host in (MACHINE, gateway, PRIVATE):
            with socket.socket() as link:
                link.settimeout(30)
                with pytest.raises(OSError, match=r"refused|unreachable|No route|prohibited"):
                    link.connect((host, places.MACHINE_PORT if host != PRIVATE else 80))
        with socket.create_connection((GOOD, 80), timeout=30) as link:
            assert link.recv(100)


async def test_what_the_machine_passes_on_is_as_closed_as_the_machine(
    net: Sessions, world: World
) -> None:
    """A container's port that is published on its address: the redirection comes after us."""
    chain = "chain pre { type nat hook prerouting priority dstnat; %s }"
    passed_on = chain % f"ip daddr {MACHINE} tcp dport 8080 dnat to {GOOD}:80;"
    kernel = await net.start("/bin/sleep", "1000", network=FULL)
    init = record_of(net, kernel).init
    assert init is not None

    with world.inside(world.machine):
        rules.load(f"table ip published {{ {passed_on}\n}}\n")
    try:
        with world.inside(f"/proc/{init.pid}/ns/net"):
            rules.load(f"delete table inet {rules.OWN_TABLE}\n")
            with socket.socket() as link:
                link.settimeout(30)
                with pytest.raises(OSError, match=r"refused|unreachable|No route|prohibited"):
                    link.connect((MACHINE, 8080))
    finally:
        with world.inside(world.machine):
            rules.load("delete table ip published\n")


async def test_a_false_source_is_dropped_by_the_machine(net: Sessions, world: World) -> None:
    """Even by who may give himself another address."""
    kernel = await net.start("/bin/sleep", "1000", network=FULL)
    init = record_of(net, kernel).init
    assert init is not None

    with world.inside(f"/proc/{init.pid}/ns/net"):
        rules.load("flush ruleset\n")
        os.system("ip address add 10.213.7.7/32 dev eth0")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
            link.bind(("10.213.7.7", 0))
            link.settimeout(0.3)
            link.sendto(b"echo", (GOOD, places.ECHO))
            with pytest.raises(TimeoutError):
                link.recv(10)


async def test_nobody_connects_to_a_session(each: Sessions, world: World) -> None:
    code = """
import socket
listener = socket.create_server(("0.0.0.0", 8888))
print("listens", flush=True)
listener.accept()
"""
    server = await each.start(*PYTHON, code, network=FULL)
    await each.until(server, b"listens")
    connection = record_of(each, server).connection
    assert connection is not None
    address = f"10.213.0.{2 * connection.number + 1}"

    for namespace in (world.world, world.machine):
        with world.inside(namespace), socket.socket() as link:
            link.settimeout(0.5)
            with pytest.raises(OSError, match="timed out"):
                link.connect((address, 8888))
    got = await tries(each, FULL, f"connect={address}:8888")
    assert got == {f"{address}:8888": "ConnectionRefusedError"}


# -- allow ---------------------------------------------------------------------------------------


async def test_an_allow_list_lets_through_what_it_names_and_nothing_else(each: Sessions) -> None:
    got = await tries(
        each,
        allow("good.example:80", f"{OTHER}:443"),
        "name=other.example",
        "name=good.example",
        "connect=good.example:80",
        "connect=good.example:443",
        f"connect={OTHER}:443",
        f"connect={OTHER}:80",
        f"send={GOOD}:{places.ECHO}",
        f"send={places.RESOLVER}:53",
    )

    assert got == {
        "other.example": "gaierror",
        "good.example": [GOOD],
        "good.example:80": hello(GOOD),
        "good.example:443": "ConnectionRefusedError",
        f"{OTHER}:443": hello(OTHER, 443),
        f"{OTHER}:80": "ConnectionRefusedError",
        f"{GOOD}:{places.ECHO}": "PermissionError",
        f"{places.RESOLVER}:53": "PermissionError",
    }


async def test_an_address_is_open_only_after_its_name_was_asked_for(net: Sessions) -> None:
    before = await tries(net, allow("good.example"), f"connect={GOOD}:80")
    after = await tries(net, allow("*.example"), "name=alias.example", f"connect={GOOD}:80")

    assert before == {f"{GOOD}:80": "ConnectionRefusedError"}
    assert after == {"alias.example": [GOOD], f"{GOOD}:80": hello(GOOD)}


async def test_a_name_opens_no_address_that_is_forbidden(net: Sessions) -> None:
    """DNS rebinding."""
    got = await tries(
        net,
        allow("evil.example", "mixed.example"),
        "name=evil.example",
        f"connect={PRIVATE}:80",
        f"connect={places.METADATA}:80",
        f"connect={MACHINE}:{places.MACHINE_PORT}",
        "name=mixed.example",
        f"connect={GOOD}:80",
    )

    assert set(got["evil.example"]) == set(places.NAMES["evil.example"])
    assert got[f"{PRIVATE}:80"] == got[f"{places.METADATA}:80"] == "ConnectionRefusedError"
    assert got[f"{MACHINE}:{places.MACHINE_PORT}"] == "ConnectionRefusedError"
    assert got[f"{GOOD}:80"] == hello(GOOD)


async def test_a_large_answer_comes_by_tcp(net: Sessions) -> None:
    got = await tries(net, allow("large.example"), "name=large.example", "connect=203.0.113.50:80")

    assert len(got["large.example"]) == 50
    assert got["203.0.113.50:80"] == hello("203.0.113.50")


async def test_names_and_addresses_that_were_refused_are_told(net: Sessions) -> None:
    kernel = await net.start(
        *(*PYTHON, TRY, "name=bad.example", f"connect={OTHER}:80", "name=good.example"),
        network=allow("good.example"),
    )
    await net.outcome(kernel)

    use = use_of(net, kernel)

    assert {r.target for r in use.refused} == {"bad.example", f"{OTHER}:80/tcp"}
    assert (use.received_bytes > 0 and use.sent_bytes > 0) or use.refused_count == 2


async def test_garbage_and_silence_do_not_stop_the_answers(net: Sessions) -> None:
    code = """
import os, socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
    for size in (0, 1, 11, 12, 13, 50, 512, 4000):
        link.sendto(os.urandom(size), ("127.0.0.53", 53))
    loop = bytes.fromhex("000101000001000000000000") + b"\\xc0\\x0c" + b"\\0\\1\\0\\1"
    link.sendto(loop, ("127.0.0.53", 53))
    silent = bytes.fromhex("000201000001000000000000") + b"\\6silent\\7example\\0\\0\\1\\0\\1"
    for _ in range(50):
        link.sendto(silent, ("127.0.0.53", 53))
streams = [socket.create_connection(("127.0.0.53", 53)) for _ in range(10)]
streams[0].sendall(b"\\xff\\xff" + bytes(700))
print(socket.gethostbyname("good.example"))
"""
    outcome = await net.python(code, network=allow("good.example", "silent.example"))

    assert outcome.out.decode().strip() == GOOD, (outcome.err, log(net))


async def test_a_session_has_no_ipv6_but_its_own_loopback(net: Sessions) -> None:
    code = """
import socket
print(open("/proc/net/if_inet6").read().split()[-1::6])
with socket.socket(socket.AF_INET6) as link:
    try:
        link.connect(("2001:db8::1", 80))
    except OSError as exc:
        print(exc.strerror)
"""
    outcome = await net.python(code, network=FULL)

    assert outcome.out.decode().splitlines() == ["['lo']", "Network is unreachable"]


# -- bandwidth -----------------------------------------------------------------------------------


async def test_bandwidth_is_held_both_ways(net: Sessions) -> None:
    code = f"""
import socket, time
def rate(port, move):
    with socket.create_connection(("{GOOD}", port)) as link:
        moved, began = 0, time.monotonic()
        while time.monotonic() - began < 2:
            moved += move(link)
        return moved * 8 / (time.monotonic() - began) / 1e6
down = rate({places.SOURCE}, lambda link: len(link.recv(1 << 16)))
up = rate({places.SINK}, lambda link: link.send(bytes(1 << 14)))
print(down, up)
"""
    slow = Network(mode=NetworkMode.FULL, bandwidth_bits=20_000_000)
    outcome = await net.python(code, network=slow)

    down, up = map(float, outcome.out.split())
    assert 10 < down < 24, f"{down} Mbit/s of 20"
    # What waits in the session's own buffers counts as sent: 4 MB at most.
    assert 10 < up < 24 + 16, f"{up} Mbit/s of 20"


# -- what root says ------------------------------------------------------------------------------


async def test_a_machine_gives_only_the_networks_that_root_allows(world: World) -> None:
    with open_launcher(network=config(world, modes=["none", "allow"])) as launcher:
        async with opened(launcher) as found:
            with pytest.raises(NetworkRefused, match=r"full.*none, allow.*network.modes"):
                await found.start("/bin/true", network=FULL)
            with pytest.raises(NetworkRefused, match=r"10\.0\.0\.0/8.*network.forbidden"):
                await found.start("/bin/true", network=allow("10.1.0.0/16:5432"))
            assert (await found.run("/bin/true")).code == 0


async def test_more_bandwidth_than_allowed_is_refused_and_the_limit_is_the_default(
    world: World,
) -> None:
    limits = config(world, bandwidth_bits=1_000_000, addresses="10.215.0.0/28")
    with open_launcher(network=limits) as launcher:
        async with opened(launcher) as found:
            asked = Network(mode=NetworkMode.FULL, bandwidth_bits=2_000_000)
            with pytest.raises(NetworkRefused, match="2mbit asked for, 1mbit is the most"):
                await found.start("/bin/true", network=asked)
            kernel = await found.start("/bin/sleep", "1000", network=FULL)
            connection = record_of(found, kernel).connection
            assert connection is not None and connection.bandwidth_bits == 1_000_000
            assert "rate 1Mbit" in world.machine_does("tc", "qdisc")


async def test_addresses_that_are_in_use_are_found(world: World) -> None:
    with open_launcher(network=config(world, addresses="192.0.2.0/24")) as launcher:
        async with opened(launcher) as found:
            with pytest.raises(RuntimeFailed, match=r"192\.0\.2\.2/31 on up0.*network.addresses"):
                await found.start("/bin/true", network=FULL)


async def test_a_machine_that_does_not_forward_says_how_to_mend_it() -> None:
    with (
        open_world(forwarding=False) as world,
        open_launcher(network=config(world)) as launcher,
    ):
        async with opened(launcher) as found:
            with pytest.raises(RuntimeFailed, match=r"sysctl -w net\.ipv4\.ip_forward=1"):
                await found.start("/bin/true", network=FULL)


async def test_a_full_range_of_addresses_is_an_error_and_numbers_come_back(world: World) -> None:
    with open_launcher(network=config(world, addresses="10.216.0.0/29")) as launcher:
        async with opened(launcher) as found:
            running = [await found.start("/bin/sleep", "1000", network=FULL) for _ in range(3)]
            with pytest.raises(RuntimeFailed, match="all 3 networks"):
                await found.start("/bin/true", network=FULL)
            await found.runtime.kill(running[0])
            await found.outcome(running[0])
            assert (await found.run("/bin/true", network=FULL)).code == 0


# -- deaths --------------------------------------------------------------------------------------


async def test_nothing_is_left_of_a_network(own: Sessions, world: World) -> None:
    before = world.machine_does("ip", "-brief", "link")
    for network in (FULL, allow("good.example"), FULL):
        assert (await own.run("/bin/true", network=network)).code == 0

    assert world.machine_does("ip", "-brief", "link") == before


async def test_what_the_kernel_has_yet_to_clear_away_is_no_obstacle(
    own: Sessions, world: World
) -> None:
    kernel = await own.start("/bin/sleep", "1000", network=FULL)
    found = world.machine_does("ip", "-brief", "link", "show", "type", "veth").split()
    (name,) = {each.partition("@")[0] for each in found if each.startswith("md")}
    await own.runtime.kill(kernel)
    await own.outcome(kernel)
    await own.runtime.remove(kernel)
    world.machine_does("ip", "link", "add", name, "type", "veth", "peer", "name", "other")

    assert (await own.run("/bin/true", network=FULL)).code == 0
    assert name not in world.machine_does("ip", "-brief", "link")


ASK = """
import socket, sys, time
link = socket.create_connection(("good.example", 9000))
print("connected", flush=True)
for line in sys.stdin:
    what = "stream " + ("on" if link.recv(1) else "off")
    deadline = time.monotonic() + 60
    while True:
        try:
            name = socket.gethostbyname(line.strip())
            break
        except OSError as exc:
            name = "none"
            if time.monotonic() > deadline: break
            time.sleep(0.1)
    print(what, name, flush=True)
"""


async def ask(found: Sessions, kernel: KernelId, name: str, answer: str) -> None:
    writer = await found.keepers.stdin(found.io(kernel))
    await writer.write(f"{name}\n".encode())
    await found.until(kernel, f"stream on {answer}\n".encode())
    await writer.close()


async def test_connections_and_names_go_on_across_launchers(own: Sessions) -> None:
    assert own.launcher is not None
    network = allow("good.example", "other.example")
    kernel = await own.start(*PYTHON, ASK, network=network, stdin=True)
    await own.until(kernel, b"connected")
    warden = await warden_of(own, kernel)

    own.launcher.kill()
    await ask(own, kernel, "good.example", GOOD)
    own.launcher.start()
    assert [found.running for found in await own.runtime.adopt()] == [True]

    await ask(own, kernel, "other.example", OTHER)
    assert await warden_of(own, kernel) == warden
    assert (await own.run("/bin/true", network=FULL)).code == 0, "with another number"


async def test_a_killed_warden_is_replaced_and_the_rules_stay(own: Sessions) -> None:
    kernel = await own.start(*PYTHON, ASK, network=allow("*.example"), stdin=True)
    await own.until(kernel, b"connected")
    warden = await warden_of(own, kernel)

    os.kill(warden, signal.SIGKILL)

    assert await warden_of(own, kernel, but=warden) != warden
    await ask(own, kernel, "other.example", OTHER)


async def test_a_new_launcher_replaces_a_warden_that_died_meanwhile(own: Sessions) -> None:
    assert own.launcher is not None
    kernel = await own.start(*PYTHON, ASK, network=allow("*.example"), stdin=True)
    await own.until(kernel, b"connected")
    warden = await warden_of(own, kernel)

    own.launcher.kill()
    os.kill(warden, signal.SIGKILL)
    own.launcher.start()

    await warden_of(own, kernel, but=warden)
    await ask(own, kernel, "other.example", OTHER)


async def test_a_session_that_ends_while_no_launcher_is_there_leaves_nothing(
    own: Sessions, world: World
) -> None:
    assert own.launcher is not None
    before = world.machine_does("ip", "-brief", "link")
    kernel = await own.start("/bin/sleep", "1000", network=FULL)
    record = record_of(own, kernel)
    assert record.keeper is not None

    own.launcher.kill()
    os.kill(record.keeper.pid, signal.SIGKILL)

    late = time.monotonic() + PATIENCE_S
    while world.machine_does("ip", "-brief", "link") != before:
        assert time.monotonic() < late
        await asyncio.sleep(0.05)
    own.launcher.start()
    assert (await own.run("/bin/true", network=FULL)).code == 0


async def test_a_warden_has_given_up_all_power_but_one(net: Sessions) -> None:
    kernel = await net.start("/bin/sleep", "1000", network=allow("good.example"))
    warden = await warden_of(net, kernel)

    status = Path(f"/proc/{warden}/status").read_text()
    facts = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)

    assert int(facts["CapEff"], 16) == int(facts["CapPrm"], 16) == 1 << 12
    assert int(facts["CapBnd"], 16) == int(facts["CapInh"], 16) == 0
    assert facts["Uid"].split() == [str(record_of(net, kernel).uid)] * 4
    assert facts["NoNewPrivs"] == "1" and facts["Seccomp"] == "2"


def test_an_ordinary_users_launcher_gives_no_network() -> None:
    from madang.agent.launcher.network.networks import NetworkConfig, Networks

    networks = Networks(
        NetworkConfig(modes=MODES),
        state="/nowhere",
        mark="a" * 12,
        rootless=True,
        selector=None,  # type: ignore[arg-type]
        timers=None,  # type: ignore[arg-type]
        helpers=None,  # type: ignore[arg-type]
    )
    with pytest.raises(HostLacks, match="takes root"):
        networks.check(FULL)
