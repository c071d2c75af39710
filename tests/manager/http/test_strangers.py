"""Whoever reaches the port but has no token can't use up the server's connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from madang.manager.http import Call, Credentials, Site, Strangers, build_app, endpoint
from madang.manager.identity.types import Principal, Role
from madang.testing.patience import PATIENCE_S
from madang.wire.errors import Unauthenticated

ADMIN = Principal(
    user_id="u", user="admin", role=Role.ADMIN, token_id="t", token="first", project_id="p"
)
FOREVER = 1000.0
KNOWN = b"GET /v1/who HTTP/1.1\r\nHost: x\r\nAuthorization: yes\r\n\r\n"
Link = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Api:
    @endpoint("GET", "/v1/who", returns=str)
    async def who(self, call: Call[None, None]) -> str:
        """Who asks."""
        return call.caller.user

    @endpoint("GET", "/v1/health", auth=False, returns=str)
    async def health(self, call: Call[None, None]) -> str:
        """Whether it works."""
        return "ok"


async def authenticate(shown: Credentials) -> Principal:
    if shown.authorization != ("yes",):
        raise Unauthenticated("no token.")
    return ADMIN


@contextlib.asynccontextmanager
async def served(strangers: Strangers) -> AsyncIterator[int]:
    app = build_app(
        [Api()],
        authenticate=authenticate,
        observe=lambda *_: None,
        title="t",
        version="1",
        strangers=strangers,
    )
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    try:
        await Site(runner, listener).start()
        yield listener.getsockname()[1]
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def linked(port: int, count: int) -> AsyncIterator[list[Link]]:
    links = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
    try:
        yield links
    finally:
        for _, writer in links:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def ask(link: Link, request: bytes) -> bytes:
    reader, writer = link
    writer.write(request)
    async with asyncio.timeout(PATIENCE_S):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        await reader.readexactly(length)
    return head.split(b"\r\n")[0]


async def is_cut(link: Link) -> bool:
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionError):
            while await link[0].read(1000):
                pass
    return True


@pytest.mark.parametrize(
    "said", [b"", b"GET /v1/who HTTP/1.1\r\nX: ", b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n"]
)
async def test_who_shows_no_token_is_cut_off_in_time(said: bytes) -> None:
    async with served(Strangers(patience_s=0.2)) as port, linked(port, 1) as (link,):
        link[1].write(said)
        assert await is_cut(link)


async def test_who_has_shown_a_token_may_be_silent_for_long() -> None:
    async with served(Strangers(patience_s=3)) as port, linked(port, 2) as (known, silent):
        assert (await ask(known, KNOWN)).endswith(b"200 OK")
        assert await is_cut(silent)
        assert (await ask(known, KNOWN)).endswith(b"200 OK")


async def test_a_crowd_of_strangers_keeps_nobody_out() -> None:
    async with (
        served(Strangers(most=5, patience_s=FOREVER)) as port,
        linked(port, 1) as (early,),
    ):
        assert (await ask(early, KNOWN)).endswith(b"200 OK")
        async with linked(port, 40) as crowd, linked(port, 1) as (late,):
            assert (await ask(late, KNOWN)).endswith(b"200 OK")
            assert (await ask(early, KNOWN)).endswith(b"200 OK")
            for link in crowd[:35]:
                assert await is_cut(link)


async def test_a_wrong_token_makes_nobody_known() -> None:
    async with served(Strangers(patience_s=3)) as port, linked(port, 1) as (link,):
        assert b"401" in await ask(link, KNOWN.replace(b"yes", b"no"))
        assert await is_cut(link)
