"""The little of Docker's API that sessions need, on the engine's Unix socket.

HTTP/1.0, for which the engine sends an answer in one piece and then closes: nothing to be parsed
but a status and a body. Every call has a time limit. Who may write to the socket is root's equal,
so only the launcher's side has it: the init before it gives up its powers, and helpers.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from typing import Any, Final
from urllib.parse import quote

OLDEST: Final = (1, 41)
"""Docker 20.10: the first with control group namespaces of its own for containers."""
PROBE_S: Final = 3.0
_CALL_S: Final = 20.0
_MOST_BYTES: Final = 8 * 1024 * 1024
_PART: Final = 64 * 1024
_FOREIGN: Final = {
    "name=rootless": "it is rootless",
    "name=userns": "it maps users (userns-remap)",
}
"""Security options under which a session's uid would not be its uid."""


class EngineFailed(Exception):
    """In the engine's words, or ours where it did not answer."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.text = text
        self.status = status


class Engine:
    """A client; one connection for each call."""

    def __init__(self, path: str, *, call_s: float = _CALL_S) -> None:
        self._path = path
        self._call_s = call_s

    def get(self, path: str) -> Any:
        return self.call("GET", path)

    def post(self, path: str, body: Any = None) -> Any:
        """*body*: JSON, or bytes of a tar archive."""
        return self.call("POST", path, body)

    def remove(self, container: str) -> None:
        """End a container and forget it; no error if there is none."""
        try:
            self.call("DELETE", f"/containers/{quote(container)}?force=1")
        except EngineFailed as exc:
            # 409: it is being removed already.
            if exc.status not in {404, 409}:
                raise

    def containers(self, label: str) -> list[dict[str, Any]]:
        """Those with *label*, or all if it is empty, running or not."""
        filters = quote(json.dumps({"label": [label] if label else []}))
        found = self.get(f"/containers/json?all=1&filters={filters}")
        return [each for each in found if isinstance(each, dict)]

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON, None where there is none. Raises EngineFailed."""
        kind = "application/x-tar" if isinstance(body, bytes) else "application/json"
        data = body if isinstance(body, bytes) else b"" if body is None else _packed(body)
        head = (
            f"{method} {path} HTTP/1.0\r\nHost: docker\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        try:
            status, answer = self._exchange(head.encode() + data)
        except (OSError, ValueError) as exc:
            why = getattr(exc, "strerror", None) or exc
            raise EngineFailed(f"Docker does not answer at {self._path}: {why}") from exc
        if status >= 400:
            raise EngineFailed(_message(answer) or f"status {status}", status)
        return _parsed(answer)

    def _exchange(self, request: bytes) -> tuple[int, bytes]:
        late = time.monotonic() + self._call_s
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as link:
            link.settimeout(self._call_s)
            link.connect(self._path)
            link.sendall(request)
            answer = bytearray()
            while part := link.recv(_PART):
                answer += part
                link.settimeout(max(0.001, late - time.monotonic()))
                if len(answer) > _MOST_BYTES:
                    raise ValueError("an answer without end")
        head, _, body = bytes(answer).partition(b"\r\n\r\n")
        return int(head[len("HTTP/1.0 ") :][:3]), body


def find(path: str) -> str:
    """Why the engine can't be used, in words; empty: it can."""
    try:
        info = os.stat(path)
    except OSError:
        return (
            f"nothing is at {path}: install Docker (apt-get install docker.io), or say where its "
            "socket is with `node.docker_socket`"
        )
    if not stat.S_ISSOCK(info.st_mode) or info.st_uid != 0 or info.st_mode & stat.S_IWOTH:
        return f"{path} is no socket that belongs to root alone"
    try:
        return _judge(path)
    except EngineFailed as exc:
        return exc.text


def _judge(path: str) -> str:
    engine = Engine(path, call_s=PROBE_S)
    version, info = engine.get("/version"), engine.get("/info")
    if not isinstance(version, dict) or not isinstance(info, dict):
        return f"what answers at {path} is no Docker engine"
    spoken = str(version.get("ApiVersion"))
    if _numbers(spoken) < OLDEST:
        return f"its API {spoken} is too old: Docker 20.10 or newer is needed"
    options = info.get("SecurityOptions") or []
    for option in options:
        if why := _FOREIGN.get(str(option).partition(",")[0]):
            return f"{why}: sessions need an engine of root's"
    if not any(str(option).startswith("name=seccomp") for option in options):
        return "it was built without seccomp"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()


def _packed(value: Any) -> bytes:
    return json.dumps(value).encode()


def _parsed(answer: bytes) -> Any:
    """Streams of several values are not wanted here: None."""
    try:
        return json.loads(answer)
    except ValueError:
        return None


def _message(answer: bytes) -> str:
    found = _parsed(answer)
    text = found.get("message", "") if isinstance(found, dict) else ""
    return str(text).strip()[:1000]
