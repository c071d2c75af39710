"""What a client is told that may have been a client of the server before this one.

Nobody knows what it has seen. So of each cell that was not over some time before this server
began, it is told everything, after its output was cleared: what came twice stands there once.
"""

from __future__ import annotations

from typing import Final

from madang.wire.cells import CellEvent, EventKind

MAX_HELD: Final = 2000
"""Events of one cell; of a longer story the end is told."""


class CatchingUp:
    """Fed with all events that are kept, from the oldest on.

    A cell whose beginning is no longer kept is told without a clear.
    """

    def __init__(self, began: float, overlap_s: float) -> None:
        """*began*: Unix time since when nobody else tells. What was over *overlap_s* before it is
        not told.
        """
        self._began: Final = began
        self._since: Final = began - overlap_s
        self._held: Final[dict[str, list[CellEvent]]] = {}
        self._told: Final[set[str]] = set()

    @property
    def holds(self) -> bool:
        """Whether there is something that may still have to be told."""
        return bool(self._held)

    def take(self, event: CellEvent) -> list[CellEvent]:
        """The events to tell now."""
        cell, late = event.cell, event.at >= self._since
        if not cell:
            return [event] if late else []
        if cell in self._told:
            return self._cleared([event])
        held = self._held.setdefault(cell, [])
        held.append(event)
        del held[:-MAX_HELD]
        if late or event.kind is EventKind.DONE:
            del self._held[cell]
        if late:
            self._told.add(cell)
            return self._cleared(held)
        return []

    def _cleared(self, events: list[CellEvent]) -> list[CellEvent]:
        """With the order to clear what the client may have of a cell that began before."""
        found = []
        for event in events:
            found.append(event)
            if event.kind is EventKind.RUNNING and event.at < self._began:
                clear = CellEvent(seq=event.seq, at=event.at, kind=EventKind.CLEAR, cell=event.cell)
                found.append(clear)
        return found
