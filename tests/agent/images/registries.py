"""Registries on loopback: Debian's docker-registry, and one that does what a test tells it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import http.server
import json
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from madang.testing.foreignimages import INDEX, MANIFEST, Built

PROGRAM = shutil.which("docker-registry")
PASSWORD = "s3cret"
HASHED = "$2b$04$7N57ah3QyYZMENpK7H75M.b1x76wR3ndudQ3qB9FT/zbiiL9ysMZO"
"""Bcrypt of PASSWORD."""


@contextlib.asynccontextmanager
async def docker_registry(folder: Path, *, login: str = "") -> AsyncIterator[str]:
    """``127.0.0.1:PORT`` of the real one."""
    assert PROGRAM is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    auth: dict[str, Any] = {}
    if login:
        users = folder / "users"
        users.write_text(f"{login}:{HASHED}\n")
        auth = {"auth": {"htpasswd": {"realm": "test", "path": str(users)}}}
    config = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}},
        "http": {"addr": address},
        **auth,
    }
    (folder / "config.yml").write_text(json.dumps(config))
    process = await asyncio.create_subprocess_exec(
        PROGRAM, "serve", str(folder / "config.yml"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await asyncio.to_thread(_wait, address)
        yield address
    finally:
        process.kill()
        await process.wait()


def _wait(address: str) -> None:
    for _ in range(400):
        try:
            urllib.request.urlopen(f"http://{address}/v2/", timeout=5).close()
        except urllib.error.HTTPError as exc:
            exc.close()
            return
        except OSError:
            threading.Event().wait(0.05)
        else:
            return
    raise AssertionError("docker-registry does not answer")


def upload(address: str, name: str, tag: str, built: Built, index: bytes = b"") -> str:
    """Put an image there, as any client does; the digest of what the tag stands for."""
    for digest, data in built.blobs.items():
        if data == built.manifest:
            continue
        made = _ask("POST", f"http://{address}/v2/{name}/blobs/uploads/")
        mark = "&" if "?" in made["Location"] else "?"
        _ask("PUT", f"{made['Location']}{mark}digest={digest}", data)
    for data, kind, where in (
        (built.manifest, MANIFEST, built.digest if index else tag),
        (index, INDEX, tag),
    ):
        if data:
            _ask("PUT", f"http://{address}/v2/{name}/manifests/{where}", data, kind)
    return f"sha256:{hashlib.sha256(index or built.manifest).hexdigest()}"


def _ask(method: str, url: str, data: bytes = b"", kind: str = "application/octet-stream") -> Any:
    request = urllib.request.Request(url, data, {"Content-Type": kind}, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.headers


class Answers(http.server.BaseHTTPRequestHandler):
    """Serves ``server.things``: path → bytes, or a function that is given the request."""

    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        found = self.server.things.get(self.path.partition("?")[0])  # type: ignore[attr-defined]
        if callable(found):
            found(self)
        elif found is None:
            self.say(404)
        else:
            self.say(200, found)

    def say(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


Thing = bytes | Callable[[Answers], None]


class Told:
    """A registry that does as it is told."""

    def __init__(self) -> None:
        self.things: dict[str, Thing] = {}
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.server.daemon_threads = True
        self.server.things = self.things  # type: ignore[attr-defined]
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.server.asked = self.asked  # type: ignore[attr-defined]
        self.address = f"127.0.0.1:{self.server.server_port}"

    def offer(self, built: Built, name: str = "library/tool", tag: str = "latest") -> None:
        for digest, data in built.blobs.items():
            self.things[f"/v2/{name}/blobs/{digest}"] = data
        self.things[f"/v2/{name}/manifests/{built.digest}"] = built.manifest
        self.things[f"/v2/{name}/manifests/{tag}"] = built.manifest

    def need_token(self, login: tuple[str, str] | None = None) -> None:
        """All that is offered is given to bearers of a token alone."""

        def guarded(thing: Thing) -> Callable[[Answers], None]:
            def answer(request: Answers) -> None:
                if request.headers.get("Authorization") == "Bearer t0ken":
                    thing(request) if callable(thing) else request.say(200, thing)
                    return
                realm = f'Bearer realm="http://{self.address}/token",service="here",scope="x"'
                request.say(401, WWW_Authenticate=realm)

            return answer

        def token(request: Answers) -> None:
            basic = base64.b64encode(":".join(login or ("", "")).encode()).decode()
            if login is not None and request.headers.get("Authorization") != f"Basic {basic}":
                request.say(401)
            else:
                request.say(200, b'{"token":"t0ken"}')

        for path, thing in list(self.things.items()):
            self.things[path] = guarded(thing)
        self.things["/token"] = token


@contextlib.contextmanager
def told() -> Iterator[Told]:
    made = Told()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()
        thread.join()
