"""A session's output on disk and on the wire: records in one order, streams apart.

The keeper appends records to segment files named by the *offset* of their first byte. An offset is
a position in the endless sequence of records (headers included): it never repeats, and a
reader continues exactly where it stopped. When the segments together pass the kept size, the
oldest are deleted; a reader that asks for an offset before the oldest kept one gets a gap.

Record: magic ``0xA7`` u8, stream u8, two zero bytes, data length u32, microseconds since the epoch
u64, all little-endian, then the data (at most 64 KiB).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

HEADER: Final = struct.Struct("<BBxxIQ")
MAGIC: Final = 0xA7
MAX_DATA: Final = 64 * 1024


class Stream(IntEnum):
    STDIN = 0
    STDOUT = 1
    STDERR = 2


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One chunk of output, byte for byte as the program wrote it."""

    offset: int
    """Where the record begins."""
    at_us: int
    """When it was read from the program, microseconds since the epoch, UTC."""
    stream: Stream
    data: bytes

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.offset + HEADER.size + len(self.data)


@dataclass(frozen=True, slots=True)
class LogGap:
    """Output between two offsets that is no longer kept."""

    start: int
    end: int


def pack(stream: int, at_us: int, data: bytes) -> bytes:
    """One record as bytes; *data* has at most MAX_DATA bytes."""
    return HEADER.pack(MAGIC, stream, len(data), at_us) + data


def unpack(buffer: bytes, offset: int) -> tuple[list[LogRecord], int]:
    """Records in *buffer*, whose first byte lies at *offset*, and the offset after the last.

    A record that is not complete yet stays for the next call. Raises ValueError on garbage.
    """
    found: list[LogRecord] = []
    at, size = 0, len(buffer)
    while size - at >= HEADER.size:
        magic, stream, length, at_us = HEADER.unpack_from(buffer, at)
        if magic != MAGIC or length > MAX_DATA or stream > Stream.STDERR:
            raise ValueError(f"no log record at offset {offset + at}")
        end = at + HEADER.size + length
        if end > size:
            break
        data = bytes(buffer[at + HEADER.size : end])
        found.append(LogRecord(offset + at, at_us, Stream(stream), data))
        at = end
    return found, offset + at
