"""The init's part in keeping a policy: it gives up what it must, and waits for its guard."""

from __future__ import annotations

import os
import socket

from madang.agent.launcher import channel, landlock, notify
from madang.agent.launcher.order import Order


def restrict(order: Order) -> list[int]:
    """Before the main filter, which may refuse what this takes: what the guard listens with.

    Raises OSError. From here on to the guard's word nothing that it may be asked about is called.
    """
    for folders in order.writes:
        landlock.restrict(folders)
    return [notify.install(order.handed_over)] if order.handed_over else []


def wait(link: socket.socket, order: Order, listener: list[int]) -> bool:
    """Whether the session may begin; False: its guard can't be had, or it is to end."""
    if not order.guarded:
        return True
    channel.send(link, {"set": True}, listener)
    for fd in listener:
        os.close(fd)
    message, _ = channel.receive(link)
    return message is not None and message["do"] == "begin"
