"""A cell put together from its events."""

from __future__ import annotations

from madang.wire.cells import Cell, CellError, CellEvent, CellStatus, EventKind


class Story:
    def __init__(self, interpreter: str, code: str) -> None:
        self.id = ""
        self.asks = False
        """Whether the newest event asks for input."""
        self._interpreter = interpreter
        self._code = code
        self.events: list[CellEvent] = []

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1].kind is EventKind.DONE

    def add(self, event: CellEvent) -> bool:
        """Whether *event* is the cell's."""
        if event.cell != self.id:
            return False
        self.events.append(event)
        self.asks = event.kind is EventKind.INPUT
        return True

    def cell(self) -> Cell:
        count: int | None = None
        error: CellError | None = None
        for event in self.events:
            count = event.count if event.kind is EventKind.RUNNING else count
            error = event.error or error
        last = self.events[-1] if self.events else None
        return Cell(
            id=self.id,
            interpreter=self._interpreter,
            code=self._code,
            status=CellStatus.WAITING if last is None else last.status or CellStatus.RUNNING,
            count=count,
            events=tuple(self.events),
            error=error,
            accepted_at=self.events[0].at if self.events else 0.0,
            took_s=None if last is None else last.took_s,
            cpu_s=None if last is None else last.cpu_s,
            mem_bytes=None if last is None else last.mem_bytes,
        )


def text_of(cell: Cell) -> str:
    """What it printed to stdout."""
    return "".join(
        event.text
        for event in cell.events
        if event.kind is EventKind.STREAM and event.name == "stdout"
    )
