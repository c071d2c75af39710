"""A program's output on disk: segments of ``wire.log`` records, the oldest deleted."""

from __future__ import annotations

import os
import time
from typing import Final

from madang.wire.log import HEADER, MAGIC

SEGMENT_BYTES: Final = 4 * 1024 * 1024
_LEAST_SEGMENTS: Final = 4
"""So that a small limit still keeps most of itself when the oldest goes."""


class Log:
    """Appends; never raises for a full disk: the program must not stall for its output."""

    def __init__(self, folder: str, limit_bytes: int) -> None:
        self._folder = folder
        self._segment_bytes = min(SEGMENT_BYTES, limit_bytes // _LEAST_SEGMENTS)
        self._limit_bytes = limit_bytes
        self._segments: list[int] = []
        """Offsets at which the kept segments begin."""
        self._fd = -1
        self._used = 0
        """Bytes in the newest segment."""
        self.end = 0
        """Offset after the last record."""
        self.dropped_bytes = 0
        os.makedirs(folder, 0o700, exist_ok=True)

    def append(self, stream: int, data: bytes) -> None:
        """Keep *data*, at most ``wire.log.MAX_DATA`` bytes."""
        header = HEADER.pack(MAGIC, stream, len(data), time.time_ns() // 1000)
        size = len(header) + len(data)
        try:
            self._make_room(size)
            written = os.writev(self._fd, (header, data))
        except OSError:
            self.dropped_bytes += len(data)
            return
        if written < size:  # The disk got full inside the record: take the torn part back.
            os.ftruncate(self._fd, self._used)
            self.dropped_bytes += len(data)
            return
        self._used += size
        self.end += size

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _make_room(self, size: int) -> None:
        if self._fd >= 0 and self._used + size <= self._segment_bytes:
            return
        wanted = max(size, self._segment_bytes)
        while self._segments and self.end - self._segments[0] + wanted > self._limit_bytes:
            self._delete_oldest()
        name = f"{self._folder}/{self.end:020d}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(name, flags, 0o600)
        self.close()
        self._fd, self._used = fd, 0
        if self.end not in self._segments:
            self._segments.append(self.end)

    def _delete_oldest(self) -> None:
        oldest = self._segments.pop(0)
        try:
            os.unlink(f"{self._folder}/{oldest:020d}")
        except FileNotFoundError:
            pass
