"""The way out of a build session: the agent's proxy, a Unix socket, offered as a local TCP port.

uv and what it starts speak to proxies over TCP only; the session's network has nothing but ``lo``.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

CHUNK = 64 * 1024
LAYER_CHUNK = 1024 * 1024


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("madang", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def fetch_orders(path: str) -> dict[str, Any]:
    """What the agent tells this build: variables for uv, certificates, layers at hand."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/build")
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise OSError(f"the agent answered {answer.status}")
    orders: dict[str, Any] = json.loads(body)
    return orders


def fetch_layer(path: str, digest: str) -> Iterator[bytes]:
    """The tar of a layer that the agent offers to this build."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", f"/layer/{digest}")
        answer = connection.getresponse()
        if answer.status != 200:
            raise OSError(f"layer {digest[:12]}: the agent answers {answer.status}")
        while data := answer.read(LAYER_CHUNK):
            yield data
    except http.client.HTTPException as exc:
        raise OSError(f"layer {digest[:12]}: the agent hangs up ({exc})") from exc
    finally:
        connection.close()


def forward(path: str) -> str:
    """Offer the Unix socket at *path* on the loopback, in the background; the proxy's URL."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    threading.Thread(target=_accept, args=(listener, path), daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def _accept(listener: socket.socket, path: str) -> None:
    while True:
        client, _ = listener.accept()
        proxy = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            proxy.connect(path)
        except OSError:
            client.close()
            proxy.close()
            continue
        for source, target in ((client, proxy), (proxy, client)):
            threading.Thread(target=_pump, args=(source, target), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(CHUNK):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
