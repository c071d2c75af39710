"""Typed endpoints on aiohttp: declared with a decorator, described as OpenAPI, errors as problems.

::

    class NodeApi:
        @endpoint("GET", "/v1/nodes", returns=list[Node])
        async def nodes(self, call: Call[None, None]) -> list[Node]: ...

    app = build_app([NodeApi(...)], authenticate=..., ...)
"""

from madang.manager.http.credentials import Credentials
from madang.manager.http.endpoint import Call, Caller, Endpoint, Reply, endpoint
from madang.manager.http.open_calls import OpenCalls
from madang.manager.http.server import build_app
from madang.manager.http.strangers import Site, Strangers
from madang.manager.http.streaming import start_stream

__all__ = [
    "Call",
    "Caller",
    "Credentials",
    "Endpoint",
    "OpenCalls",
    "Reply",
    "Site",
    "Strangers",
    "build_app",
    "endpoint",
    "start_stream",
]
