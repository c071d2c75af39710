"""Interpreters of sessions: start, run cells, follow what happens."""

from madang.manager.cells.service.service import CellService

__all__ = ["CellService"]
