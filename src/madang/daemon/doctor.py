"""``madang doctor``: what this machine can and can't do, and how to mend it."""

from __future__ import annotations

import dataclasses
import http.client
import os
import platform
import socket
import sys
from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

import madang
from madang.agent.launcher import probe
from madang.agent.launcher.network.networks import NetworkConfig
from madang.agent.launcher.offers import Offers
from madang.agent.launcher.probe import Finding
from madang.daemon.settings import NodeSettings, Settings
from madang.daemon.state import FORMAT, read_running

MARKS: Final = {"ok": "✓", "warning": "!", "error": "✗"}
ANSWER_S: Final = 3.0


def examine(settings: Settings) -> list[Finding]:
    """Everything that can be found out without changing anything."""
    return [
        _versions(),
        *_state(settings.server.state),
        *_server(settings),
        *probe.probe(
            settings.server.state,
            server_uid=settings.server.uid,
            network=NetworkConfig.of(dataclasses.asdict(settings.network)),
        ),
        *_runtimes(settings.node),
    ]


def report(findings: list[Finding]) -> Iterator[str]:
    """For people; the mend stands below what it mends."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        yield f"{MARKS[finding.level]} {finding.name:{width}}  {finding.text}"
        if finding.mend:
            yield f"  {'':{width}}  → {finding.mend}"


def healthy(findings: list[Finding]) -> bool:
    """Whether sessions can run."""
    return all(finding.level != "error" for finding in findings)


def _good(name: str, text: str) -> Finding:
    return Finding(name=name, level="ok", text=text)


def _warn(name: str, text: str, mend: str) -> Finding:
    return Finding(name=name, level="warning", text=text, mend=mend)


def _bad(name: str, text: str, mend: str) -> Finding:
    return Finding(name=name, level="error", text=text, mend=mend)


def _versions() -> Finding:
    text = (
        f"Madang {madang.__version__}, Python {platform.python_version()} ({sys.executable}), "
        f"{platform.system()} {platform.release()} {platform.machine()}"
    )
    if platform.system() != "Linux":
        return _bad("versions", text, "Sessions need Linux; a virtual machine with it will do.")
    return _good("versions", text)


def _runtimes(node: NodeSettings) -> Iterator[Finding]:
    """What sessions can choose here, and how to get the others."""
    found = Offers(
        node.runtime,
        node.runtimes,
        rootless=os.geteuid() != 0,
        docker_socket=node.docker_socket,
    )
    text = f"sessions can choose {', '.join(found.names)}"
    wanted = found.missing.get(node.runtime, "there is no such runtime")
    if node.runtime not in found.programs:
        mend = "Do that, or set `node.runtime` to one of those."
        yield _bad("runtimes", f"`node.runtime` is {node.runtime}, but {wanted}", mend)
        return
    more = [f"{name}: {why}" for name, why in found.missing.items()]
    yield Finding(name="runtimes", level="ok", text="; ".join([text, *more]))


def _state(path: str) -> Iterator[Finding]:
    if not os.path.isdir(path):
        yield _good("state folder", f"{path} will be made by `madang up`")
        return
    owner = os.stat(path).st_uid
    if owner != os.geteuid():
        yield _bad(
            "state folder", f"{path} belongs to user {owner}, not to you", "Use --state DIR."
        )
        return
    try:
        with open(os.path.join(path, "VERSION"), encoding="ascii", errors="replace") as file:
            version = file.read(32).strip()
    except FileNotFoundError:
        version = str(FORMAT)
    if version != str(FORMAT):
        text = f"{path} has format {version!r}, this Madang knows {FORMAT}"
        yield _bad("state folder", text, "Start the Madang that wrote it, or use --state DIR.")
        return
    yield _good("state folder", path)


def _server(settings: Settings) -> Iterator[Finding]:
    running = read_running(settings.server.state)
    if running is None:
        yield _warn("server", "not started", "madang up -d")
        yield _port(settings.server.host, settings.server.port)
    elif not running.url:
        yield _warn("server", f"starting (process {running.pid})", "Wait, or see server.log.")
    elif _answers(running.url):
        yield _good("server", f"ready at {running.url}")
    else:
        log = os.path.join(settings.server.state, "server", "server.log")
        yield _bad("server", f"{running.url} does not answer", f"See {log}; madang down, up.")


def _port(host: str, port: int) -> Finding:
    with socket.socket() as probing:
        probing.settimeout(ANSWER_S)
        taken = port != 0 and probing.connect_ex((host, port)) == 0
    if taken:
        return _warn("port", f"{port} is in use by another program", "madang up --port N")
    return _good("port", f"{port} is free")


def _answers(url: str) -> bool:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=ANSWER_S)
    try:
        connection.request("GET", "/v1/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
