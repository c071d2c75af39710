"""The WebSocket protocol without I/O."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.client import websocket as ws
from madang.client.websocket import Decoder, ProtocolError


def server_frame(first: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 1 << 16:
        return bytes((first, 126)) + size.to_bytes(2) + payload
    return bytes((first, 127)) + size.to_bytes(8) + payload


def unmask(frame: bytes) -> bytes:
    size, at = frame[1] & 0x7F, 2
    if size == 126:
        at = 4
    elif size == 127:
        at = 10
    mask, data = frame[at : at + 4], frame[at + 4 :]
    return bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))


@given(st.one_of(st.binary(max_size=300), st.integers(65_530, 65_540).map(bytes)))
def test_what_is_sent_is_masked_and_can_be_read_by_the_server(payload: bytes) -> None:
    frame = ws.encode(ws.BINARY, payload)

    assert frame[0] == 0x82
    assert frame[1] & 0x80
    assert unmask(frame) == payload


@given(st.lists(st.binary(max_size=200), max_size=5), st.data())
def test_messages_arrive_however_the_bytes_are_cut(
    messages: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(server_frame(0x82, message) for message in messages)
    decoder, found = Decoder(), []

    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        found += decoder.feed(stream[:cut])
        stream = stream[cut:]

    assert found == [(ws.BINARY, message) for message in messages]


def test_fragments_are_joined_and_control_frames_pass_between_them() -> None:
    stream = server_frame(0x01, b"he") + server_frame(0x89, b"?") + server_frame(0x80, b"llo")

    assert Decoder().feed(stream) == [(ws.PING, b"?"), (ws.TEXT, b"hello")]


@pytest.mark.parametrize(
    "stream",
    [
        bytes((0xC2, 0)),  # reserved bit
        bytes((0x82, 0x81, 0, 0, 0, 0, 0)),  # masked
        server_frame(0x09, b""),  # a ping in fragments
        server_frame(0x80, b"rest of nothing"),
        server_frame(0x02, b"a") + server_frame(0x82, b"b"),  # a message within another
        bytes((0x82, 127)) + (1 << 40).to_bytes(8),
    ],
)
def test_a_server_that_breaks_the_protocol_is_noticed(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        Decoder().feed(stream)


@given(st.binary(max_size=100))
def test_garbage_never_does_more_than_raise(garbage: bytes) -> None:
    try:
        Decoder().feed(garbage)
    except ProtocolError:
        pass


def test_the_handshake_key_of_the_standard_gives_the_answer_of_the_standard() -> None:
    assert ws.accept_for("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def test_a_header_can_not_be_smuggled_in() -> None:
    with pytest.raises(ValueError, match="line break"):
        ws.request_head("/", "host", "key", {"Authorization": "Bearer a\r\nX: y"})
