"""Files and sockets of a kernel's folder, as every runtime built on keepers has them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from dataclasses import replace
from typing import Any, Final

from madang.agent.launcher import registry
from madang.agent.launcher.program import ENDED, SOCKET
from madang.agent.launcher.registry import NETWORK_USE
from madang.agent.runtime.contract import Started
from madang.kit.codec import from_json, to_builtins
from madang.wire.errors import InvalidRequest, SessionNotRunning, from_problem
from madang.wire.kernel import ExecSpec, KernelId
from madang.wire.network import NetworkUse
from madang.wire.session import Ended, Reason, Usage

_EXEC_S: Final = 30.0
_DISK_EVERY_S: Final = 2.0
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def read_ended(folder: str) -> Ended | None:
    """How the program of an ``io`` folder ended; None: it runs, or nobody saw its end."""
    try:
        with open(f"{folder}/{ENDED}", "rb") as file:
            return from_json(Ended, file.read())
    except (FileNotFoundError, InvalidRequest):
        return None


def read_main(kernel_dir: str) -> Ended | None:
    """How the main program ended, with what the kernel's network was used for."""
    ended = read_ended(f"{kernel_dir}/io/main")
    return None if ended is None else replace(ended, network=read_network(kernel_dir))


def read_network(kernel_dir: str) -> NetworkUse | None:
    """None: it has none, or its warden writes just now."""
    try:
        with open(f"{kernel_dir}/{NETWORK_USE}", "rb") as file:
            return from_json(NetworkUse, file.read())
    except (FileNotFoundError, InvalidRequest):
        return None


def lost(at: float) -> Ended:
    text = (
        "nobody saw how it ended: its keeper was killed, or the machine went down; "
        "output until then is kept"
    )
    return Ended(reason=Reason.LOST, text=text, at=at)


def execs(kernel_dir: str) -> tuple[str, ...]:
    with contextlib.suppress(FileNotFoundError):
        return tuple(sorted(set(os.listdir(f"{kernel_dir}/io")) - {"main"}))
    return ()


async def connect(path: str) -> socket.socket:
    """A non-blocking connection, however long *path* is. Raises OSError."""
    folder, name = os.path.split(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        here = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            await asyncio.get_running_loop().sock_connect(sock, f"/proc/self/fd/{here}/{name}")
        finally:
            os.close(here)
    except BaseException:
        sock.close()
        raise
    return sock


async def start_exec(kernel_dir: str, kernel: KernelId, exec_id: str, spec: ExecSpec) -> Started:
    """Ask the kernel's keeper for one more program."""
    request = {"op": "exec", "exec": exec_id, "spec": to_builtins(spec)}
    try:
        answer = await _ask(f"{kernel_dir}/io/main/{SOCKET}", request)
    except (OSError, TimeoutError, ValueError) as exc:
        raise SessionNotRunning(f"{kernel} does not run; nothing can be executed in it.") from exc
    if "error" in answer:
        raise from_problem(answer["error"], answer["text"], {})
    return Started(at=answer["at"])


async def _ask(path: str, request: dict[str, Any]) -> dict[str, Any]:
    """One line to a keeper, one line back."""
    loop = asyncio.get_running_loop()
    with await connect(path) as sock:
        async with asyncio.timeout(_EXEC_S):
            await loop.sock_sendall(sock, json.dumps(request).encode() + b"\n")
            line = b""
            while not line.endswith(b"\n"):
                data = await loop.sock_recv(sock, 65536)
                if not data:
                    raise ValueError("the keeper left")
                line += data
    answer: dict[str, Any] = json.loads(line)
    return answer


def descendants(init: int) -> list[int]:
    """Descendants of *init*, seen from outside."""
    found: list[int] = []
    todo = [init]
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                    todo += map(int, file.read().split())
        found.append(pid)
    return found[1:]


class Meter:
    """Reads what kernels use: control groups where there are some, processes elsewhere."""

    def __init__(self) -> None:
        self._records: dict[str, registry.Record] = {}
        self._disk: dict[str, tuple[float, int]] = {}

    async def usage(self, kernel_dir: str, now: float) -> Usage:
        record = self._records.get(kernel_dir) or registry.load(kernel_dir)
        if record is None or record.group is None:
            raise SessionNotRunning(f"{os.path.basename(kernel_dir)} does not run.")
        self._records[kernel_dir] = record
        counters = record.group.counters()
        mem_bytes, pids = counters.mem_bytes, counters.pids
        if (mem_bytes is None or pids is None) and record.init is not None:
            found = descendants(record.init.pid)
            pids = len(found) if pids is None else pids
            mem_bytes = sum(map(_private_bytes, found)) if mem_bytes is None else mem_bytes
        return Usage(
            at=now,
            cpu_s=counters.cpu_s,
            mem_bytes=mem_bytes,
            mem_peak_bytes=counters.mem_peak_bytes,
            pids=pids,
            disk_bytes=await self._disk_bytes(kernel_dir),
            network=read_network(kernel_dir) if record.connection is not None else None,
        )

    def forget(self, kernel_dir: str) -> None:
        self._records.pop(kernel_dir, None)
        self._disk.pop(kernel_dir, None)

    async def _disk_bytes(self, kernel_dir: str) -> int:
        with contextlib.suppress(FileNotFoundError):
            return os.stat(f"{kernel_dir}/scratch.img").st_blocks * 512
        at, used = self._disk.get(kernel_dir, (-_DISK_EVERY_S, 0))
        if time.monotonic() - at >= _DISK_EVERY_S:
            used = await asyncio.to_thread(_tree_bytes, f"{kernel_dir}/scratch")
            self._disk[kernel_dir] = (time.monotonic(), used)
        return used


def _private_bytes(pid: int) -> int:
    """Resident and not of a file: what a memory limit would count."""
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/statm", "rb") as file:
            fields = file.read().split()
        return (int(fields[1]) - int(fields[2])) * _PAGE
    return 0


def _tree_bytes(top: str) -> int:
    total = 0
    todo = [top]
    while todo:
        with contextlib.suppress(OSError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
    return total
