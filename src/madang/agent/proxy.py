"""The way from a build session to package indexes: a forward proxy on a Unix socket.

CONNECT (for TLS) and absolute-form ``http`` GET and HEAD, nothing else. The proxy resolves names
itself and connects to the very address that it has checked: loopback, private, link-local,
multicast and other special addresses are refused, and the machine's own, so that a build reaches
neither the machine nor its network. Exempt are the hosts that the operator named as indexes.
``GET /build`` answers with the build's orders (see ``agent.build``), ``GET /layer/DIGEST`` with the
tar of a layer that it may read.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import BinaryIO, Final, cast
from urllib.parse import urlsplit

from madang.agent.buildscript import rootlayer
from madang.agent.registry import Upstream
from madang.wire.size import GIB

MAX_HEAD: Final = 32 * 1024
CHUNK: Final = 64 * 1024
LAYER: Final = "/layer/"
LAYER_CHUNK: Final = 256 * 1024
PUBLIC_PORTS: Final = frozenset({80, 443})


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """What a build may reach."""

    hosts: frozenset[tuple[str, int]] = frozenset()
    """Name and port of the indexes; reachable wherever they are."""
    connections: int = 128
    """At once; more are closed unread. uv opens 50 to an index."""
    bytes: int = 64 * GIB
    """In all, both directions."""
    upstream: Upstream | None = None
    """The site's own proxy. It resolves names itself, so that behind it only *hosts* are served."""
    connect_s: float = 20.0
    idle_s: float = 120.0
    """Without a byte in either direction until a connection is closed."""


class Refused(Exception):
    """The answer to a request that is not served."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(slots=True)
class _Request:
    method: str
    target: str
    headers: list[bytes] = field(default_factory=list)


class Proxy:
    """One build's."""

    def __init__(
        self,
        path: str,
        orders: bytes,
        settings: ProxySettings,
        *,
        layers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """*layers*: folders of those that the build may read, by digest."""
        self._path: Final = path
        self._layers: Final = layers
        self._orders: Final = orders
        self._settings: Final = settings
        self._left = settings.bytes
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen; a socket left by an earlier agent is replaced."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        folder = os.open(os.path.dirname(self._path), os.O_PATH | os.O_DIRECTORY)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            # Through the descriptor: a socket's path may have 107 bytes only.
            listener.bind(f"/proc/self/fd/{folder}/{os.path.basename(self._path)}")
        finally:
            os.close(folder)
        os.chmod(self._path, 0o666)  # noqa: S103 - the session has another uid, the folder is its own
        self._server = await asyncio.start_unix_server(self._accept, sock=listener, limit=MAX_HEAD)

    async def close(self) -> None:
        """Cut all connections."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= self._settings.connections:
            writer.close()  # unread: the descriptors are the server's, no build may use them up
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            pass  # either end went away: theirs to notice
        except asyncio.CancelledError:
            if self._server is not None:
                raise
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._settings.connect_s):
                request = await _read_head(reader)
            if (request.method, request.target) == ("GET", "/build"):
                writer.write(_answer("200 OK", self._orders))
            elif request.method == "GET" and request.target.startswith(LAYER):
                await self._layer(request.target.removeprefix(LAYER), writer)
            elif request.method == "CONNECT":
                await self._tunnel(request, reader, writer)
            elif request.method in {"GET", "HEAD"}:
                await self._fetch(request, writer)
            else:
                raise Refused("405 Method Not Allowed", f"{request.method} is not served")
        except Refused as exc:
            writer.write(_answer(exc.status, f"madang: {exc}\n".encode()))
        await writer.drain()

    async def _layer(self, digest: str, writer: asyncio.StreamWriter) -> None:
        """Its tar, until the connection closes; one that breaks off is not whole."""
        folder = self._layers.get(digest)
        if folder is None or not os.path.isdir(folder):
            raise Refused("404 Not Found", "this build is offered no such layer")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        ours, theirs = socket.socketpair()
        reader, pipe = await asyncio.open_connection(sock=ours)
        packed = asyncio.create_task(asyncio.to_thread(_pack, folder, theirs))
        try:
            while data := await reader.read(LAYER_CHUNK):
                writer.write(b"%x\r\n%b\r\n" % (len(data), data))
                await writer.drain()
            await packed
            writer.write(b"0\r\n\r\n")
        finally:
            pipe.close()  # the thread ends by it
            await asyncio.gather(packed, return_exceptions=True)

    async def _tunnel(
        self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        host, port = _split(request.target, None)
        far_reader, far_writer = await self._connect(host, port)
        try:
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            async with self._idle() as limit, asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer, limit))
                group.create_task(self._pump(far_reader, writer, limit))
        except* (OSError, TimeoutError):
            pass
        finally:
            far_writer.close()

    async def _fetch(self, request: _Request, writer: asyncio.StreamWriter) -> None:
        url = urlsplit(request.target)
        if url.scheme != "http" or not url.netloc:
            raise Refused("400 Bad Request", "only absolute http:// addresses and CONNECT")
        host, port = _split(url.netloc.rpartition("@")[2], 80)
        far_reader, far_writer = await self._connect(host, port)
        try:
            path = url.path or "/"
            target = f"{path}?{url.query}" if url.query else path
            lines = [f"{request.method} {target} HTTP/1.1".encode(), b"Connection: close"]
            lines += [h for h in request.headers if not _is_hop(h)]
            far_writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
            async with self._idle() as limit:
                await self._pump(far_reader, writer, limit)
        finally:
            far_writer.close()

    async def _connect(
        self, host: str, port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        named = (host, port) in self._settings.hosts
        if not named and port not in PUBLIC_PORTS:
            raise Refused("403 Forbidden", f"port {port} of {host} is not served")
        upstream = self._settings.upstream
        try:
            async with asyncio.timeout(self._settings.connect_s):
                if upstream is not None and upstream.serves(host):
                    if not named:
                        raise Refused(
                            "403 Forbidden",
                            f"{host} is no index that was set up; behind a site's proxy name the "
                            "index and the host of its files (UV_DEFAULT_INDEX, UV_INDEX)",
                        )
                    return await _connect_through(upstream, host, port)
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                addresses = [str(info[4][0]) for info in found]
                allowed = [a for a in addresses if named or (is_public(a) and not is_ours(a))]
                if not allowed:
                    text = f"{host} is an address of this machine or its network, and no index"
                    raise Refused("403 Forbidden", text)
                return await self._first(allowed, port)
        except (OSError, UnicodeError, TimeoutError) as exc:
            raise Refused("502 Bad Gateway", f"{host}: {str(exc) or 'no answer'}") from exc

    async def _first(
        self, addresses: list[str], port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the first address that answers."""
        for last in addresses[:-1]:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(self._settings.connect_s / 4):
                    return await asyncio.open_connection(last, port)
        return await asyncio.open_connection(addresses[-1], port)

    def _idle(self) -> asyncio.Timeout:
        return asyncio.timeout(self._settings.idle_s)

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, limit: asyncio.Timeout
    ) -> None:
        clock = asyncio.get_running_loop().time
        while data := await source.read(CHUNK):
            limit.reschedule(clock() + self._settings.idle_s)
            self._left -= len(data)
            if self._left < 0:
                raise ConnectionAbortedError("the build's transfer limit is reached")
            target.write(data)
            await target.drain()
        if target.can_write_eof():
            target.write_eof()


