"""Endpoints about the server itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from madang.manager.http import Call, endpoint
from madang.manager.metrics import Metrics, as_response
from madang.wire.api import Explanation, ServerInfo
from madang.wire.errors import NotFound, PlatformError, catalogue


class SystemApi:
    def __init__(
        self,
        health: Callable[[], Awaitable[None]],
        info: Callable[[], Awaitable[ServerInfo]],
        metrics: Metrics,
        fill: Callable[[], Awaitable[None]],
    ) -> None:
        """*fill* brings the gauges up to date."""
        self._health: Final = health
        self._info: Final = info
        self._metrics: Final = metrics
        self._fill: Final = fill

    @endpoint("GET", "/v1/health", auth=False, returns=dict[str, str])
    async def get_health(self, call: Call[None, None]) -> dict[str, str]:
        """Whether the server can serve: its database answers."""
        await self._health()
        return {"status": "ok"}

    @endpoint("GET", "/v1/info", returns=ServerInfo)
    async def get_info(self, call: Call[None, None]) -> ServerInfo:
        """Version, defaults and limits."""
        return await self._info()

    @endpoint("GET", "/v1/errors", auth=False, returns=list[Explanation])
    async def list_errors(self, call: Call[None, None]) -> list[Explanation]:
        """All errors that there are, with what to do."""
        return [explain(kind) for kind in catalogue().values()]

    @endpoint("GET", "/v1/errors/{code}", auth=False, returns=Explanation)
    async def get_error(self, call: Call[None, None]) -> Explanation:
        """One error, with what to do."""
        code = call.path("code")
        if (kind := catalogue().get(code)) is None:
            raise NotFound(f"no error has the code {code[:60]!r}.")
        return explain(kind)

    @endpoint("GET", "/metrics", streams="text/plain")
    async def get_metrics(self, call: Call[None, None]) -> web.Response:
        """Figures for Prometheus."""
        await self._fill()
        return as_response(self._metrics)


def explain(kind: type[PlatformError]) -> Explanation:
    return Explanation(
        code=kind.code, status=kind.http_status, retry=str(kind.retry), text=kind.help_text
    )
