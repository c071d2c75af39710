"""The way out of a build session whose image has no interpreter of ours: the agent's proxy, a Unix
socket, offered as a TCP port of the session's own loopback.

A process of the session like any other, with its rights and no more: a fork of the init once that
has given all up. Programs find it by ``http_proxy``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from typing import Final

from madang.agent.launcher import syscalls
from madang.agent.launcher.processes import say
from madang.wire.kernel import PROXY_PORT, SERVICE_DIR

SOCKET: Final = f"{SERVICE_DIR}/proxy.sock"
_CHUNK: Final = 128 * 1024
_MOST: Final = 64
"""Connections at once; each takes two threads."""
_STACK_BYTES: Final = 256 * 1024


def start() -> None:
    """Listens when it returns."""
    listener = socket.create_server(("127.0.0.1", PROXY_PORT), backlog=_MOST)
    if os.fork() == 0:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # Clients leave when they like.
            syscalls.close_all_but(listener.fileno())
            syscalls.set_process_name("madang-relay")
            syscalls.die_with_parent(signal.SIGKILL)
            _serve(listener)
        except BaseException as exc:
            say(f"madang relay: {exc!r}")
        finally:
            os._exit(1)
    listener.close()


def _serve(listener: socket.socket) -> None:
    threading.stack_size(_STACK_BYTES)
    free = threading.Semaphore(_MOST)
    while True:
        free.acquire()
        client, _ = listener.accept()
        try:
            threading.Thread(target=_carry, args=(client, free), daemon=True).start()
        except RuntimeError:  # No thread to be had: the client sees an end.
            client.close()
            free.release()


def _carry(client: socket.socket, free: threading.Semaphore) -> None:
    try:
        with client, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as proxy:
            proxy.connect(SOCKET)
            back = threading.Thread(target=_pump, args=(proxy, client), daemon=True)
            back.start()
            _pump(client, proxy)
            back.join()
    except (OSError, RuntimeError):  # No proxy, or no thread to be had: the client sees an end.
        pass
    finally:
        free.release()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(_CHUNK):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
