"""HTTP for the sync client: ``http.client``, kept-alive connections, retries."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar

from madang.client import calls
from madang.client.address import Address
from madang.client.calls import Call
from madang.client.channel import CONNECT_S, Channel, lost, unreachable
from madang.client.proof import Proof, headers, sent_body
from madang.client.retry import Retries
from madang.wire.errors import PlatformError, RateLimited

if TYPE_CHECKING:  # 30 ms to import: only when a plain request is made
    from http.client import HTTPConnection, HTTPResponse

T = TypeVar("T")

PATIENCE_S: Final = 30.0
"""How long a lost server is waited for."""
_READ_SIZE: Final = 256 * 1024
_IDLE_KEPT: Final = 4


class Transport:
    def __init__(self, address: Address, proof: Proof, patience_s: float) -> None:
        self.address = address
        self.patience_s = patience_s
        self.answered = False
        """Whether the server answered at least once: then a refusal means that it restarts."""
        self._proof = proof
        self._idle: list[HTTPConnection] = []

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _headers(self, call: Call[Any]) -> dict[str, str]:
        """As signed: with a port, always."""
        shown = headers(self._proof, self.address, call.method, call.path, call.body)
        return {"Host": self.address.netloc, **shown, **call.headers}

    def retries(self, *, repeatable: bool = True) -> Retries:
        return Retries(self.patience_s, repeatable=repeatable, answered=self.answered)

    def repeat(self, do: Callable[[], T], *, repeatable: bool = True) -> T:
        """Do it, again after failures that pass."""
        retries = self.retries(repeatable=repeatable)
        while True:
            try:
                return do()
            except PlatformError as exc:
                pause = retries.pause_s(exc)
                if pause is None:
                    raise
                time.sleep(pause)

    def call(self, call: Call[T]) -> T:
        """Send, read the whole answer, decode it."""

        def once() -> bytes:
            with self._exchange(call) as response:
                return b"".join(_read_all(response))

        return call.decode(self.repeat(lambda: self._guard(once), repeatable=call.repeatable))

    @contextlib.contextmanager
    def stream(self, call: Call[Any]) -> Iterator[Iterator[bytes]]:
        """The answer's body as it comes; a lost connection raises ServerUnreachable."""
        with contextlib.ExitStack() as stack:
            response = self.repeat(
                lambda: self._guard(lambda: stack.enter_context(self._exchange(call)))
            )
            yield self._chunks(response)

    def channel(self, path: str) -> Channel:
        """A WebSocket, shaken hands. Not repeated here: see ``sync.Stream``."""
        channel = Channel.open(self.address, path, headers(self._proof, self.address, "GET", path))
        self.answered = True
        return channel

    def _chunks(self, response: HTTPResponse) -> Iterator[bytes]:
        chunks = _read_all(response)
        while True:
            try:
                chunk = next(chunks)
            except StopIteration:
                return
            except Exception as exc:
                raise self._ours(exc) from exc
            yield chunk

    def _guard(self, do: Callable[[], T]) -> T:
        try:
            return do()
        except Exception as exc:
            raise self._ours(exc) from exc

    def _ours(self, error: Exception) -> Exception:
        """A failure of the connection in our words; anything else as it is."""
        from http.client import HTTPException

        if isinstance(error, OSError | HTTPException):
            return lost(self.address, error)
        return error

    @contextlib.contextmanager
    def _exchange(self, call: Call[Any]) -> Iterator[HTTPResponse]:
        """Send *call*; the connection is kept for the next one if its answer was read."""
        connection, response = self._ask(call)
        try:
            self.answered = True
            if response.status >= 400:
                raise _failure(response, call)
            yield response
        except BaseException:
            connection.close()
            raise
        if response.isclosed() and not response.will_close and len(self._idle) < _IDLE_KEPT:
            self._idle.append(connection)
        else:
            connection.close()

    def _ask(self, call: Call[Any]) -> tuple[HTTPConnection, HTTPResponse]:
        """Send over an idle connection (only what may be sent twice), else over a new one."""
        if self._idle and call.repeatable and not callable(call.body):
            idle = self._idle.pop()
            with contextlib.suppress(OSError):  # idle for too long: the server let go of it
                return idle, self._send(idle, call)
        connection = self._connect()
        return connection, self._send(connection, call)

    def _connect(self) -> HTTPConnection:
        from http.client import HTTPConnection, HTTPSConnection

        kind = HTTPSConnection if self.address.secure else HTTPConnection
        connection = kind(self.address.host, self.address.port, timeout=CONNECT_S)
        try:
            connection.connect()
        except OSError as exc:
            raise unreachable(self.address, exc) from exc
        return connection

    def _send(self, connection: HTTPConnection, call: Call[Any]) -> HTTPResponse:
        try:
            connection.sock.settimeout(call.timeout_s)
            path = self.address.prefix + call.path
            sent, body = self._headers(call), sent_body(call.method, call.body)
            if callable(body):
                sent["Transfer-Encoding"] = "chunked"
                _upload(connection, call.method, path, body(), sent)
            else:
                with_body = body or (b"" if call.method in {"POST", "PUT", "PATCH"} else None)
                connection.request(call.method, path, with_body, sent)
            return connection.getresponse()
        except BaseException:
            connection.close()
            raise


def _upload(
    connection: HTTPConnection,
    method: str,
    path: str,
    body: Iterable[bytes],
    headers: dict[str, str],
) -> None:
    """Send a streamed body; a server that refuses early has its answer read, not cut off."""
    try:
        connection.request(method, path, body, headers, encode_chunked=True)
    except (BrokenPipeError, ConnectionResetError):
        connection.sock.settimeout(CONNECT_S)


def _read_all(response: HTTPResponse) -> Iterator[bytes]:
    while data := response.read1(_READ_SIZE):
        yield data
    if response.length:  # http.client is silent about a body that is cut short
        raise ConnectionResetError(f"{response.length} bytes of the answer are missing")


def _failure(response: HTTPResponse, call: Call[Any]) -> PlatformError:
    error = calls.failure(response.status, response.read(), call)
    if isinstance(error, RateLimited):
        with contextlib.suppress(ValueError):
            error.details["retry_after_s"] = float(response.headers.get("Retry-After", "1"))
    return error
