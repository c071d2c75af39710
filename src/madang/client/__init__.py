"""The Python client.

``Client`` is for ordinary programs, ``AsyncClient`` for asyncio; they offer the same calls over
the same requests (``calls``), retry rules (``retry``) and stream state (``following``).

>>> with Client(url, token) as client:
...     run = client.run(["python3", "-c", "print(6 * 7)"])
...     for record in run:
...         print(record.data.decode(), end="")
...     print(run.wait().ended.exit_code)
42
0

Names are imported when first used: the sync client loads neither asyncio nor aiohttp.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from madang.client.aio import AsyncClient as AsyncClient
    from madang.client.aiocells import AsyncCells as AsyncCells
    from madang.client.aiostreams import AsyncExec as AsyncExec
    from madang.client.aiostreams import AsyncRun as AsyncRun
    from madang.client.cells import Cells as Cells
    from madang.client.proof import KeyPair as KeyPair
    from madang.client.streams import Exec as Exec
    from madang.client.streams import Run as Run
    from madang.client.sync import Client as Client

_HOMES = {
    "AsyncCells": "aiocells",
    "AsyncClient": "aio",
    "AsyncExec": "aiostreams",
    "AsyncRun": "aiostreams",
    "Cells": "cells",
    "Client": "sync",
    "Exec": "streams",
    "KeyPair": "proof",
    "Run": "streams",
}

__all__ = [
    "AsyncCells",
    "AsyncClient",
    "AsyncExec",
    "AsyncRun",
    "Cells",
    "Client",
    "Exec",
    "KeyPair",
    "Run",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"madang.client.{_HOMES[name]}"), name)
