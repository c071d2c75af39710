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
    """Fed with all events that are kept, from the oldest on."""

    def __init__(self, since: float) -> None:
        """*since*: Unix time; what was over then is not told."""
        self._since: Final = since
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
            return [event]
        held = self._held.setdefault(cell, [])
        held.append(event)
        del held[:-MAX_HELD]
        if late or event.kind is EventKind.DONE:
            del self._held[cell]
        if late:
            self._told.add(cell)
            return _cleared(held)
        return []


def _cleared(held: list[CellEvent]) -> list[CellEvent]:
    """With the order to clear what the client may have, if there is anything that it may have."""
    if len(held) < 2:
        return held
    last = held[-1]
    clear = CellEvent(seq=held[0].seq, at=last.at, kind=EventKind.CLEAR, cell=last.cell)
    at = next((n for n, each in enumerate(held) if each.kind is EventKind.RUNNING), -1) + 1
    return [*held[:at], clear, *held[at:]]
