"""A client of Jupyter's server API, as small as a test needs it.

>>> async with Jupyter(platform.url, platform.token) as jupyter:
...     async with jupyter.kernel() as kernel:
...         (await kernel.run("print(1)")).text
'1\\n'
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Self

import aiohttp
from yarl import URL

from madang.kit.ids import new_nonce
from madang.manager.jupyter.rules import frames
from madang.manager.jupyter.rules.frames import Message

PATIENCE_S: Final = 40.0


@dataclass(slots=True)
class Run:
    """What came of one request, as far as it was waited for."""

    messages: list[Message] = field(default_factory=list)

    @property
    def told(self) -> list[str]:
        """Kinds of messages in their order; states stand for themselves."""
        return [m.content.get("execution_state", m.kind) for m in self.messages]

    @property
    def text(self) -> str:
        return "".join(m.content["text"] for m in self.messages if m.kind == "stream")

    @property
    def reply(self) -> dict[str, Any]:
        return next(m.content for m in self.messages if m.kind.endswith("_reply"))

    @property
    def result(self) -> str:
        found = [m.content["data"] for m in self.messages if m.kind == "execute_result"]
        return str(found[0]["text/plain"]) if found else ""


class Channels:
    """One WebSocket to a kernel."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, kernel: str, client: str) -> None:
        self.kernel: Final = kernel
        self.client: Final = client
        self.socket: Final = socket
        self._protocol: Final = socket.protocol or ""

    async def send(self, channel: str, kind: str, content: dict[str, Any]) -> str:
        """Id of the message."""
        header = {
            "msg_id": new_nonce(),
            "msg_type": kind,
            "session": self.client,
            "username": "tester",
            "version": "5.4",
            "date": "2026-01-01T00:00:00.000000Z",
        }
        message = Message(channel=channel, header=header, content=content)
        data = frames.pack(message, self._protocol)
        if isinstance(data, str):
            await self.socket.send_str(data)
        else:
            await self.socket.send_bytes(data)
        return message.id

    async def execute(self, code: str, **more: Any) -> str:
        return await self.send("shell", "execute_request", {"code": code, **more})

    async def next(self) -> Message:
        """The next message of any kind. Raises ConnectionError when the server closes."""
        async with asyncio.timeout(PATIENCE_S):
            got = await self.socket.receive()
        if got.type is aiohttp.WSMsgType.TEXT:
            return message_of(json.loads(got.data))
        if got.type is aiohttp.WSMsgType.BINARY:
            return _unpack(got.data)
        raise ConnectionError(f"{got.type.name} {got.data} {got.extra}")

    async def until_idle(self, request: str, *, replies: int = 1) -> Run:
        """All messages that belong to *request*, up to its last."""
        run = Run()
        while "idle" not in run.told or sum(k.endswith("_reply") for k in run.told) < replies:
            message = await self.next()
            if message.parent.get("msg_id") == request:
                run.messages.append(message)
        return run

    async def until(self, kind: str) -> Message:
        """The first message of that kind, or telling that state."""
        while True:
            message = await self.next()
            if kind in {message.kind, message.content.get("execution_state")}:
                return message

    async def run(self, code: str, **more: Any) -> Run:
        return await self.until_idle(await self.execute(code, **more))

    async def ask(
        self, kind: str, content: dict[str, Any], channel: str = "shell"
    ) -> dict[str, Any]:
        run = await self.until_idle(await self.send(channel, f"{kind}_request", content))
        return run.reply


class Jupyter:
    """``/jupyter/USER`` of a server."""

    def __init__(self, url: str, token: str, user: str = "admin") -> None:
        self.base: Final = f"{url}/jupyter/{user}"
        self._token: Final = token

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"token {self._token}"}
        self.http = aiohttp.ClientSession(headers=headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.close()

    async def ask(self, method: str, path: str, status: int | None = None, **more: Any) -> Any:
        """The answer's JSON; asserts its *status*, or that it tells no error."""
        url = URL(self.base + path, encoded=True)
        async with self.http.request(method, url, **more) as answer:
            text = await answer.text()
            right = answer.status < 400 if status is None else answer.status == status
            assert right, f"{method} {path}: {answer.status} {text}"
            return json.loads(text) if text else None

    async def start(self, name: str = "python", **env: str) -> str:
        """Id of a new kernel."""
        made = await self.ask("POST", "/api/kernels", 201, json={"name": name, "env": env})
        return str(made["id"])

    @asynccontextmanager
    async def channels(
        self, kernel: str, *, client: str = "", protocols: Sequence[str] = (frames.V1,)
    ) -> AsyncIterator[Channels]:
        client = client or new_nonce()
        url = f"{self.base}/api/kernels/{kernel}/channels?session_id={client}"
        async with self.http.ws_connect(url, protocols=protocols) as socket:
            yield Channels(socket, kernel, client)

    @asynccontextmanager
    async def kernel(self, name: str = "python") -> AsyncIterator[Channels]:
        """A new kernel and its channels; it is ended afterwards."""
        kernel = await self.start(name)
        try:
            async with self.channels(kernel) as channels:
                yield channels
        finally:
            async with self.http.delete(f"{self.base}/api/kernels/{kernel}"):
                pass


def message_of(found: dict[str, Any]) -> Message:
    return Message(
        channel=found["channel"],
        header=found["header"],
        parent=found["parent_header"],
        metadata=found["metadata"],
        content=found["content"],
    )


def _unpack(data: bytes) -> Message:
    """Written anew, so that what the server packs is checked against more than itself."""
    numbers = [
        int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data) // 8 * 8, 8)
    ]
    offsets = numbers[1 : numbers[0] + 1]
    parts = [data[a:b] for a, b in pairwise(offsets)]
    header, parent, metadata, content = map(json.loads, parts[1:5])
    found = {"header": header, "parent_header": parent, "metadata": metadata, "content": content}
    return message_of({**found, "channel": parts[0].decode()})
