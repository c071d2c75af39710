"""The same keeper, init and file worker without any isolation: for the ``process`` runtime.

``python -P -m madang.agent.launcher.bare keep`` reads ``{"order": …, "folder": …}`` from stdin,
leaves a keeper behind and prints how its start went, as one line of JSON. ``… bare files FD
ROOT`` leaves a file worker behind that serves the socket FD.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from typing import Any

from madang.agent.launcher import channel, files, keeper, syscalls
from madang.agent.launcher.order import Order
from madang.agent.launcher.processes import ProcessId, boot_id
from madang.agent.launcher.registry import STARTED, Record


def keep(order: Order, folder: str) -> dict[str, Any]:
    """Start a session; ``{"at": …}`` or ``{"failed": …}``."""
    ours, theirs = channel.pair()
    pid = os.fork()
    if pid == 0:
        _go_quiet()
        syscalls.close_all_but(theirs.fileno())
        keeper.run(theirs, folder, None, os.getuid(), os.getgid())
    theirs.close()
    init: ProcessId | None = None
    while True:
        message, _ = channel.receive(ours)
        if message is None:
            return {"failed": "its keeper was killed while it was started"}
        if "failed" in message:
            return message
        if "started" in message:
            return {"at": message["started"]}
        if "init" in message:
            init = ProcessId.of(message["init"])
        else:
            _record(order, pid, init).save(folder)
            channel.send(ours, {"folders": 0}, [channel.to_memory(order.to_json())])


def _record(order: Order, pid: int, init: ProcessId | None) -> Record:
    return Record(
        kernel=order.kernel,
        uid=order.uid,
        state=STARTED,
        group=order.group,
        keeper=ProcessId.of(pid),
        init=init,
        started_at=time.time(),
        boot=boot_id(),
    )


def _go_quiet() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)


def main() -> None:
    if sys.argv[1] == "keep":
        request = json.load(sys.stdin)
        print(json.dumps(keep(Order.from_json(request["order"]), request["folder"])))
    elif os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _go_quiet()
        files.serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3])
        os._exit(0)


if __name__ == "__main__":
    main()
