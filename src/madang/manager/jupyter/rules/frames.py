"""Messages of the channels WebSocket in both of its forms.

``v1.kernel.websocket.jupyter.org``: always binary; offsets (u64 LE) of channel, header, parent
header, metadata, content and each buffer. The older form: JSON text, or where there are buffers a
count and offsets (u32 BE) before the JSON and the buffers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

from madang.kit.codec import from_json, to_json
from madang.wire.errors import InvalidRequest

V1: Final = "v1.kernel.websocket.jupyter.org"
CHANNELS: Final = frozenset({"shell", "control", "stdin"})
"""What clients write to."""
MAX_BUFFERS: Final = 256
MAX_WORD: Final = 200
_HEADER: Final = ("msg_id", "msg_type", "session", "username", "date", "version")
_JSON_PARTS: Final = 4
_U64: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of Jupyter's protocol."""

    channel: str
    header: dict[str, Any]
    parent: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)
    buffers: tuple[bytes, ...] = ()
    size: int = field(default=0, compare=False)
    """Bytes, of what a client sent."""

    @property
    def kind(self) -> str:
        return str(self.header["msg_type"])

    @property
    def id(self) -> str:
        return str(self.header["msg_id"])


def pack(message: Message, protocol: str) -> str | bytes:
    """As it goes to a client; text only in the older form."""
    if protocol == V1:
        return _pack_v1(message)
    body = to_json(
        {
            "channel": message.channel,
            "header": message.header,
            "msg_id": message.id,
            "msg_type": message.kind,
            "parent_header": message.parent,
            "metadata": message.metadata,
            "content": message.content,
            "buffers": [],
        }
    )
    if not message.buffers:
        return body.decode()
    parts = [body, *message.buffers]
    offsets = [4 * (len(parts) + 1)]
    for part in parts[:-1]:
        offsets.append(offsets[-1] + len(part))
    return struct.pack(f"!{len(parts) + 1}I", len(parts), *offsets) + b"".join(parts)


def unpack(data: str | bytes, protocol: str) -> Message:
    """What a client sent. Raises InvalidRequest."""
    if isinstance(data, str):
        found = _from_object(from_json(dict[str, Any], data), ())
    else:
        found = _unpack_v1(data) if protocol == V1 else _unpack_old(data)
    return replace(found, size=len(data))


def _pack_v1(message: Message) -> bytes:
    parts = [
        message.channel.encode(),
        *map(to_json, (message.header, message.parent, message.metadata, message.content)),
        *message.buffers,
    ]
    offsets = [8 * (len(parts) + 2)]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    head = b"".join(map(_U64.pack, (len(offsets), *offsets)))
    return head + b"".join(parts)


def _unpack_v1(data: bytes) -> Message:
    fewest = _JSON_PARTS + 2
    count = _U64.unpack_from(data)[0] if len(data) >= _U64.size else 0
    if not fewest <= count <= fewest + MAX_BUFFERS or len(data) < 8 * (count + 1):
        raise _broken("its table of offsets does not fit")
    offsets = struct.unpack_from(f"<{count}Q", data, 8)
    channel, *parts = _cut(data, offsets, 8 * (count + 1))
    texts = parts[:_JSON_PARTS]
    header, parent, metadata, content = (from_json(dict[str, Any], text) for text in texts)
    found = {
        "channel": channel.decode("ascii", "replace"),
        "header": header,
        "parent_header": parent,
        "metadata": metadata,
        "content": content,
    }
    return _from_object(found, tuple(parts[_JSON_PARTS:]))


def _unpack_old(data: bytes) -> Message:
    count = struct.unpack_from("!I", data)[0] if len(data) >= 4 else 0
    if not 1 <= count <= MAX_BUFFERS + 1 or len(data) < 4 * (count + 1):
        raise _broken("its table of offsets does not fit")
    offsets = (*struct.unpack_from(f"!{count}I", data, 4), len(data))
    body, *buffers = _cut(data, offsets, 4 * (count + 1))
    return _from_object(from_json(dict[str, Any], body), tuple(buffers))


def _cut(data: bytes, offsets: tuple[int, ...], head: int) -> list[bytes]:
    """The parts between offsets, which may only grow and lie behind the *head*."""
    ordered = all(a <= b for a, b in pairwise(offsets))
    if not ordered or offsets[0] < head or offsets[-1] > len(data):
        raise _broken("its offsets don't lie one after the other")
    return [data[a:b] for a, b in pairwise(offsets)]


def _from_object(found: dict[str, Any], buffers: tuple[bytes, ...]) -> Message:
    parts = {}
    for name in ("header", "parent_header", "metadata", "content"):
        value = found.get(name)
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise _broken(f"{name} is no object")
        parts[name] = value
    channel = found.get("channel", "shell")
    if not isinstance(channel, str) or channel not in CHANNELS:
        raise _broken(f"channel {str(channel)[:20]!r} is none of {', '.join(sorted(CHANNELS))}")
    return Message(
        channel=channel,
        header=_header(parts["header"]),
        parent=parts["parent_header"],
        metadata=parts["metadata"],
        content=parts["content"],
        buffers=buffers,
    )


def _header(found: dict[str, Any]) -> dict[str, Any]:
    """What replies repeat of it: headers are kept, so that they must be small."""
    header: dict[str, Any] = {name: found[name] for name in _HEADER if name in found}
    for name, value in header.items():
        if not isinstance(value, str) or len(value) > MAX_WORD:
            raise _broken(f"{name} of its header is no short text")
    if not header.get("msg_id") or not header.get("msg_type"):
        raise _broken("its header has no msg_id or no msg_type")
    return header


def _broken(why: str) -> InvalidRequest:
    return InvalidRequest(f"not a message of Jupyter's protocol: {why}.")
