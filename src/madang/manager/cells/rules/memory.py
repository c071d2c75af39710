"""The newest events of an interpreter."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from operator import attrgetter
from typing import Final

from madang.manager.cells.types import CellSettings
from madang.wire.cells import CellEvent

_SEQ: Final = attrgetter("seq")


class Recent:
    """Bounded by number and size; when full, the older half goes."""

    def __init__(self, settings: CellSettings) -> None:
        self._settings: Final = settings
        self._events: list[CellEvent] = []
        self._sizes: list[int] = []
        self._size = 0
        self.gone = 0
        """Number of the newest event that is held no more."""

    def add(self, events: Iterable[CellEvent]) -> None:
        for event in events:
            size = size_of(event)
            self._events.append(event)
            self._sizes.append(size)
            self._size += size
        limit = self._settings
        while len(self._events) > limit.kept_events or (
            self._size > limit.kept_bytes and len(self._events) > 1
        ):
            self._forget(max(1, len(self._events) // 2))

    @property
    def newest(self) -> int:
        """Number of the newest event."""
        return self._events[-1].seq if self._events else self.gone

    def after(self, seq: int) -> list[CellEvent] | None:
        """Those with larger numbers; None where some of them are held no more."""
        if seq < self.gone:
            return None
        return self._events[bisect_right(self._events, seq, key=_SEQ) :]

    def _forget(self, count: int) -> None:
        self.gone = self._events[count - 1].seq
        self._size -= sum(self._sizes[:count])
        del self._events[:count]
        del self._sizes[:count]


def size_of(event: CellEvent) -> int:
    """About as many bytes as it takes."""
    size = 500 + len(event.text) + len(event.code)
    for value in event.data.values():
        size += len(value) if isinstance(value, str) else len(repr(value))
    if event.error is not None:
        size += len(event.error.text) + sum(map(len, event.error.traceback))
    return size
