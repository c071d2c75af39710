"""Messages of the channels WebSocket, in both forms; clients may send anything."""

from __future__ import annotations

import json
import struct
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.kit.ids import new_id
from madang.manager.jupyter.rules.frames import V1, Message, pack, unpack
from madang.manager.jupyter.rules.ids import kernel_id, session_id
from madang.wire.errors import InvalidRequest, NotFound

HEADER = {"msg_id": "m1", "msg_type": "execute_request", "session": "s"}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), VALUES, max_size=4)


@given(
    channel=st.sampled_from(["shell", "control", "stdin"]),
    content=OBJECTS,
    parent=OBJECTS,
    buffers=st.lists(st.binary(max_size=40), max_size=4),
    protocol=st.sampled_from([V1, ""]),
)
def test_what_is_packed_is_read_again(
    channel: str,
    content: dict[str, Any],
    parent: dict[str, Any],
    buffers: list[bytes],
    protocol: str,
) -> None:
    message = Message(
        channel=channel, header=HEADER, parent=parent, content=content, buffers=tuple(buffers)
    )
    assert unpack(pack(message, protocol), protocol) == message


@given(data=st.binary(max_size=200), protocol=st.sampled_from([V1, ""]))
def test_garbage_is_refused_in_words(data: bytes, protocol: str) -> None:
    with pytest.raises(InvalidRequest):
        unpack(data, protocol)


@given(cut=st.integers(0, 400), flip=st.integers(0, 400), protocol=st.sampled_from([V1, ""]))
def test_a_damaged_message_never_fails_otherwise(cut: int, flip: int, protocol: str) -> None:
    message = Message(channel="shell", header=HEADER, content={"code": "1"}, buffers=(b"x" * 30,))
    data = bytearray(pack(message, protocol))  # type: ignore[arg-type]
    data[flip % len(data)] ^= 0x81
    try:
        unpack(bytes(data[: max(cut, 8)]), protocol)
    except InvalidRequest:
        pass


@pytest.mark.parametrize(
    "given",
    [
        "[]",
        "{}",
        "nonsense",
        json.dumps({"header": {"msg_id": 1, "msg_type": "x"}}),
        json.dumps({"header": {"msg_id": "a" * 201, "msg_type": "x"}}),
        json.dumps({"header": {"msg_id": "a", "msg_type": ""}}),
        json.dumps({"header": HEADER | {"username": "a" * 201}}),
        json.dumps({"header": HEADER | {"session": {}}}),
        json.dumps({"header": HEADER, "channel": "iopub"}),
        json.dumps({"header": HEADER, "content": []}),
        json.dumps({"header": HEADER, "channel": {"a": 1}}),
    ],
)
def test_text_that_is_no_message_is_refused(given: str) -> None:
    with pytest.raises(InvalidRequest):
        unpack(given, "")


def test_offsets_that_go_back_or_outside_are_refused() -> None:
    data = bytearray(pack(Message(channel="shell", header=HEADER), V1))  # type: ignore[arg-type]
    for place, value in ((16, 0), (24, 1 << 40), (0, 1 << 63), (0, 3)):
        broken = bytearray(data)
        struct.pack_into("<Q", broken, place, value)
        with pytest.raises(InvalidRequest):
            unpack(bytes(broken), V1)


def test_a_kernel_is_a_session_by_another_name() -> None:
    session = new_id()
    kernel = kernel_id(session)
    assert str(uuid.UUID(kernel)) == kernel
    assert session_id(kernel) == session


@given(st.uuids())
def test_every_uuid_names_one_session(value: uuid.UUID) -> None:
    assert kernel_id(session_id(str(value))) == str(value)


@pytest.mark.parametrize("given", ["", "x", "../..", "0" * 31, "admin/x"])
def test_what_is_no_uuid_is_no_kernel(given: str) -> None:
    with pytest.raises(NotFound):
        session_id(given)
