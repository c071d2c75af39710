"""The server process: manager, agent and HTTP API in one event loop, as an ordinary user.

Executed by the supervisor as ``python -P -m madang.daemon.server SETTINGS LISTENER REPORT``, three
descriptors: the settings to read, the socket to serve, and where one line tells when it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Final

from aiohttp import web

from madang.agent.service import Agent
from madang.daemon import compose
from madang.daemon.logfile import MAX_LOG_BYTES, redirect
from madang.daemon.settings import Settings
from madang.kit import codec, logs
from madang.kit.clock import Clock, SystemClock
from madang.kit.link import memory_link
from madang.manager.app import Manager
from madang.manager.http import Site
from madang.wire.errors import PlatformError

log = logging.getLogger(__name__)

GOODBYE_S: Final = 3.0
"""How long open calls may go on when the server stops."""
LINK_PAUSE_S: Final = 1.0
"""Between two tries to bring the agent to the manager."""


class Node:
    """This machine's agent, linked to the manager in memory; linked anew when the link fails."""

    def __init__(self, agent: Agent, manager: Manager, clock: Clock) -> None:
        self._agent = agent
        self._manager = manager
        self._clock = clock

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._link()
            except Exception as exc:
                log.warning("agent link ended", exc_info=exc)
            await self._clock.sleep(LINK_PAUSE_S)

    async def _link(self) -> None:
        ours, theirs = memory_link()
        sides = [
            asyncio.create_task(self._manager.serve_agent(ours), name="link:manager"),
            asyncio.create_task(self._agent.serve(theirs), name="link:agent"),
        ]
        try:
            done, _ = await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await ours.close()
            await theirs.close()
            for side in sides:
                side.cancel()
            await asyncio.gather(*sides, return_exceptions=True)
        for side in done:
            side.result()


async def serve(
    settings: Settings,
    listener: socket.socket,
    *,
    stop: asyncio.Event,
    ready: Callable[[str | None], None],
    token_wanted: bool = True,
    with_node: bool = True,
    clock: Clock | None = None,
    registries: str = "",
) -> None:
    """Run everything until *stop*; *ready* is told the new admin token, if one was made.

    Sessions go on afterwards. Raises what makes this machine unable to serve.
    """
    clock = clock or SystemClock()
    parts = compose.build(settings, clock, registries)
    async with contextlib.AsyncExitStack() as opened:
        await parts.blobs.open()
        await parts.manager.open()
        opened.push_async_callback(parts.manager.close)
        token = await parts.manager.ensure_admin()
        if token is None and token_wanted:
            token = await parts.manager.new_admin_token("state folder")
        if with_node:
            await parts.agent.open()
            opened.push_async_callback(parts.agent.close)
            node = asyncio.create_task(Node(parts.agent, parts.manager, clock).run(), name="node")
            opened.push_async_callback(end_task, node)
        app = parts.manager.web_app()
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=GOODBYE_S)
        await runner.setup()
        opened.push_async_callback(runner.cleanup)
        await Site(runner, listener).start()
        ready(token.reveal() if token else None)
        await stop.wait()
        log.info("stopping; sessions go on")


async def end_task(task: asyncio.Task[None]) -> None:
    """Cancel and wait."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def run(
    settings: Settings, listener: socket.socket, report: int, wanted: bool, registries: str
) -> None:
    """The process: signals in, one line out."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)

    def ready(token: str | None) -> None:
        tell(report, {"op": "ready", "token": token})
        gc.collect()
        gc.freeze()
        log.info("ready", extra={"pid": os.getpid()})

    await serve(
        settings, listener, stop=stop, ready=ready, token_wanted=wanted, registries=registries
    )


def tell(report: int, word: dict[str, object]) -> None:
    """One line to the supervisor, which may have gone."""
    with contextlib.suppress(BrokenPipeError):
        os.write(report, json.dumps(word).encode() + b"\n")


def main() -> int:
    """Exit code 0 after a signal, 1 where this machine can't serve (told to the supervisor)."""
    settings_fd, listener_fd, report = map(int, sys.argv[1:4])
    with open(settings_fd, "rb") as file:
        word = json.load(file)
    settings = codec.convert(Settings, word["settings"])
    path = os.path.join(settings.server.state, "server", "server.log")
    log_file = logs.LogFile(sys.stderr, MAX_LOG_BYTES, partial(redirect, path))
    logs.configure(settings.server.log_level, log_file)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    listener = socket.socket(fileno=listener_fd)
    try:
        asyncio.run(run(settings, listener, report, word["token_wanted"], word["registries"]))
    except PlatformError as exc:
        log.error(exc.text, extra={"code": exc.code})
        tell(report, {"op": "failed", "code": exc.code, "text": exc.text})
        return 1
    except Exception as exc:
        log.exception("the server failed")
        text = f"the server failed: {type(exc).__name__}: {exc}".splitlines()[0]
        tell(report, {"op": "failed", "code": PlatformError.code, "text": f"{text}; see its log."})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
