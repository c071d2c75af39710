"""Where each shape goes best while a pass fills machines.

A shape's row of scores is computed when it is asked for first. Each placement changes a machine:
its scores are computed one by one, for the shapes that are asked for next, until ``BATCH`` machines
have changed; then for all shapes that are still to come, at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import numpy as np

from madang.manager.scheduling.planner.book import Book, Floats, Ints
from madang.manager.scheduling.planner.placement import Placement

BATCH: Final = 8


class Scores:
    """Of one pass; *asks* are the shapes of all that wait."""

    def __init__(self, book: Book, placement: Placement, asks: Iterable[int]) -> None:
        self._book: Final = book
        self._placement: Final = placement
        self._rows: Final[Floats] = np.empty((len(book.shapes), len(book.rooms)))
        self._row: Final = list(self._rows)
        self._to_come: Final = [0] * len(book.shapes)
        for shape in asks:
            self._to_come[shape] += 1
        self._current: Final[set[int]] = set()
        """Shapes whose rows hold, but for the machines that have changed."""
        self._shapes: Ints | None = None
        """The same, in order."""
        self._changed: Final[dict[int, list[int]]] = {}

    def best(self, shape: int) -> int | None:
        """The machine; None: there is none with room."""
        row = self._row[shape]
        if not len(row):
            return None
        if shape not in self._current:
            row[:] = np.where(self._book.fits(shape), self._placement.row(shape), np.inf)
            self._current.add(shape)
            self._shapes = None
        else:
            self._look_again(row, shape)
        node = int(row.argmin())
        return None if row.item(node) == math.inf else node

    def _look_again(self, row: Floats, shape: int) -> None:
        asked, score = self._book.asked[shape], self._placement.score
        allowed = self._book.allowed[shape] if self._book.restricted else None
        for node, amounts in self._changed.items():
            for column, need in asked:
                if amounts[column] < need:
                    row[node] = math.inf
                    break
            else:
                may = allowed is None or allowed[node]
                row[node] = score(node, shape) if may else math.inf

    def change(self, node: int) -> None:
        """Something on it is different."""
        self._changed[node] = self._book.state(node).amounts
        if len(self._changed) >= BATCH:
            self._catch_up()

    def answered(self, shape: int) -> None:
        """One of those that wait."""
        self._to_come[shape] -= 1
        if self._to_come[shape] <= 0:
            self.drop(shape)

    def drop(self, shape: int) -> None:
        """It will hardly be asked for again."""
        self._current.discard(shape)
        self._shapes = None

    def _catch_up(self) -> None:
        nodes = list(self._changed)
        self._changed.clear()
        if not self._current:
            return
        if self._shapes is None:
            self._shapes = np.array(sorted(self._current), np.int64)
        shapes = self._shapes
        slack = self._book.slack(nodes, shapes)
        scores = self._placement.block(nodes, shapes, slack)
        np.copyto(scores, np.inf, where=np.minimum.reduce(slack) < 0)
        across = shapes[:, None], np.array(nodes)
        if self._book.restricted:
            scores[~self._book.allowed[across].T] = np.inf
        self._rows[across] = scores.T
