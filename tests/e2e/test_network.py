"""Networks by command line and Python, on a real platform in a machine of its own."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from madang.client import Client
from madang.testing import world as places
from madang.testing.patience import PATIENCE_S, wait_until
from madang.testing.platform import Platform, start
from madang.testing.world import World, open_world
from madang.wire.network import NetworkMode, NetworkUse
from madang.wire.session import Session

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(places.missing()), reason=places.missing() or "it can"),
]
GET = """
import socket, sys
for host in sys.argv[1:]:
    try:
        with socket.create_connection((host, 80), 10) as link:
            print(host, link.recv(100).decode().split(",")[0])
    except OSError as exc:
        print(host, type(exc).__name__)
"""
ALWAYS = ("--no-sync", "--no-output", "-q")
PYTHON = ("/usr/bin/python3", "-I", "-S", "-c", GET)
SETTINGS = {
    "MADANG_NETWORK_MODES": "none:allow",
    "MADANG_NETWORK_RESOLVERS": places.RESOLVER,
    "MADANG_NETWORK_BANDWIDTH": "200mbit",
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world() as found, found.inside(found.machine):
        yield found


@pytest.fixture(scope="module")
def platform(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    del world
    folder = tmp_path_factory.mktemp("platform")
    with start(folder, environment=SETTINGS) as platform:
        yield platform
    assert "madang" not in said(["nft", "list", "tables"])


@pytest.fixture
def client(platform: Platform) -> Iterator[Client]:
    with platform.client() as client:
        yield client


def said(argv: list[str]) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def use_of(session: Session) -> NetworkUse:
    return (session.usage and session.usage.network) or NetworkUse()


def test_a_command_reaches_what_it_names(platform: Platform, client: Client) -> None:
    allow = ("--allow", "good.example:80", "--allow", "203.0.113.7:80", "--bandwidth", "50mbit")
    hosts = ("good.example", "203.0.113.7", "other.example", places.OTHER)
    done = platform.madang("run", *ALWAYS, "--name", "net", *allow, "--", *PYTHON, *hosts)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"good.example hello {places.MACHINE}",
        f"203.0.113.7 hello {places.MACHINE}",
        "other.example gaierror",
        f"{places.OTHER} ConnectionRefusedError",
    ]
    shown = platform.madang("show", "net").stdout
    assert "network   allow good.example:80 203.0.113.7:80 at 50mbit" in shown
    assert f"refused   3 times: other.example (2), {places.OTHER}:80/tcp (1)" in shown, shown
    session = client.get_session("net")
    assert session.enforced["network"] == "nftables"
    assert session.network.mode is NetworkMode.ALLOW


def test_a_running_session_tells_what_was_refused(client: Client) -> None:
    with client.run(
        [*PYTHON[:-1], GET + "import time; time.sleep(1000)", places.OTHER], allow=["a.example"]
    ) as run:
        use = wait_until(
            lambda: use_of(client.get_session(run.session.id)), lambda seen: seen.refused
        )
        assert [r.target for r in use.refused] == [f"{places.OTHER}:80/tcp"]
        client.stop(run.session.id, grace_s=0)


def test_what_root_does_not_allow_is_said(platform: Platform) -> None:
    said = ("--no-sync", "--no-output")
    done = platform.madang("run", *said, "--network", "full", "--", "true")
    assert done.returncode != 0
    assert "network full; there is allow, none" in done.stderr, done.stderr

    done = platform.madang("run", *said, "--allow", "a.b", "--bandwidth", "1g", "--", "true")
    assert "1gbit asked for, 200mbit is the most" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--allow", "a_b/"], "no IPv4"),
        (["--network", "full", "--allow", "a.b"], "the mode is full"),
        (["--bandwidth", "1m"], "no network"),
        (["--network", "none", "--allow", "a.b"], "the mode is none"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    platform: Platform, client: Client, arguments: list[str], words: str
) -> None:
    before = len(list(client.list_sessions(ended=True)))
    done = platform.madang("run", *ALWAYS, *arguments, "--", "true")

    assert words in done.stderr and done.returncode != 0
    assert len(list(client.list_sessions(ended=True))) == before


def test_without_a_word_there_is_no_network(platform: Platform) -> None:
    done = platform.madang("run", *ALWAYS, "--", *PYTHON, places.GOOD)
    assert done.stdout == f"{places.GOOD} OSError\n"


def test_a_plan_names_the_network(platform: Platform) -> None:
    done = platform.madang("run", "--dry-run", "--no-sync", "--allow", "a.b", "--", "true")
    assert "network allow a.b" in done.stdout


def test_a_network_outlives_a_restart_of_everything(platform: Platform, client: Client) -> None:
    code = GET + "import time; time.sleep(1000)"
    with client.run([*PYTHON[:-1], code, "good.example"], allow=["*.example"], name="keeps") as run:
        run.session  # noqa: B018
        platform.kill("launcher")
        platform.kill("server")
        late = time.monotonic() + PATIENCE_S
        while True:
            try:
                done = platform.madang("exec", "keeps", "--", *PYTHON, "other.example")
                assert done.stdout == f"other.example hello {places.MACHINE}\n", done.stderr
                break
            except AssertionError:
                if time.monotonic() > late:
                    raise
                time.sleep(0.2)
    client.remove("keeps", force=True)


def test_doctor_looks_at_networks(platform: Platform) -> None:
    done = platform.madang("doctor", "--state", str(platform.state), "--json")
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert found["network"]["level"] == "ok", found["network"]
    assert "none, allow" in found["network"]["text"]
    assert os.geteuid() == 0
