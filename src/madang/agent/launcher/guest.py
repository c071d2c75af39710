"""Process 1 in a session's box: what Docker starts. See ``box``.

It believes nothing that it was promised: if Docker did not take away what it was told to take away,
no program of the session is started.
"""

from __future__ import annotations

import os
import socket
from typing import Final, NoReturn

from madang.agent.launcher import box, channel, init
from madang.agent.launcher.order import Order

_NOTHING: Final = "0000000000000000"
_CAPABILITIES: Final = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def main() -> NoReturn:
    """Never returns; what is left of the session ends with us."""
    try:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        link.connect(box.DOOR)
        channel.send(link, {"guest": True}, [os.pidfd_open(os.getpid())])
        message, fds = channel.receive(link)
        if message is not None:
            keeper, lifeline, memory = fds
            _serve(link, socket.socket(fileno=keeper), lifeline, memory)
    finally:
        os._exit(0)


def _serve(link: socket.socket, keeper: socket.socket, lifeline: int, memory: int) -> None:
    # The session's filter may allow next to nothing: after it no call but those of any init.
    try:
        order = Order.from_json(channel.from_memory(memory))
        os.close(memory)
        if wrong := unkept(order.uid):
            raise PermissionError(f"Docker did not do what it was asked for: {wrong}")
        init.settle_in(order)
    except Exception as exc:  # Whatever it is, the other side says it.
        channel.send(link, {"failed": f"{exc}"[:500]})
        return
    channel.send(link, {"ready": True})
    link.close()
    init.serve(keeper, order, lifeline)


def unkept(uid: int, status: str | None = None) -> str:
    """What of our confinement is not there, in words; empty: all is. *status*: as in ``/proc``."""
    if status is None:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            status = file.read()
    found = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    if found["Pid"] != "1":
        return "it is not the first process"
    if any(found[name].split() != [str(uid)] * 4 for name in ("Uid", "Gid")):
        return f"it runs as {found['Uid'].split()[0]}:{found['Gid'].split()[0]}"
    if found["Groups"].split() not in ([], [str(uid)]):
        return f"it has the groups {found['Groups'].strip()}"
    if kept := [name for name in _CAPABILITIES if found[name] != _NOTHING]:
        return f"capabilities are left in {', '.join(kept)}"
    if found["NoNewPrivs"] != "1":
        return "new privileges can be had"
    if found["Seccomp"] != "2":
        return "there is no filter"
    return ""
