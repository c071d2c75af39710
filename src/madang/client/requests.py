"""From a caller's arguments to the objects of the API: the same for both clients."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from madang.wire.errors import InvalidRequest, NetworkInvalid
from madang.wire.kernel import WORK_DIR, ExecSpec
from madang.wire.network import NO_NETWORK, Network, NetworkMode, parse_rate
from madang.wire.network import check as check_network
from madang.wire.session import HOST_IMAGE, SessionSpec, SizeRequest
from madang.wire.size import parse_bytes, parse_cpu, parse_duration

Argument = str | bytes | os.PathLike[str]
Amount = str | int | float


def new_key() -> str:
    """An idempotency key."""
    return os.urandom(16).hex()


def encode_argv(argv: Sequence[Argument]) -> tuple[tuple[str, ...], str]:
    """Arguments as they travel, with their encoding: any bytes pass (see ``SessionSpec``)."""
    if isinstance(argv, str | bytes):
        raise InvalidRequest('argv: give a list, like ["python3", "train.py"], not one string.')
    raw = [os.fsencode(arg) for arg in argv]
    if any(b"\0" in arg for arg in raw):
        raise InvalidRequest("argv: an argument holds a NUL byte, which no program can be given.")
    try:
        return tuple(arg.decode("utf-8") for arg in raw), "utf-8"
    except UnicodeDecodeError:
        return tuple(arg.decode("latin-1") for arg in raw), "latin-1"


def size_request(
    *,
    cpu: Amount | None = None,
    mem: Amount | None = None,
    pids: int | None = None,
    disk: Amount | None = None,
    time: Amount | None = None,
) -> SizeRequest:
    """Sizes as numbers (cores, bytes, seconds) or as text (``512m``, ``2h``)."""
    return SizeRequest(
        cpu=parse_cpu(cpu) if isinstance(cpu, str) else cpu,
        mem_bytes=_bytes(mem, "mem"),
        pids=pids,
        disk_bytes=_bytes(disk, "disk"),
        time_s=parse_duration(time) if isinstance(time, str) else time,
    )


def _bytes(value: Amount | None, field: str) -> int | None:
    if value is None:
        return None
    return parse_bytes(value, field=field) if isinstance(value, str) else int(value)


def network_request(
    mode: str | None = None, allow: Sequence[str] = (), bandwidth: Amount | None = None
) -> Network:
    """Targets alone mean ``allow``. Raises NetworkInvalid.

    *bandwidth*: bits per second, or a text like ``"100mbit"``.
    """
    found = mode or (NetworkMode.ALLOW if allow else NetworkMode.NONE)
    try:
        chosen = NetworkMode(found)
    except ValueError as exc:
        known = ", ".join(NetworkMode)
        raise NetworkInvalid(f"network: {found[:40]!r} is none of {known}.") from exc
    rate = parse_rate(bandwidth) if isinstance(bandwidth, str) else bandwidth
    return check_network(
        Network(
            mode=chosen,
            allow=tuple(allow),
            bandwidth_bits=None if rate is None else int(rate),
        )
    )


def session_spec(
    argv: Sequence[Argument] = (),
    *,
    name: str | None = None,
    project: str = "",
    image: str = HOST_IMAGE,
    size: SizeRequest | None = None,
    preset: str = "",
    env: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    tty: bool = False,
    stdin: bool = False,
    window: tuple[int, int] = (24, 80),
    workspace: str | None = None,
    grace_s: float = 10.0,
    policy: str = "",
    runtime: str = "",
    network: Network = NO_NETWORK,
) -> SessionSpec:
    words, encoding = encode_argv(argv)
    rows, cols = window
    return SessionSpec(
        argv=words,
        argv_encoding=encoding,
        name=name,
        project=project,
        image=image,
        size=size or SizeRequest(),
        preset=preset,
        env=dict(env or {}),
        labels=dict(labels or {}),
        tty=tty,
        stdin=stdin,
        rows=rows,
        cols=cols,
        workspace=workspace,
        grace_s=grace_s,
        policy=policy,
        runtime=runtime,
        network=network,
    )


def exec_spec(
    argv: Sequence[Argument],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str = WORK_DIR,
    tty: bool = False,
    stdin: bool = False,
    window: tuple[int, int] = (24, 80),
) -> ExecSpec:
    words, encoding = encode_argv(argv)
    rows, cols = window
    return ExecSpec(
        argv=words,
        argv_encoding=encoding,
        env=dict(env or {}),
        cwd=cwd,
        tty=tty,
        stdin=stdin,
        rows=rows,
        cols=cols,
    )
