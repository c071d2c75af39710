"""A kernel on this machine that is another one at the server.

Messages pass through as they are: what is signed on the ZMQ side is the same bytes that travel in
the v1 form of the WebSocket. Replies find their asker by the request that they name.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import aiohttp
import zmq
import zmq.asyncio

from madang.jupyter.remote import Remote
from madang.wire.errors import ConfigInvalid, InvalidRequest

DELIMITER: Final = b"<IDS|MSG>"
MAX_ASKERS: Final = 2000
MAX_QUEUED: Final = 1000
"""Messages that wait while the server is away; then clients wait."""
MAX_PASSED: Final = 10_000
_JSON_PARTS: Final = 4
_CHANNELS: Final = ("shell", "control", "stdin")


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection file."""

    transport: str
    ip: str
    ports: Mapping[str, int]
    key: bytes
    digest: str
    curve: tuple[bytes, bytes] | None
    """Public and secret key, where clients encrypt."""

    def address(self, channel: str) -> str:
        between = "-" if self.transport == "ipc" else ":"
        return f"{self.transport}://{self.ip}{between}{self.ports[channel]}"

    def sign(self, parts: Sequence[bytes]) -> bytes:
        """Of header, parent header, metadata and content; empty without a key."""
        if not self.key:
            return b""
        signer = hmac.new(self.key, digestmod=self.digest)
        for part in parts:
            signer.update(part)
        return signer.hexdigest().encode()


def read_connection(path: str) -> Connection:
    """Raises ConfigInvalid."""
    try:
        with open(path, "rb") as file:
            found: dict[str, Any] = json.load(file)
        scheme, _, digest = found["signature_scheme"].partition("-")
        if scheme != "hmac" or digest not in hashlib.algorithms_guaranteed:
            raise ValueError(f"signature_scheme {found['signature_scheme']!r} is not known")
        secret = found.get("curve_secretkey")
        return Connection(
            transport=found["transport"],
            ip=found["ip"],
            ports={name: int(found[f"{name}_port"]) for name in (*_CHANNELS, "iopub", "hb")},
            key=found["key"].encode(),
            digest=digest,
            curve=(found["curve_publickey"].encode(), secret.encode()) if secret else None,
        )
    except (OSError, ValueError, KeyError, AttributeError) as exc:
        raise ConfigInvalid(f"{path} is no connection file of Jupyter: {exc!r}.") from exc


class Bridge:
    """Serves one connection file until the kernel ends, is shut down, or ``stop`` is called."""

    def __init__(self, connection: Connection, remote: Remote, kernel: str) -> None:
        self._connection: Final = connection
        self._remote: Final = remote
        self._kernel: Final = kernel
        self._context: Final = zmq.asyncio.Context()
        self._sockets: Final[dict[str, zmq.asyncio.Socket]] = {}
        self._out: Final[asyncio.Queue[bytes]] = asyncio.Queue(MAX_QUEUED)
        self._askers: Final[OrderedDict[str, list[bytes]]] = OrderedDict()
        self._passed: Final[OrderedDict[str, None]] = OrderedDict()
        self._over: Final = asyncio.Event()
        self._client: Final = os.urandom(16).hex()

    def stop(self) -> None:
        self._over.set()

    async def run(self) -> None:
        try:
            for channel in (*_CHANNELS, "iopub", "hb"):
                self._open(channel)
            work = [*map(self._from_local, _CHANNELS), self._beat(), self._exchange()]
            tasks = [asyncio.ensure_future(each) for each in (*work, self._over.wait())]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self._context.destroy(linger=1000)

    def _open(self, channel: str) -> None:
        kinds = {"iopub": zmq.PUB, "hb": zmq.REP}
        socket = self._context.socket(kinds.get(channel, zmq.ROUTER))
        socket.linger = 1000
        if channel in _CHANNELS:
            socket.router_handover = 1
        if self._connection.curve is not None:
            socket.curve_publickey, socket.curve_secretkey = self._connection.curve
            socket.curve_server = True
        socket.bind(self._connection.address(channel))
        self._sockets[channel] = socket

    async def _beat(self) -> None:
        socket = self._sockets["hb"]
        while True:
            await socket.send(await socket.recv())

    # From the frontend

    async def _from_local(self, channel: str) -> None:
        socket = self._sockets[channel]
        while True:
            frames = await socket.recv_multipart()
            if (taken := self._take(frames)) is None:
                continue
            askers, parts = taken
            header = _object(parts[0])
            self._askers[str(header.get("msg_id"))] = askers
            while len(self._askers) > MAX_ASKERS:
                self._askers.popitem(last=False)
            await self._out.put(pack([channel.encode(), *parts]))

    def _take(self, frames: list[bytes]) -> tuple[list[bytes], list[bytes]] | None:
        """Who asks and what; None for what has no right signature."""
        if DELIMITER not in frames:
            return None
        at = frames.index(DELIMITER)
        signature, *parts = frames[at + 1 :] or [b""]
        if len(parts) < _JSON_PARTS:
            return None
        right = self._connection.sign(parts[:_JSON_PARTS])
        return (frames[:at], parts) if hmac.compare_digest(signature, right) else None

    # From the server

    async def _exchange(self) -> None:
        """Until the kernel has ended for good."""
        async for socket in self._remote.connect(self._kernel, self._client):
            sending = asyncio.ensure_future(self._to_remote(socket))
            try:
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.BINARY and await self._to_local(
                        message.data
                    ):
                        return
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _to_remote(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            await socket.send_bytes(await self._out.get())

    async def _to_local(self, data: bytes) -> bool:
        """Pass a message on; whether it was the kernel's last."""
        name, *parts = unpack(data)
        channel, signature = name.decode(), self._connection.sign(parts[:_JSON_PARTS])
        header, parent, _, content = map(_object, parts[:_JSON_PARTS])
        kind = header.get("msg_type")
        if self._came_before(str(header.get("msg_id"))):
            return False
        if channel == "iopub":
            to = [f"kernel.{self._kernel}.{kind}".encode()]
        else:
            to = self._askers.get(str(parent.get("msg_id")), [])
        if channel in self._sockets and to:
            await self._sockets[channel].send_multipart([*to, DELIMITER, signature, *parts])
        return kind == "shutdown_reply" or content.get("execution_state") == "dead"

    def _came_before(self, message: str) -> bool:
        """A server that has just begun tells some things twice."""
        known = message in self._passed
        self._passed[message] = None
        while len(self._passed) > MAX_PASSED:
            self._passed.popitem(last=False)
        return known


def pack(parts: Sequence[bytes]) -> bytes:
    """The v1 form: number of offsets, offsets, parts; all numbers u64 LE."""
    offsets = [8 * (len(parts) + 2)]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    return struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(parts)


def unpack(data: bytes) -> list[bytes]:
    """Channel, header, parent header, metadata, content, buffers. Raises InvalidRequest."""
    try:
        (count,) = struct.unpack_from("<Q", data)
        offsets = struct.unpack_from(f"<{count}Q", data, 8)
    except (struct.error, OverflowError, MemoryError) as exc:
        raise InvalidRequest("the server sent what is no message of Jupyter's.") from exc
    parts = [data[a:b] for a, b in pairwise(offsets)]
    if len(parts) <= _JSON_PARTS:
        raise InvalidRequest("the server sent a message that lacks parts.")
    return parts


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
