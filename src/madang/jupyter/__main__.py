"""``python -m madang.jupyter -f CONNECTION_FILE --kernel NAME``: what a kernel.json starts."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from typing import Final

from madang.jupyter.bridge import Bridge, read_connection
from madang.jupyter.remote import Remote
from madang.wire.errors import PlatformError

ALONE_S: Final = 900.0
PARENT_EVERY_S: Final = 1.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="madang.jupyter", description=__doc__)
    parser.add_argument("-f", dest="file", required=True, help="connection file")
    parser.add_argument("--url", default="", help="the server; as `madang login` stored it")
    parser.add_argument(
        "--alone-s",
        type=float,
        default=ALONE_S,
        help="the session ends that long after we are gone",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kernel", default="", help="kernelspec: a new kernel, ended with us")
    what.add_argument("--attach", default="", help="id of a kernel that somebody else ends")
    given = parser.parse_args(argv)
    try:
        asyncio.run(_serve(given))
    except PlatformError as exc:
        print(f"madang: {exc.text} ({exc.code})", file=sys.stderr)
        return 1
    return 0


async def _serve(given: argparse.Namespace) -> None:
    connection = read_connection(given.file)
    async with Remote(given.url) as remote:
        kernel = given.attach or await remote.start(given.kernel, alone_s=given.alone_s)
        bridge = Bridge(connection, remote, kernel)
        loop = asyncio.get_running_loop()
        orphaned = asyncio.Event()
        interrupts: set[asyncio.Task[None]] = set()

        def interrupt() -> None:
            task = loop.create_task(remote.interrupt(kernel))
            interrupts.add(task)
            task.add_done_callback(interrupts.discard)

        loop.add_signal_handler(signal.SIGTERM, bridge.stop)
        loop.add_signal_handler(signal.SIGINT, interrupt)
        watching = asyncio.ensure_future(_watch_parent(bridge, orphaned))
        try:
            await bridge.run()
        finally:
            watching.cancel()
            if given.kernel or orphaned.is_set():
                with contextlib.suppress(PlatformError):  # it ends by itself, as it was asked to
                    await remote.stop(kernel)


async def _watch_parent(bridge: Bridge, orphaned: asyncio.Event) -> None:
    """A frontend that was killed tells nobody."""
    parent = os.getppid()
    while os.getppid() == parent:  # noqa: ASYNC110 - nothing tells us
        await asyncio.sleep(PARENT_EVERY_S)
    orphaned.set()
    bridge.stop()


if __name__ == "__main__":
    sys.exit(main())
