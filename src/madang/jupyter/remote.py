"""A kernel at the server: started, restarted, ended, and its channels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final, Self
from urllib.parse import quote

import aiohttp

from madang.cli.config import load
from madang.wire.errors import (
    ConfigInvalid,
    NotFound,
    PlatformError,
    ServerUnreachable,
    from_problem,
)

V1: Final = "v1.kernel.websocket.jupyter.org"
MAX_MESSAGE: Final = 64 << 20
RETRY_S: Final = (0.2, 10.0)
_TIMEOUT: Final = aiohttp.ClientTimeout(total=60)


class Remote:
    """A connection to the server that ``madang login`` has stored; an async context manager."""

    def __init__(self, url: str = "") -> None:
        config = load()
        if config.token is None:
            raise ConfigInvalid("no token is stored. `madang login URL` stores one.")
        self._token: Final = config.token
        self._url: Final = (url or config.url).rstrip("/")
        self._base = ""

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self._token.reveal()}"}
        self._http = aiohttp.ClientSession(headers=headers, timeout=_TIMEOUT)
        try:
            user = (await self._ask("GET", f"{self._url}/v1/whoami"))["user"]
        except BaseException:
            await self._http.close()
            raise
        self._base = f"{self._url}/jupyter/{quote(user, safe='')}/api"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def start(self, name: str, *, alone_s: float) -> str:
        """Id of a new kernel; its session ends *alone_s* after its last client has gone."""
        body = {"name": name, "env": {"MADANG_ALONE_S": f"{alone_s:g}"}}
        return str((await self._ask("POST", f"{self._base}/kernels", json=body))["id"])

    async def lives(self, kernel: str) -> bool:
        try:
            await self._ask("GET", f"{self._base}/kernels/{kernel}")
        except NotFound:
            return False
        return True

    async def interrupt(self, kernel: str) -> None:
        await self._ask("POST", f"{self._base}/kernels/{kernel}/interrupt")

    async def stop(self, kernel: str) -> None:
        """Its session ends; no error if it has."""
        try:
            await self._ask("DELETE", f"{self._base}/kernels/{kernel}")
        except NotFound:
            return

    async def _ask(self, method: str, url: str, **more: Any) -> Any:
        try:
            async with self._http.request(method, url, **more) as answer:
                if answer.status >= 400:
                    raise await _problem(answer)
                return None if answer.status == 204 else await answer.json()
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise ServerUnreachable(f"{self._url} does not answer ({exc}).") from exc

    async def connect(
        self, kernel: str, client: str
    ) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """WebSockets of the kernel's channels, a new one after each break, until it has ended."""
        pause = RETRY_S[0]
        url = f"{self._base}/kernels/{kernel}/channels?session_id={quote(client)}"
        while await self._still(kernel):
            try:
                async with self._http.ws_connect(
                    url, protocols=(V1,), heartbeat=30, max_msg_size=MAX_MESSAGE, timeout=_WS
                ) as socket:
                    pause = RETRY_S[0]
                    yield socket
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(pause)
            pause = min(pause * 2, RETRY_S[1])

    async def _still(self, kernel: str) -> bool:
        """Whether it may be worth connecting; also where nobody can tell."""
        try:
            return await self.lives(kernel)
        except ServerUnreachable:
            return True


_WS: Final = aiohttp.ClientWSTimeout(ws_close=2.0)


async def _problem(answer: aiohttp.ClientResponse) -> PlatformError:
    try:
        told = await answer.json(content_type=None)
        return from_problem(told["code"], told["detail"], told.get("details") or {})
    except (ValueError, KeyError, TypeError):
        return ServerUnreachable(f"{answer.url.origin()} answers {answer.status} {answer.reason}.")
