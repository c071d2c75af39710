"""``madang server``: the manager alone, in the foreground, as whoever starts it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable

from madang.daemon import config, server
from madang.daemon.settings import Settings
from madang.daemon.state import Owner, StateFolder
from madang.daemon.supervisor import listen
from madang.kit import logs


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; nodes are none, so sessions wait."""
    logs.configure(settings.server.log_level)
    me = Owner(os.geteuid(), os.getegid())
    folder = StateFolder.open(settings.server.state, server=me)
    try:
        listener = listen(settings.server.host, settings.server.port)
        host, port = listener.getsockname()[:2]

        def ready(token: str | None) -> None:
            if token:
                folder.write_token(token)
            print(f"✓ ready: http://{host}:{port}  token: {folder.join('token')}", flush=True)

        asyncio.run(_serve(settings, listener, ready, not folder.read_token()))
    finally:
        folder.close()


async def _serve(
    settings: Settings,
    listener: socket.socket,
    ready: Callable[[str | None], None],
    token_wanted: bool,
) -> None:
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    await server.serve(
        settings,
        listener,
        stop=stop,
        ready=ready,
        token_wanted=token_wanted,
        with_node=False,
        registries=config.registries_text(settings),
    )
