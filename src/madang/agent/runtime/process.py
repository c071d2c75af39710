"""Sessions as plain processes of the same user: no isolation, no limits but time. For tests.

Same keepers, same files, same ends as the ``native`` runtime, on machines that can do nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from typing import Any, Final

from madang.agent.launcher import checks, registry, scratch
from madang.agent.launcher.cgroups import Group
from madang.agent.launcher.order import Order
from madang.agent.runtime import layout
from madang.agent.runtime.contract import Found, Prepared, RuntimeFacts, Started
from madang.kit.clock import Clock, SystemClock
from madang.kit.codec import to_builtins
from madang.wire.errors import (
    Conflict,
    HostLacks,
    NotFound,
    PolicyUnkept,
    RuntimeFailed,
    RuntimeNotOffered,
    SessionNotRunning,
)
from madang.wire.kernel import Capacity, ExecSpec, KernelId, KernelSpec, WarmLoad
from madang.wire.policy import Sandbox
from madang.wire.session import Ended, Usage

ENFORCED: Final = {
    "cpu": "none", "mem": "none", "pids": "none", "disk": "none",
    "time": "keeper", "network": "none", "uid": "shared", "seccomp": "none",
}  # fmt: skip
_NOTHING_KEPT: Final = "this runtime isolates nothing and keeps no sandbox policy; use `native`."
_HELPER: Final = (sys.executable, "-P", "-m", "madang.agent.launcher.bare")


@dataclass(eq=False, slots=True)
class _Kernel:
    record: registry.Record | None = None
    keeper_fd: int = -1
    settled: bool = False
    left: asyncio.Event = field(default_factory=asyncio.Event)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class ProcessRuntime:
    """Implements ``contract.Runtime``."""

    name = "process"

    def __init__(self, root: str, clock: Clock | None = None) -> None:
        self._folder = f"{root}/kernels"
        self._clock = clock or SystemClock()
        self._kernels: dict[KernelId, _Kernel] = {}
        self._changed = asyncio.Event()
        self._meter = layout.Meter()

    async def open(self) -> RuntimeFacts:
        os.makedirs(self._folder, exist_ok=True)
        for kernel, folder in registry.folders(self._folder):
            found = self._kernels[kernel] = _Kernel(registry.load(folder))
            self._watch(found)
        disk = os.statvfs(self._folder)
        capacity = Capacity(
            cpu=float(len(os.sched_getaffinity(0))),
            mem_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            disk_bytes=disk.f_bavail * disk.f_frsize,
            pids=32768,
        )
        warning = "sessions are plain processes: nothing isolates them; for tests only"
        return RuntimeFacts(
            name=self.name,
            rootless=True,
            enforced=ENFORCED,
            warnings=(warning,),
            capacity=capacity,
        )

    async def close(self) -> None:
        for found in self._kernels.values():
            self._unwatch(found)

    async def prepare(self, kernel: KernelId, spec: KernelSpec) -> Prepared:
        if spec.sandbox:
            raise PolicyUnkept(_NOTHING_KEPT)
        if spec.runtime not in {"", self.name}:
            why = "nothing isolates sessions here"
            raise RuntimeNotOffered(spec.runtime, offered=(self.name,), why=why)
        if spec.network:
            text = "this runtime isolates nothing and gives no networks; use `native`."
            raise HostLacks(text)
        folder = self.kernel_dir(kernel)
        for name in ("io", "service", *(f"scratch/{name}" for name in scratch.FOLDERS)):
            os.makedirs(f"{folder}/{name}", exist_ok=True)
        self._kernels.setdefault(kernel, _Kernel())
        return Prepared(enforced=dict(ENFORCED))

    async def start(self, kernel: KernelId, spec: KernelSpec) -> Started:
        found = self._get(kernel)
        checked = checks.kernel_spec(to_builtins(spec))
        async with found.lock:
            if found.settled:
                raise Conflict(f"{kernel} has ended.")
            if found.record is None:
                await self._start(found, self._order(kernel, checked))
            record = found.record
        assert record is not None
        return Started(at=record.started_at or 0.0)

    async def run(self, kernel: KernelId, spec: KernelSpec) -> tuple[Prepared, Started]:
        return await self.prepare(kernel, spec), await self.start(kernel, spec)

    async def _start(self, found: _Kernel, order: Order) -> None:
        folder = os.path.dirname(order.io)
        request = json.dumps({"order": order.to_json(), "folder": folder})
        answer = json.loads(await _run_helper("keep", stdin=request.encode()))
        if "failed" in answer:
            raise RuntimeFailed(f"{order.kernel} could not be started: {answer['failed']}.")
        found.record = registry.load(folder)
        self._watch(found)
        self._changed.set()

    def _order(self, kernel: KernelId, spec: KernelSpec) -> Order:
        folder = self.kernel_dir(kernel)
        return Order(
            kernel=str(kernel),
            spec=spec,
            io=f"{folder}/io",
            scratch=f"{folder}/scratch",
            scratch_enforced="none",
            group=Group(version=0),
            cpus=[],
            uid=os.getuid(),
        )

    async def exec(self, kernel: KernelId, exec_id: str, spec: ExecSpec) -> Started:
        return await layout.start_exec(self.kernel_dir(kernel), kernel, exec_id, spec)

    async def kill(self, kernel: KernelId) -> None:
        self._signal(kernel, signal.SIGKILL)

    async def freeze(self, kernel: KernelId) -> None:
        if self._get(kernel).keeper_fd < 0:
            raise Conflict(f"{kernel} does not run.")
        with open(self._mark(kernel), "wb"):
            self._signal(kernel, signal.SIGSTOP)

    async def guard(self, kernel: KernelId, sandbox: Sandbox) -> tuple[str, ...]:
        if self._get(kernel).keeper_fd < 0:
            raise Conflict(f"{kernel} does not run.")
        if sandbox.live:
            raise PolicyUnkept(_NOTHING_KEPT)
        return ()

    async def thaw(self, kernel: KernelId) -> None:
        self._signal(kernel, signal.SIGCONT)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._mark(kernel))

    def _mark(self, kernel: KernelId) -> str:
        """A file that is there while the kernel is frozen: its programs alone don't tell."""
        return f"{self.kernel_dir(kernel)}/frozen"

    def _signal(self, kernel: KernelId, number: int) -> None:
        """To all programs, not to their init; SIGKILL also ends an idle one."""
        found = self._kernels.get(kernel)
        if found is None or found.keeper_fd < 0 or found.record is None or not found.record.init:
            return
        init = found.record.init.pid
        for pid in layout.descendants(init):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.kill(init, signal.SIGTERM)

    async def usage(self, kernel: KernelId) -> Usage:
        if self._get(kernel).keeper_fd < 0:
            raise SessionNotRunning(f"{kernel} does not run.")
        return await self._meter.usage(self.kernel_dir(kernel), self._clock.now())

    async def changes(self, kernel: KernelId) -> socket.socket:
        self._get(kernel)
        raise Conflict(f"{kernel} has no root of its own: nothing is isolated here.")

    async def files(self, kernel: KernelId) -> socket.socket:
        self._get(kernel)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            fd = theirs.fileno()
            root = f"{self.kernel_dir(kernel)}/scratch"
            await _run_helper("files", str(fd), root, pass_fds=(fd,))
        return ours

    async def warmth(self) -> WarmLoad | None:
        return None

    async def adopt(self) -> list[Found]:
        return [self._found(kernel, found) for kernel, found in self._kernels.items()]

    def _found(self, kernel: KernelId, found: _Kernel) -> Found:
        folder = self.kernel_dir(kernel)
        return Found(
            kernel=kernel,
            prepared=True,
            running=found.keeper_fd >= 0,
            started_at=found.record.started_at if found.record else None,
            ended=layout.read_ended(f"{folder}/io/main"),
            execs=layout.execs(folder),
            frozen=os.path.exists(self._mark(kernel)),
        )

    async def settle(self, kernel: KernelId) -> Ended:
        found = self._get(kernel)
        if found.keeper_fd >= 0:
            await self.kill(kernel)
            await found.left.wait()
        found.settled = True
        ended = layout.read_ended(f"{self.kernel_dir(kernel)}/io/main")
        return ended or layout.lost(self._clock.now())

    async def remove(self, kernel: KernelId) -> None:
        found = self._kernels.get(kernel)
        if found is None:
            return
        async with found.lock:
            if kernel in self._kernels:
                await self.settle(kernel)
                await asyncio.to_thread(scratch.remove_tree, self.kernel_dir(kernel))
                self._kernels.pop(kernel, None)
                self._meter.forget(self.kernel_dir(kernel))

    def kernel_dir(self, kernel: KernelId) -> str:
        return f"{self._folder}/{kernel}"

    async def wait_change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def _get(self, kernel: KernelId) -> _Kernel:
        found = self._kernels.get(kernel)
        if found is None:
            raise NotFound(f"{kernel} is not on this machine.")
        return found

    def _watch(self, found: _Kernel) -> None:
        keeper = found.record.keeper if found.record is not None else None
        fd = keeper.open() if keeper is not None else None
        if fd is None:
            found.left.set()
            self._changed.set()
            return
        found.keeper_fd = fd
        found.left.clear()
        asyncio.get_running_loop().add_reader(fd, self._keeper_left, found)

    def _keeper_left(self, found: _Kernel) -> None:
        self._unwatch(found)
        found.left.set()
        self._changed.set()

    @staticmethod
    def _unwatch(found: _Kernel) -> None:
        if found.keeper_fd >= 0:
            asyncio.get_running_loop().remove_reader(found.keeper_fd)
            os.close(found.keeper_fd)
            found.keeper_fd = -1


async def _run_helper(*arguments: str, stdin: bytes = b"", **options: Any) -> bytes:
    process = await asyncio.create_subprocess_exec(
        *_HELPER,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        **options,
    )
    output, _ = await process.communicate(stdin)
    if process.returncode != 0:
        raise RuntimeFailed(f"a helper process ended with {process.returncode}.")
    return output