def _pack(folder: str, target: socket.socket) -> None:
    with target, target.makefile("wb", buffering=LAYER_CHUNK) as file:
        rootlayer.write(folder, cast(BinaryIO, file))


async def _connect_through(
    upstream: Upstream, host: str, port: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A tunnel of the site's proxy."""
    reader, writer = await asyncio.open_connection(upstream.host, upstream.port, limit=MAX_HEAD)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if upstream.authorization is not None:
        lines.append(f"Proxy-Authorization: {upstream.authorization.reveal()}")
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        if answer.split(b" ", 2)[1:2] != [b"200"]:
            status = answer.split(b"\r\n")[0].decode("ascii", "replace")
            raise OSError(f"the site's proxy answers {status!r}")
    except asyncio.IncompleteReadError as exc:
        writer.close()
        raise OSError("the site's proxy hangs up") from exc
    except BaseException:
        writer.close()
        raise
    return reader, writer


async def _read_head(reader: asyncio.StreamReader) -> _Request:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *headers = head[:-4].split(b"\r\n")
        method, target, version = first.decode("ascii").split(" ")
    except (asyncio.LimitOverrunError, ValueError) as exc:
        raise Refused("400 Bad Request", "this is no HTTP request to a proxy") from exc
    if not version.startswith("HTTP/1."):
        raise Refused("505 HTTP Version Not Supported", "HTTP/1.1 only")
    return _Request(method, target, headers)


def _split(netloc: str, default: int | None) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port``."""
    try:
        url = urlsplit(f"//{netloc}")
        host, port = (url.hostname or "").rstrip("."), url.port or default
    except ValueError:
        host, port = "", None
    if not host or port is None:
        raise Refused("400 Bad Request", f"{netloc!r} is no host and port")
    return host, port


def _is_hop(header: bytes) -> bool:
    name = header.split(b":", 1)[0].strip().lower()
    return name.startswith(b"proxy-") or name in {b"connection", b"keep-alive", b"upgrade", b"te"}


def _answer(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


_NOBODYS: Final = tuple(
    ipaddress.ip_network(text)
    for text in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")
)
"""Set aside for documentation (RFC 5737, RFC 3849). Sites that redirect the way out use them; no
machine of a site's own network has such an address."""

_GLOBAL_UNICAST: Final = ipaddress.ip_network("2000::/3")


def is_ours(address: str) -> bool:
    """Whether an address is this machine's own; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return False  # No way there.
        found: str = probe.getsockname()[0]
    return ipaddress.ip_address(found) == ipaddress.ip_address(address)


def is_public(address: str) -> bool:
    """Whether an address is one of the whole internet's, also when wrapped in IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip not in _GLOBAL_UNICAST:  # Others embed IPv4 addresses too, or are a site's own.
            return False
    return (ip.is_global or any(ip in net for net in _NOBODYS)) and not ip.is_multicast
