"""What streams carry: frames of output, messages of the stream protocol, server-sent events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from madang.kit.codec import from_json
from madang.wire.api import Event, ServerMessage
from madang.wire.errors import InvalidRequest, PlatformError
from madang.wire.log import HEADER, MAGIC, MAX_DATA, LogGap, LogRecord, Stream
from madang.wire.policy import Refusal
from madang.wire.session import Session

_OFFSET_SIZE: Final = 8

Output = LogRecord | LogGap


@dataclass(frozen=True, slots=True)
class ExecOpened:
    """The program of an exec has started."""

    exec_id: str


StreamEvent = LogRecord | LogGap | Session | ExecOpened | Refusal


class Frames:
    """Cuts a byte stream of frames (offset u64 LE, record) into records, with gaps where the
    offsets jump. ``next_offset`` is where a new request continues.
    """

    def __init__(self, next_offset: int | None = None) -> None:
        self.next_offset = next_offset
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Output]:
        """Whatever became complete. Records that came before are dropped."""
        self._buffer += data
        found: list[Output] = []
        at, buffer = 0, self._buffer
        while (record := _parse(buffer, at)) is not None:
            at += _OFFSET_SIZE + HEADER.size + len(record.data)
            found += self._place(record)
        del buffer[:at]
        return found

    def _place(self, record: LogRecord) -> list[Output]:
        expected = self.next_offset
        if expected is not None and record.offset < expected:
            return []
        self.next_offset = record.end
        if expected is not None and record.offset > expected:
            return [LogGap(expected, record.offset), record]
        return [record]


def _parse(buffer: bytes | bytearray, at: int) -> LogRecord | None:
    """The frame at *at*, None if it is not complete. Raises PlatformError on garbage."""
    head_end = at + _OFFSET_SIZE + HEADER.size
    if len(buffer) < head_end:
        return None
    offset = int.from_bytes(buffer[at : at + _OFFSET_SIZE], "little")
    magic, stream, length, at_us = HEADER.unpack_from(buffer, at + _OFFSET_SIZE)
    if magic != MAGIC or length > MAX_DATA or stream > Stream.STDERR:
        raise PlatformError(
            "the server's output stream is damaged: no log record where one begins."
        )
    if len(buffer) < head_end + length:
        return None
    data = bytes(buffer[head_end : head_end + length])
    return LogRecord(offset, at_us, Stream(stream), data)


def parse_record(message: bytes) -> LogRecord:
    """One binary message of a stream."""
    record = _parse(message, 0)
    if record is None:
        raise PlatformError("the server's output stream is damaged: a record is cut short.")
    return record


def parse_message(text: bytes | str) -> ServerMessage:
    """One text message of a stream."""
    try:
        return from_json(ServerMessage, text)
    except InvalidRequest as exc:
        raise PlatformError(f"the server's message can't be read: {exc}") from exc


class ServerSentEvents:
    """Cuts ``text/event-stream`` into Events; ``last_id`` is where a new request continues."""

    def __init__(self, last_id: int | None = None) -> None:
        self.last_id = last_id
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Event]:
        blocks = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        self._rest = blocks.pop()
        for block in blocks:
            if event := _event(block.split(b"\n")):
                self.last_id = event.id
                yield event


def _event(lines: Iterable[bytes]) -> Event | None:
    data = b"\n".join(line[5:].lstrip(b" ") for line in lines if line.startswith(b"data:"))
    if not data:
        return None
    try:
        return from_json(Event, data)
    except InvalidRequest as exc:
        raise PlatformError(f"the server's event can't be read: {exc}") from exc
