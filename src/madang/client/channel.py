"""A WebSocket over a plain blocking program's socket: bytes move only inside ``pump``."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import deque
from collections.abc import Iterable
from typing import Final, Self

from madang.client import calls
from madang.client import websocket as ws
from madang.client.address import Address
from madang.wire.errors import PlatformError, ServerUnreachable

CONNECT_S: Final = 5.0
SILENCE_S: Final = 20.0
"""After this long without a byte from the server we ask whether it is there (ping)."""
DEAD_S: Final = 60.0
_READ_SIZE: Final = 256 * 1024
_READS: Final = 16
"""Reads in one go, so that a fast program does not keep the caller from its other duties."""


def unreachable(address: Address, error: BaseException) -> ServerUnreachable:
    """A connection's failure in our words."""
    refused = isinstance(error, ConnectionRefusedError | socket.gaierror)
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = (
        f"no server answers at {address} ({why}). Start one with `madang up`, or choose another "
        "with `madang login URL`."
    )
    return ServerUnreachable(text, refused=refused)


def lost(address: Address, error: BaseException) -> ServerUnreachable:
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ServerUnreachable(f"the connection to {address} was lost ({why}).")


def connect(address: Address) -> socket.socket:
    """A connected socket, with TLS if the address asks for it. Raises ServerUnreachable."""
    try:
        plain = socket.create_connection((address.host, address.port), CONNECT_S)
    except OSError as exc:
        raise unreachable(address, exc) from exc
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not address.secure:
        return plain
    import ssl  # 15 ms, and rarely needed

    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=address.host)
    except OSError as exc:
        plain.close()
        raise unreachable(address, exc) from exc


class Channel:
    """One WebSocket. ``pump`` moves bytes; ``messages`` holds what came; ``send`` never blocks."""

    def __init__(self, sock: socket.socket, address: Address) -> None:
        self._sock = sock
        self._address = address
        self._decoder = ws.Decoder()
        self._out = bytearray()
        self._heard = self._asked = time.monotonic()
        self.messages: deque[bytes | str] = deque()
        self.closed = False

    @classmethod
    def open(cls, address: Address, path: str, headers: dict[str, str]) -> Channel:
        """Connect and shake hands. Raises ServerUnreachable or the error of the server's answer."""
        sock = connect(address)
        try:
            channel = cls(sock, address)
            channel._shake_hands(path, headers)
            sock.setblocking(False)
        except (OSError, ws.ProtocolError) as exc:
            sock.close()
            raise lost(address, exc) from exc
        except BaseException:
            sock.close()
            raise
        return channel

    def _shake_hands(self, path: str, headers: dict[str, str]) -> None:
        key = ws.new_key()
        whole_path = self._address.prefix + path
        self._sock.sendall(ws.request_head(whole_path, self._address.netloc, key, headers))
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._read_head_part(data)
        head, _, rest = data.partition(b"\r\n\r\n")
        status, answer = ws.parse_head(head)
        if status >= 400:
            raise self._refusal(path, status, answer, rest)
        ws.check_accept(status, answer, key)
        self._receive(rest)

    def _read_head_part(self, so_far: bytes) -> bytes:
        data = self._sock.recv(_READ_SIZE)
        if not data:
            raise ConnectionResetError("closed while shaking hands")
        if len(so_far) > ws.MAX_HEAD:
            raise ws.ProtocolError("the answer's head is too long")
        return data

    def _refusal(
        self, path: str, status: int, headers: dict[str, str], body: bytes
    ) -> PlatformError:
        size = min(int(headers.get("content-length", "0") or 0), ws.MAX_HEAD)
        while len(body) < size and (data := self._sock.recv(_READ_SIZE)):
            body += data
        call = calls.Call(method="GET", path=path, decode=bytes)
        return calls.failure(status, body, call)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes, *, text: bool) -> None:
        """Queue one message; sent by this or the next ``pump``."""
        if not self.closed:
            self._out += ws.encode(ws.TEXT if text else ws.BINARY, data)

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent."""
        return len(self._out)

    def pump(self, watch: Iterable[int] = (), timeout_s: float | None = None) -> set[int]:
        """Send and receive what is possible; wait for the server, a descriptor of *watch* or
        *timeout_s*. Returns those of *watch* that can be read. Raises ServerUnreachable once the
        connection is lost; after a proper close ``closed`` is true.
        """
        if self.closed:
            return set()
        try:
            return self._pump(watch, timeout_s)
        except (OSError, ws.ProtocolError) as exc:
            self.abandon()
            raise lost(self._address, exc) from exc

    def _pump(self, watch: Iterable[int], timeout_s: float | None) -> set[int]:
        self._flush()
        poller = select.poll()
        mine = self._sock.fileno()
        poller.register(mine, select.POLLIN | (select.POLLOUT if self._out else 0))
        for fd in watch:
            poller.register(fd, select.POLLIN)
        wait_s = 0.0 if self.messages or self._pending() else self._patience(timeout_s)
        ready = dict(poller.poll(wait_s * 1000))
        if mine in ready or self._pending():
            self._read()
        self._flush()
        self._check_alive()
        return set(ready) - {mine}

    def _pending(self) -> int:
        pending = getattr(self._sock, "pending", None)
        return pending() if pending is not None else 0

    def _patience(self, timeout_s: float | None) -> float:
        until_ping = max(0.1, SILENCE_S - (time.monotonic() - max(self._heard, self._asked)))
        return until_ping if timeout_s is None else min(timeout_s, until_ping)

    def _check_alive(self) -> None:
        now = time.monotonic()
        if now - self._heard > DEAD_S:
            raise TimeoutError(f"nothing heard for {DEAD_S:.0f} s")
        if now - max(self._heard, self._asked) >= SILENCE_S and not self.closed:
            self._asked = now
            self._out += ws.encode(ws.PING, b"")

    def _flush(self) -> None:
        while self._out:
            try:
                sent = self._sock.send(memoryview(self._out)[:_READ_SIZE])
            except OSError as exc:
                if _would_block(exc):
                    return
                raise
            del self._out[:sent]

    def _read(self) -> None:
        for _ in range(_READS):
            try:
                data = self._sock.recv(_READ_SIZE)
            except OSError as exc:
                if _would_block(exc):
                    return
                raise
            if not data:
                raise ConnectionResetError("closed by the server")
            self._receive(data)
            if self.closed:
                return

    def _receive(self, data: bytes) -> None:
        self._heard = time.monotonic()
        for opcode, payload in self._decoder.feed(data):
            if opcode == ws.TEXT:
                self.messages.append(payload.decode("utf-8", "replace"))
            elif opcode == ws.BINARY:
                self.messages.append(payload)
            elif opcode == ws.PING:
                self._out += ws.encode(ws.PONG, payload)
            elif opcode == ws.CLOSE:
                self._out += ws.encode(ws.CLOSE, payload[:2])
                self._flush()
                self.abandon()

    def close(self) -> None:
        """Say good-bye if that is possible at once; idempotent."""
        if not self.closed:
            self._out += ws.encode(ws.CLOSE, (1000).to_bytes(2))
            with contextlib.suppress(OSError):
                self._flush()
            self.abandon()

    def abandon(self) -> None:
        """Close the socket without a word."""
        self.closed = True
        self._out.clear()
        self._sock.close()


def _would_block(error: OSError) -> bool:
    """Also of TLS, whose errors are no BlockingIOError (and whose module may not be loaded)."""
    return isinstance(error, BlockingIOError) or type(error).__name__ in {
        "SSLWantReadError",
        "SSLWantWriteError",
    }
