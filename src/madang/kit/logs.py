"""Log lines: time, level, logger, message, then ``key=value`` pairs from ``extra``."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Final, TextIO

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class KeyValueFormatter(logging.Formatter):
    """``2026-11-22T10:00:00.123Z info madang.agent session started kernel=…``"""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        pairs = "".join(
            f" {key}={_quote(value)}"
            for key, value in vars(record).items()
            if key not in _STANDARD and not key.startswith("_")
        )
        line = (
            f"{stamp}.{int(record.msecs):03d}Z {record.levelname.lower()} {record.name} "
            f"{record.getMessage()}{pairs}"
        )
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _quote(value: object) -> str:
    text = str(value)
    return repr(text) if not text or any(c.isspace() or c in "\"'=" for c in text) else text


class LogFile(logging.StreamHandler[TextIO]):
    """Writes to *stream*, a file; once that is too long, *turn_over* puts another in its place."""

    def __init__(self, stream: TextIO, max_bytes: int, turn_over: Callable[[], None]) -> None:
        super().__init__(stream)
        self._max_bytes: Final = max_bytes
        self._turn_over: Final = turn_over

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        with contextlib.suppress(OSError):  # a full disk: the next line tries again
            if os.fstat(self.stream.fileno()).st_size > self._max_bytes:
                self._turn_over()


def configure(level: str = "info", handler: logging.StreamHandler[TextIO] | None = None) -> None:
    """Send all logging to *handler* (stderr) in our form; replaces earlier handlers."""
    handler = handler or logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyValueFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
