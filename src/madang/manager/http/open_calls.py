"""Requests that are being served, so that those of whoever may no longer come can be cut."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from madang.manager.http.endpoint import Call, Caller


class OpenCalls:
    """Output that is followed for days must not outlive the token by which it was asked for."""

    def __init__(self) -> None:
        self._calls: Final[dict[int, Call[Any, Any]]] = {}

    def add(self, call: Call[Any, Any]) -> None:
        self._calls[id(call)] = call

    def remove(self, call: Call[Any, Any]) -> None:
        self._calls.pop(id(call), None)

    async def cut(self, may_stay: Callable[[Caller], Awaitable[bool]]) -> int:
        """Cut the connections of callers that may not stay; how many."""
        verdicts: dict[Caller, bool] = {}
        count = 0
        for call in list(self._calls.values()):
            caller = call.caller
            if caller not in verdicts:
                verdicts[caller] = await may_stay(caller)
            if not verdicts[caller] and id(call) in self._calls:
                count += 1
                if (transport := call.request.transport) is not None:
                    transport.abort()
        return count


OPEN_CALLS: Final = web.AppKey("open_calls", OpenCalls)
