"""Following a session that makes an image, to the image."""

from __future__ import annotations

import time
from typing import Final

from madang.cli.follow import Follower
from madang.cli.phases import show_end
from madang.cli.terminal import Notes, count
from madang.client.streams import Run
from madang.client.sync import Client
from madang.wire import exits
from madang.wire.errors import BuildFailed
from madang.wire.image import Image, ImageStatus
from madang.wire.session import Result, Session
from madang.wire.size import format_bytes

_SETTLE_S: Final = 60.0
"""For the server to take the layers of a finished build over."""


def watch(
    client: Client,
    notes: Notes,
    session: Session,
    name: str,
    *,
    stdin: bool = False,
    say: bytes = b"",
) -> int:
    """Until image *name* is there; Ctrl-C cancels. Raises BuildFailed.

    *stdin*: feed our standard input; *say*: write this first, as the login is.
    """
    ended = attend(client, notes, session, f"image {name}", stdin=stdin, say=say)
    if isinstance(ended, int):
        return ended
    if ended.result is not Result.SUCCESS:
        show_end(notes, ended)
        raise BuildFailed(f"image {name} was not built; madang logs {session.name} has its log.")
    done = _settled(client, name, session.name)
    size = format_bytes(done.size_bytes)
    layers = count(len(done.layers), "layer")
    notes.line("done", f"image {name}: {layers}, {size}. madang run --image {name} …")
    return 0


def attend(
    client: Client,
    notes: Notes,
    session: Session,
    what: str,
    *,
    stdin: bool = False,
    say: bytes = b"",
) -> Session | int:
    """Follow a build session to its end; our exit code if we left it."""
    notes.line("build", f"{what} in session {session.name}; Ctrl-C cancels")
    try:
        with client.attach(session.id) as stream:
            if say:
                _say(stream, say)
            follower = Follower(stream, notes, stdin=stdin, tty=False, stop_on_interrupt=True)
            left = follower.follow()
            return stream.wait() if left is None else left
    except KeyboardInterrupt:  # before the follower took the signal
        client.stop(session.id)
        notes.line("stop", f"{session.name} is being stopped")
        return exits.INTERRUPTED


def _say(stream: Run, line: bytes) -> None:
    stream.write(line)
    stream.close_stdin()


def _settled(client: Client, name: str, build: str) -> Image:
    """The image once the server has taken it over. Raises BuildFailed."""
    give_up = time.monotonic() + _SETTLE_S
    while (found := client.get_image(name)).status is ImageStatus.BUILDING:
        if time.monotonic() > give_up:
            raise BuildFailed(f"image {name} is not ready though its build {build} ended well.")
        time.sleep(0.05)
    if found.status is not ImageStatus.READY:
        raise BuildFailed(f"image {name} was not taken over; madang show {build} says more.")
    return found
