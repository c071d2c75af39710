"""The agent's side of ``keeper.sock``; see ``launcher.keeper`` for the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import struct
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from madang.kit.codec import from_json
from madang.wire.errors import InvalidRequest, SessionNotRunning, from_problem
from madang.wire.link import Resize, Signal, StdinEnd

SOCKET: Final = "keeper.sock"
_FRAME: Final = struct.Struct("<BI")
_DATA, _END, _RESIZE, _SIGNAL = range(4)
_PART: Final = 64 * 1024
_SUN_PATH: Final = 100
_PATIENCE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class KeeperNews:
    """One message to a watcher."""

    end: int | None = None
    """Offset after the last record."""
    refusals: int | None = None
    """Grows whenever its sandbox policy has refused something (see ``agent.refusals``)."""
    stopping: bool = False
    """It is to end, for a stop or its time limit; what is frozen can't."""
    ended: bool = False
    """The program has ended and ``ended.json`` is written."""


@dataclass(frozen=True, slots=True)
class _Answer:
    ok: bool = False
    error: str = ""
    text: str = ""


class StdinWriter(Protocol):
    async def write(self, item: bytes | Resize | Signal | StdinEnd) -> None:
        """Waits until the program takes more; raises SessionNotRunning when it has ended."""
        ...

    async def close(self) -> None: ...


class Keepers(Protocol):
    """Ways to a keeper, which is named by its ``io`` folder.

    All but ``watch`` raise SessionNotRunning when no keeper answers there, and what it refuses.
    """

    def watch(self, folder: str) -> AsyncGenerator[KeeperNews, None]:
        """News until the keeper goes; ends at once where there is none. To be closed."""
        ...

    async def stop(self, folder: str, *, reason: str, text: str, grace_s: float) -> None:
        """SIGTERM, the grace, SIGKILL; the keeper tells *reason* and *text* as the end's."""
        ...

    async def signal(self, folder: str, number: int) -> None: ...

    async def stdin(self, folder: str) -> StdinWriter: ...


class SocketKeepers:
    """Real keepers."""

    async def watch(self, folder: str) -> AsyncGenerator[KeeperNews, None]:
        try:
            reader, writer = await _open(folder, {"op": "watch"})
        except SessionNotRunning:
            return
        try:
            while line := await reader.readline():
                yield from_json(KeeperNews, line)
        except (ConnectionError, ValueError, InvalidRequest):
            return  # who talks like this keeps nothing
        finally:
            await _close(writer)

    async def stop(self, folder: str, *, reason: str, text: str, grace_s: float) -> None:
        await _tell(folder, {"op": "stop", "reason": reason, "text": text, "grace_s": grace_s})

    async def signal(self, folder: str, number: int) -> None:
        await _tell(folder, {"op": "signal", "signal": number})

    async def stdin(self, folder: str) -> StdinWriter:
        _, writer = await _open(folder, {"op": "stdin"})
        return _SocketStdin(writer)


class _SocketStdin:
    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        writer.transport.set_write_buffer_limits(high=2 * _PART)

    async def write(self, item: bytes | Resize | Signal | StdinEnd) -> None:
        try:
            if isinstance(item, bytes):
                for at in range(0, len(item), _PART):
                    await self._frame(_DATA, item[at : at + _PART])
            elif isinstance(item, Resize):
                await self._frame(_RESIZE, struct.pack("<HH", item.rows, item.cols))
            elif isinstance(item, Signal):
                await self._frame(_SIGNAL, struct.pack("<B", item.signal))
            else:
                await self._frame(_END, b"")
        except (ConnectionError, OSError) as exc:
            raise SessionNotRunning("the program has ended and takes no more input.") from exc

    async def _frame(self, kind: int, payload: bytes) -> None:
        self._writer.write(_FRAME.pack(kind, len(payload)) + payload)
        await self._writer.drain()

    async def close(self) -> None:
        await _close(self._writer)


async def _tell(folder: str, message: dict[str, object]) -> None:
    """One request and its answer."""
    reader, writer = await _open(folder, message)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            line = await reader.readline()
        answer = from_json(_Answer, line or b"{}")
    except (OSError, ValueError, InvalidRequest) as exc:  # TimeoutError is an OSError
        raise SessionNotRunning("the program's keeper does not answer.") from exc
    finally:
        await _close(writer)
    if answer.error:
        raise from_problem(answer.error, answer.text, {})
    if not answer.ok:
        raise SessionNotRunning("the program has just ended.")


async def _open(
    folder: str, message: dict[str, object]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    try:
        sock = await _connect(folder)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as exc:
        raise SessionNotRunning("the program does not run (any more).") from exc
    try:
        reader, writer = await asyncio.open_unix_connection(sock=sock)
    except BaseException:
        sock.close()
        raise
    writer.write(json.dumps(message).encode() + b"\n")
    return reader, writer


async def _connect(folder: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    deadline = asyncio.get_running_loop().time() + _PATIENCE_S
    try:
        with _short(folder) as path:
            while True:
                try:
                    sock.connect(path)
                    return sock
                except BlockingIOError:  # its queue is full: asyncio would take it for connected
                    if asyncio.get_running_loop().time() > deadline:
                        raise ConnectionRefusedError(errno.ECONNREFUSED, path) from None
                    await asyncio.sleep(0.01)
    except BaseException:
        sock.close()
        raise


@contextlib.contextmanager
def _short(folder: str) -> Iterator[str]:
    """The socket's path, however deep the state folder lies (``sun_path`` has 108 bytes)."""
    path = os.path.join(folder, SOCKET)
    if len(os.fsencode(path)) <= _SUN_PATH:
        yield path
        return
    handle = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{handle}/{SOCKET}"
    finally:
        os.close(handle)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
