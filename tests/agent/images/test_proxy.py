"""The way out of a build: what it serves, what it refuses, what bounds it."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.agent.proxy import Proxy, ProxySettings, is_public
from madang.agent.registry import Upstream
from madang.kit.secret import Secret
from madang.testing.patience import PATIENCE_S

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def _serving(handler: Handler) -> AsyncIterator[int]:
    """A server on the loopback, as a private package index would be."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@contextlib.asynccontextmanager
async def _proxy(tmp_path: Path, **settings: object) -> AsyncIterator[Proxy]:
    proxy = Proxy(str(tmp_path / "proxy.sock"), b'{"a": 1}', ProxySettings(**settings))  # type: ignore[arg-type]
    await proxy.open()
    try:
        yield proxy
    finally:
        await proxy.close()


@contextlib.asynccontextmanager
async def _client(tmp_path: Path) -> AsyncGenerator[Streams, None]:
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "proxy.sock"))
    try:
        yield reader, writer
    finally:
        writer.close()


async def _ask(tmp_path: Path, request: bytes) -> bytes:
    async with _client(tmp_path) as (reader, writer):
        writer.write(request)
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read()


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def test_a_build_gets_its_orders(tmp_path: Path) -> None:
    async with _proxy(tmp_path):
        answer = await _ask(tmp_path, b"GET /build HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b'\r\n\r\n{"a": 1}')


async def test_a_tunnel_to_a_named_index_carries_bytes_both_ways(tmp_path: Path) -> None:
    async with (
        _serving(_echo) as port,
        _proxy(tmp_path, hosts=frozenset({("localhost", port)})),
        _client(tmp_path) as (reader, writer),
    ):
        writer.write(f"CONNECT localhost:{port} HTTP/1.1\r\n\r\n".encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        data = os.urandom(300_000)
        writer.write(data)
        writer.write_eof()
        assert await reader.read(-1) == data


async def test_plain_http_is_fetched_without_the_proxys_headers(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + head)
        await writer.drain()

    async with _serving(answer) as port, _proxy(tmp_path, hosts=frozenset({("localhost", port)})):
        request = (
            f"GET http://localhost:{port}/simple/?a=b HTTP/1.1\r\nHost: localhost\r\n"
            "Proxy-Authorization: x\r\nAccept: */*\r\n\r\n"
        )
        got = await _ask(tmp_path, request.encode())

    assert b"GET /simple/?a=b HTTP/1.1\r\n" in got
    assert b"Accept: */*" in got
    assert b"Proxy-Authorization" not in got


@contextlib.asynccontextmanager
async def _site_proxy(asked: list[bytes], status: bytes = b"200 OK") -> AsyncIterator[Upstream]:
    """A site's proxy that connects to nothing but echoes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 " + status + b"\r\n\r\n")
        await _echo(reader, writer)

    async with _serving(handle) as port:
        yield Upstream(
            host="localhost",
            port=port,
            authorization=Secret("Basic abc"),
            direct=(".near.example",),
        )


async def test_a_site_may_reach_its_index_through_a_proxy_of_its_own(tmp_path: Path) -> None:
    asked: list[bytes] = []
    async with (
        _site_proxy(asked) as upstream,
        _proxy(tmp_path, hosts=frozenset({("index.example", 443)}), upstream=upstream),
    ):
        async with _client(tmp_path) as (reader, writer):
            writer.write(b"CONNECT index.example:443 HTTP/1.1\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
        for other in ("elsewhere.example", "127.0.0.1", "near.example"):
            answer = await _ask(tmp_path, f"CONNECT {other}:443 HTTP/1.1\r\n\r\n".encode())
            assert answer.split()[1] in {b"403", b"502"}
    assert len(asked) == 1
    assert asked[0].startswith(b"CONNECT index.example:443 HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic abc\r\n" in asked[0]


async def test_a_refusal_of_the_sites_proxy_is_told(tmp_path: Path) -> None:
    async with (
        _site_proxy([], b"407 Authenticate") as upstream,
        _proxy(tmp_path, hosts=frozenset({("index.example", 443)}), upstream=upstream),
    ):
        answer = await _ask(tmp_path, b"CONNECT index.example:443 HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"407 Authenticate" in answer


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "127.1",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::]",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "[fe80::1]",
        "[fc00::1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "2130706433",
        "0x7f.1",
    ],
)
async def test_the_machine_and_its_network_are_out_of_reach(tmp_path: Path, host: str) -> None:
    async with _proxy(tmp_path):
        for request in (f"CONNECT {host}:443 HTTP/1.1", f"GET http://{host}/ HTTP/1.1"):
            answer = await _ask(tmp_path, request.encode() + b"\r\n\r\n")
            assert answer.split()[1] in {b"403", b"502"}, answer


async def test_a_named_index_is_one_port_of_one_host(tmp_path: Path) -> None:
    async with (
        _serving(_echo) as port,
        _serving(_echo) as other,
        _proxy(tmp_path, hosts=frozenset({("localhost", port)})),
    ):
        for target in (f"localhost:{other}", f"127.0.0.1:{port}"):
            answer = await _ask(tmp_path, f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 403 "), target


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"POST http://example.org/ HTTP/1.1", b"405"),
        (b"GET /etc/passwd HTTP/1.1", b"400"),
        (b"GET ftp://example.org/ HTTP/1.1", b"400"),
        (b"GET file:///etc/passwd HTTP/1.1", b"400"),
        (b"CONNECT example.org HTTP/1.1", b"400"),
        (b"CONNECT example.org:22 HTTP/1.1", b"403"),
        (b"CONNECT :443 HTTP/1.1", b"400"),
        (b"CONNECT example.org:99999 HTTP/1.1", b"400"),
        (b"CONNECT host.invalid:443 HTTP/1.1", b"502"),
        (b"CONNECT " + b"a" * 300 + b".org:443 HTTP/1.1", b"502"),
        (b"GET http://h/ HTTP/2.0", b"505"),
        (b"nonsense", b"400"),
        (b"GET http://\xff/ HTTP/1.1", b"400"),
        (b"G" * 70_000, b"400"),
    ],
)
async def test_other_requests_are_refused(
    tmp_path: Path, request_line: bytes, status: bytes
) -> None:
    async with _proxy(tmp_path):
        with contextlib.suppress(ConnectionError):  # it may close before it has read all
            assert (await _ask(tmp_path, request_line + b"\r\n\r\n")).split()[1] == status


async def test_connections_at_once_are_bounded(tmp_path: Path) -> None:
    async with _proxy(tmp_path, connections=2), contextlib.AsyncExitStack() as held:
        for _ in range(2):
            await held.enter_async_context(_client(tmp_path))
        with contextlib.suppress(ConnectionError):
            assert await _ask(tmp_path, b"GET /build HTTP/1.1\r\n\r\n") == b""


async def test_a_build_can_transfer_so_much_and_no_more(tmp_path: Path) -> None:
    async with (
        _serving(_echo) as port,
        _proxy(tmp_path, hosts=frozenset({("localhost", port)}), bytes=100_000),
        _client(tmp_path) as (reader, writer),
    ):
        writer.write(f"CONNECT localhost:{port} HTTP/1.1\r\n\r\n".encode() + bytes(200_000))
        writer.write_eof()
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                assert len(await reader.read()) < 200_000


async def test_a_silent_connection_is_closed(tmp_path: Path) -> None:
    async with (
        _serving(_echo) as port,
        _proxy(tmp_path, hosts=frozenset({("localhost", port)}), idle_s=0.1, connect_s=5),
        _client(tmp_path) as (reader, writer),
    ):
        writer.write(f"CONNECT localhost:{port} HTTP/1.1\r\n\r\n".encode())
        async with asyncio.timeout(PATIENCE_S):
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")


async def test_who_never_finishes_a_request_is_cut_off(tmp_path: Path) -> None:
    async with _proxy(tmp_path, connect_s=0.1):
        assert await _ask(tmp_path, b"GET /bui") == b""


async def test_closing_cuts_all_connections_and_removes_the_socket(tmp_path: Path) -> None:
    async with _serving(_echo) as port:
        async with _client_of_open_proxy(tmp_path, port) as (proxy, reader):
            await proxy.close()
            async with asyncio.timeout(PATIENCE_S):
                assert await reader.read() == b""
        assert not (tmp_path / "proxy.sock").exists()


@contextlib.asynccontextmanager
async def _client_of_open_proxy(
    tmp_path: Path, port: int
) -> AsyncIterator[tuple[Proxy, asyncio.StreamReader]]:
    async with (
        _proxy(tmp_path, hosts=frozenset({("localhost", port)})) as proxy,
        _client(tmp_path) as (reader, writer),
    ):
        writer.write(f"CONNECT localhost:{port} HTTP/1.1\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        yield proxy, reader


async def test_a_socket_left_by_a_killed_agent_is_replaced(tmp_path: Path) -> None:
    async with _proxy(tmp_path), _proxy(tmp_path):
        assert b"200" in await _ask(tmp_path, b"GET /build HTTP/1.1\r\n\r\n")


async def test_the_socket_may_have_a_long_path(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    async with _proxy(deep):
        folder = os.open(deep, os.O_PATH)
        try:
            reached = Path(f"/proc/self/fd/{folder}")
            assert b"200" in await _ask(reached, b"GET /build HTTP/1.1\r\n\r\n")
        finally:
            os.close(folder)


@given(st.ip_addresses(v=4, network="10.0.0.0/8") | st.ip_addresses(v=4, network="127.0.0.0/8"))
def test_no_wrapping_makes_a_private_address_public(address: object) -> None:
    for form in ("{}", "::ffff:{}", "64:ff9b::{}", "::{}", "::ffff:0:{}", "::5efe:{}"):
        assert not is_public(form.format(address))


def test_public_addresses_are_public() -> None:
    assert is_public("151.101.0.223")
    assert is_public("2a04:4e42::223")


WRAPPED = [ipaddress.ip_network(text) for text in ("::ffff:0:0/96", "64:ff9b::/96")]
"""Of these the address inside counts."""


@given(st.ip_addresses(v=6).filter(lambda address: int(address) >> 125 != 1))
def test_only_global_unicast_is_public_in_ipv6(address: ipaddress.IPv6Address) -> None:
    assert not is_public(str(address)) or any(address in network for network in WRAPPED)


OWN_ADDRESS = """
import asyncio, fcntl, socket, struct, sys
from madang.agent.launcher import syscalls
from madang.agent.proxy import Proxy, ProxySettings
syscalls.unshare(syscalls.CLONE_NEWNET)
with socket.socket(type=socket.SOCK_DGRAM) as any_socket:
    address = struct.pack("16sHH4s8x", b"lo", socket.AF_INET, 0, socket.inet_aton("192.0.2.7"))
    fcntl.ioctl(any_socket, 0x8916, address)
syscalls.loopback_up()

async def main():
    async def tell(reader, writer):
        writer.write(b"secret")
        writer.close()
    proxy = Proxy(sys.argv[1], b"", ProxySettings())
    await proxy.open()
    async with await asyncio.start_server(tell, "192.0.2.7", 80):
        reader, writer = await asyncio.open_unix_connection(sys.argv[1])
        writer.write(b"CONNECT 192.0.2.7:80 HTTP/1.1\\r\\n\\r\\n")
        print((await reader.read()).decode())
        writer.close()
    await proxy.close()

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a public address of our own")
def test_the_machine_is_not_reached_by_its_public_address(tmp_path: Path) -> None:
    """From itself no firewall stands between: services for its own network would answer."""
    done = subprocess.run(
        [sys.executable, "-c", OWN_ADDRESS, str(tmp_path / "proxy.sock")],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.startswith("HTTP/1.1 403 "), done
    assert "secret" not in done.stdout
