"""The default runtime: our own launcher, over its socket."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator
from typing import Any, Final

from madang.agent.launcher.protocol import Frames, frame
from madang.agent.runtime import layout
from madang.agent.runtime.contract import Found, Prepared, RuntimeFacts, Started
from madang.kit.clock import Clock
from madang.kit.codec import convert, to_builtins
from madang.wire.errors import (
    LauncherUnavailable,
    PlatformError,
    RuntimeFailed,
    from_problem,
)
from madang.wire.kernel import Capacity, ExecSpec, KernelId, KernelSpec, WarmLoad
from madang.wire.policy import Sandbox
from madang.wire.session import Ended, Usage

RECONNECT_S: Final = 20.0
"""A call waits so long for a launcher that is being started again."""
CALL_S: Final = 120.0
"""The slowest call (making a large disk on a slow one) takes less."""
_FIRST_PAUSE_S: Final = 0.02
_LONGEST_PAUSE_S: Final = 1.0


class NativeRuntime:
    """Implements ``contract.Runtime``. Calls survive a restart of the launcher."""

    name = "native"

    def __init__(self, socket_path: str, state_dir: str, clock: Clock) -> None:
        self._socket_path = socket_path
        self._kernels = f"{state_dir}/kernels"
        self._clock = clock
        self._link: _Link | None = None
        self._connecting = asyncio.Lock()
        self._changed = asyncio.Event()
        self._lost = asyncio.Event()
        self._keeper_task: asyncio.Task[None] | None = None
        self._meter = layout.Meter()
        self._enforced: dict[str, str] = {}

    async def open(self) -> RuntimeFacts:
        self._keeper_task = asyncio.create_task(self._keep_link(), name="native:link")
        facts = await self._call("hello")
        self._enforced = dict(facts["enforced"])
        return RuntimeFacts(
            name=self.name,
            rootless=facts["rootless"],
            enforced=facts["enforced"],
            warnings=tuple(facts["warnings"]),
            capacity=convert(Capacity, facts["capacity"]),
            runtimes=tuple(facts["runtimes"]),
            networks=tuple(facts["networks"]),
            keeps={name: tuple(kinds) for name, kinds in facts["keeps"].items()},
            accepts_unkept=facts["accepts_unkept"],
        )

    async def close(self) -> None:
        if self._keeper_task is not None:
            self._keeper_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper_task
            self._keeper_task = None
        if self._link is not None:
            self._link.close()
            self._link = None

    async def prepare(self, kernel: KernelId, spec: KernelSpec) -> Prepared:
        return self._prepared(
            await self._call("prepare", kernel=str(kernel), spec=to_builtins(spec))
        )

    def _prepared(self, answer: dict[str, Any]) -> Prepared:
        enforced = self._enforced | answer["enforced"] | _policy(answer["policy"])
        return Prepared(enforced=enforced, warnings=tuple(answer["warnings"]))

    async def start(self, kernel: KernelId, spec: KernelSpec) -> Started:
        answer = await self._call("start", kernel=str(kernel), spec=to_builtins(spec))
        return Started(at=answer["at"], timings_ms=answer.get("timings_ms", {}))

    async def run(self, kernel: KernelId, spec: KernelSpec) -> tuple[Prepared, Started]:
        answer = await self._call("run", kernel=str(kernel), spec=to_builtins(spec))
        started = Started(at=answer["at"], timings_ms=answer.get("timings_ms", {}))
        return self._prepared(answer), started

    async def exec(self, kernel: KernelId, exec_id: str, spec: ExecSpec) -> Started:
        return await layout.start_exec(self.kernel_dir(kernel), kernel, exec_id, spec)

    async def kill(self, kernel: KernelId) -> None:
        await self._call("kill", kernel=str(kernel))

    async def freeze(self, kernel: KernelId) -> None:
        await self._call("freeze", kernel=str(kernel))

    async def thaw(self, kernel: KernelId) -> None:
        await self._call("thaw", kernel=str(kernel))

    async def guard(self, kernel: KernelId, sandbox: Sandbox) -> tuple[str, ...]:
        answer = await self._call("guard", kernel=str(kernel), sandbox=to_builtins(sandbox))
        return tuple(answer["later"])

    async def usage(self, kernel: KernelId) -> Usage:
        return await self._meter.usage(self.kernel_dir(kernel), self._clock.now())

    async def files(self, kernel: KernelId) -> socket.socket:
        return await self._socket("files", kernel)

    async def changes(self, kernel: KernelId) -> socket.socket:
        return await self._socket("changes", kernel)

    async def _socket(self, op: str, kernel: KernelId) -> socket.socket:
        request = frame({"id": 1, "op": op, "kernel": str(kernel)})
        deadline = self._clock.monotonic() + RECONNECT_S
        while True:
            link = await self._connect(deadline)
            try:
                async with asyncio.timeout(CALL_S):
                    await asyncio.get_running_loop().sock_sendall(link, request)
                    return await _receive_socket(link)
            except (OSError, _LinkLost) as exc:
                self._check_patience(deadline, exc)
            except TimeoutError as exc:
                raise LauncherUnavailable(f"the launcher does not answer ({op}).") from exc
            finally:
                link.close()

    async def warmth(self) -> WarmLoad | None:
        """See ``launcher.warm``."""
        found = WarmLoad(**await self._call("warm"))
        return found if found.budget_bytes else None

    async def adopt(self) -> list[Found]:
        answer = await self._call("list")
        return [self._found(entry) for entry in answer["kernels"]]

    async def settle(self, kernel: KernelId) -> Ended:
        await self._call("settle", kernel=str(kernel))
        self._meter.forget(self.kernel_dir(kernel))
        ended = layout.read_main(self.kernel_dir(kernel))
        return ended or layout.lost(self._clock.now())

    async def remove(self, kernel: KernelId) -> None:
        await self._call("remove", kernel=str(kernel))
        self._meter.forget(self.kernel_dir(kernel))

    def kernel_dir(self, kernel: KernelId) -> str:
        return f"{self._kernels}/{kernel}"

    async def wait_change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def _found(self, entry: dict[str, Any]) -> Found:
        kernel = KernelId.parse(entry["kernel"])
        folder = self.kernel_dir(kernel)
        return Found(
            kernel=kernel,
            prepared=True,
            running=entry["running"],
            started_at=entry["started_at"],
            ended=layout.read_main(folder),
            execs=layout.execs(folder),
            enforced=self._enforced
            | {
                "disk": entry["scratch_enforced"],
                "runtime": entry["runtime"],
                "network": entry["network"],
            }
            | _policy(entry["policy"]),
            frozen=entry["frozen"],
        )

    # -- the link ----------------------------------------------------------------------------

    async def _call(self, op: str, **fields: Any) -> dict[str, Any]:
        """All requests are idempotent: one whose answer was lost is asked again."""
        deadline = self._clock.monotonic() + RECONNECT_S
        while True:
            link = await self._linked(deadline)
            try:
                async with asyncio.timeout(CALL_S):
                    return await link.request({"op": op, **fields})
            except _LinkLost as exc:
                self._check_patience(deadline, exc)
            except TimeoutError as exc:
                text = f"the launcher does not answer ({op}). Running sessions go on."
                raise LauncherUnavailable(text) from exc

    def _check_patience(self, deadline: float, cause: Exception) -> None:
        """A launcher that dies each time it is asked is not asked for ever."""
        if self._clock.monotonic() > deadline:
            raise LauncherUnavailable("the launcher dies before it answers.") from cause

    async def _linked(self, deadline: float) -> _Link:
        async with self._connecting:
            if self._link is None or self._link.closed:
                self._link = _Link(await self._connect(deadline), self._hint, self._lost.set)
                self._hint()
            return self._link

    async def _connect(self, deadline: float) -> socket.socket:
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return await layout.connect(self._socket_path)
            except OSError as exc:
                if self._clock.monotonic() + pause > deadline:
                    text = f"the launcher does not answer at {self._socket_path}: {exc.strerror}."
                    raise LauncherUnavailable(text) from exc
            await self._clock.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    async def _keep_link(self) -> None:
        """Hints arrive by the link: have one, always."""
        while True:
            self._lost.clear()
            with contextlib.suppress(LauncherUnavailable):
                await self._linked(self._clock.monotonic() + RECONNECT_S)
                await self._lost.wait()
                self._hint()

    def _hint(self) -> None:
        self._changed.set()


class _LinkLost(Exception):
    """The launcher went away before it answered."""


class _Link:
    """One connection to the launcher: many requests at once, and its hints."""

    def __init__(self, sock: socket.socket, hint: Any, lost: Any) -> None:
        self._sock = sock
        self._hint = hint
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._frames = Frames()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._sending = asyncio.Lock()
        self.closed = False
        self._loop.add_reader(sock, self._read)

    async def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer's ``ok``; raises the error that it holds, or _LinkLost."""
        number = next(self._numbers)
        data = frame({"id": number, **message})
        future = self._waiting[number] = self._loop.create_future()
        try:
            await self._send(data)
            answer = await future
        finally:
            self._waiting.pop(number, None)
            if future.done() and not future.cancelled():
                future.exception()  # Else asyncio complains of one that nobody asked for.
        return _opened(answer)

    async def _send(self, data: bytes) -> None:
        """Whole frames only: a caller that is cancelled inside of one would garble the rest."""
        async with self._sending:
            if self.closed:
                raise _LinkLost
            try:
                await self._loop.sock_sendall(self._sock, data)
            except OSError as exc:
                self.close()
                raise _LinkLost from exc
            except asyncio.CancelledError:
                self.close()
                raise

    def _read(self) -> None:
        try:
            data = self._sock.recv(256 * 1024)
            messages = self._frames.feed(data)
        except BlockingIOError:
            return
        except (OSError, PlatformError):
            self.close()
            return
        if not data:
            self.close()
        for message in messages:
            if "changed" in message:
                self._hint()
            elif (future := self._waiting.get(message.get("id", 0))) and not future.done():
                future.set_result(message)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._loop.remove_reader(self._sock)
            self._sock.close()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(_LinkLost())
            self._lost()


def _policy(label: str) -> dict[str, str]:
    return {"policy": label} if label else {}


def _opened(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        raise from_problem(answer["error"], answer["text"], answer.get("details", {}))
    found: dict[str, Any] = answer["ok"]
    return found


async def _receive_socket(link: socket.socket) -> socket.socket:
    """The descriptor that comes with the answer to ``files`` and ``changes``."""
    frames = Frames()
    async for data, fds in _pieces(link):
        found = [socket.socket(fileno=fd) for fd in fds]
        for message in frames.feed(data):
            if "id" not in message:
                continue
            _opened(message)
            if not found:
                raise RuntimeFailed("the launcher sent no socket.")
            found[0].setblocking(False)
            return found[0]
    raise _LinkLost


async def _pieces(link: socket.socket) -> AsyncIterator[tuple[bytes, list[int]]]:
    loop = asyncio.get_running_loop()
    while True:
        readable = asyncio.Event()
        loop.add_reader(link, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(link)
        try:
            data, fds, _flags, _peer = socket.recv_fds(link, 1 << 16, 4, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            continue
        if not data:
            return
        yield data, fds
