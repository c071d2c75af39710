"""Reading a program's output from its segment files, at any offset, while they grow and go."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Final

from madang.wire.errors import LogGone
from madang.wire.log import HEADER, MAGIC, MAX_DATA, LogGap, LogRecord, Stream, unpack

LOG: Final = "log"
"""The segments' folder, in an ``io`` folder."""
CHUNK: Final = 256 * 1024
"""Read at once; holds several of the largest records."""
_NAME_LENGTH: Final = 20
_COLD: Final = frozenset({errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL})


def segments(folder: str) -> list[int]:
    """Start offsets of the kept segments, ascending."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(n) for n in names if len(n) == _NAME_LENGTH and n.isdecimal())


def end_offset(folder: str) -> int | None:
    """Where the kept output ends; None where there is none."""
    for start in reversed(segments(folder)):
        with contextlib.suppress(FileNotFoundError):
            return start + os.stat(_path(folder, start)).st_size
    return None


class LogReader:
    """A position in a log; ``read`` goes on from it."""

    def __init__(self, folder: str, offset: int = 0) -> None:
        """*offset* must be a record's beginning; see ``find_start``."""
        self.offset = offset
        self._folder = folder
        self._fd = -1
        self._start = 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def read(self) -> list[LogRecord] | LogGap | None:
        """The next records, at most CHUNK bytes, or what was deleted; None: nothing at present.

        Raises LogGone where the files hold something else.
        """
        while True:
            if self._fd < 0:
                missing = self._open()
                if missing is not None:
                    return self._skip_to(missing)
                if self._fd < 0:
                    return None
            if records := await self._records():
                return records
            following = self._following()
            if following is None:
                return None
            # It may have grown between our look and the beginning of the next segment.
            if records := await self._records():
                return records
            self.close()
            if following > self.offset:
                return self._skip_to(following)

    def _skip_to(self, offset: int) -> LogGap:
        gap = LogGap(self.offset, offset)
        self.offset = offset
        return gap

    def _open(self) -> int | None:
        """Open the segment of the offset; returns the oldest one's start if it is not kept."""
        while starts := segments(self._folder):
            before = [start for start in starts if start <= self.offset]
            if not before:
                return starts[0]
            try:
                self._fd = os.open(_path(self._folder, before[-1]), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            self._start = before[-1]
            return None
        return None

    def _following(self) -> int | None:
        return next((s for s in segments(self._folder) if s > self._start), None)

    async def _records(self) -> list[LogRecord]:
        data = await _read_at(self._fd, self.offset - self._start)
        try:
            records, self.offset = unpack(data, self.offset)
        except ValueError as exc:
            raise LogGone(f"the kept output is damaged: {exc}.") from exc
        return records


async def _read_at(fd: int, position: int) -> bytes:
    """From the page cache at once; from the disk in a thread, so that nobody else waits."""
    buffer = bytearray(CHUNK)
    try:
        count = os.preadv(fd, [buffer], position, os.RWF_NOWAIT)
        return bytes(memoryview(buffer)[:count])
    except OSError as exc:
        if exc.errno not in _COLD:
            raise
    return await asyncio.to_thread(os.pread, fd, CHUNK, position)


def find_start(
    folder: str, *, offset: int, tail_bytes: int | None = None, since_us: int | None = None
) -> int:
    """A record's beginning at or after *offset*, from which the reader should go on.

    With *tail_bytes* so that at least that much data remains, or all; with *since_us* the first
    record that is not older. Offsets before the kept output stay as they are: the reader tells
    the gap. Blocks.
    """
    start = _aligned(folder, offset)
    if tail_bytes is not None:
        start = max(start, _tail(folder, tail_bytes))
    if since_us is not None:
        start = max(start, _since(folder, since_us))
    return start


def _aligned(folder: str, offset: int) -> int:
    before = [start for start in segments(folder) if start <= offset]
    if not before or before[-1] == offset:
        return offset
    for at, _, length in _headers(folder, before[-1]):
        if at >= offset:
            return at
        if at + HEADER.size + length >= offset:
            return at + HEADER.size + length
    return offset


def _tail(folder: str, count: int) -> int:
    starts = segments(folder)
    total = 0
    for start in reversed(starts):
        inside = sum(length for _, _, length in _headers(folder, start))
        if total + inside >= count:
            return _after_data(folder, start, total + inside - count)
        total += inside
    return starts[0] if starts else 0


def _after_data(folder: str, start: int, excess: int) -> int:
    """The record of segment *start* before which at most *excess* bytes of data lie."""
    for at, _, length in _headers(folder, start):
        if excess < length:
            return at
        excess -= length
    return _end(folder, start)


def _end(folder: str, start: int) -> int:
    end = start
    for at, _, length in _headers(folder, start):
        end = at + HEADER.size + length
    return end


def _since(folder: str, since_us: int) -> int:
    starts = segments(folder)
    first = 0
    for index, start in enumerate(starts):
        head = next(_headers(folder, start), None)
        if head is not None and head[1] < since_us:
            first = index
    end = 0
    for start in starts[first:]:
        for at, at_us, length in _headers(folder, start):
            if at_us >= since_us:
                return at
            end = at + HEADER.size + length
    return end


def _headers(folder: str, start: int) -> Iterator[tuple[int, int, int]]:
    """Offset, time and data length of the complete records of one segment."""
    with contextlib.suppress(FileNotFoundError), open(_path(folder, start), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while len(header := file.read(HEADER.size)) == HEADER.size:
            magic, stream, length, at_us = HEADER.unpack(header)
            if magic != MAGIC or length > MAX_DATA or stream > Stream.STDERR:
                return
            if at + HEADER.size + length > size:
                return
            yield start + at, at_us, length
            at += HEADER.size + length
            file.seek(length, os.SEEK_CUR)


def _path(folder: str, start: int) -> str:
    return os.path.join(folder, f"{start:0{_NAME_LENGTH}d}")
