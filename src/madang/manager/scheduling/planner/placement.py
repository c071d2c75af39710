"""Which of the machines that have room: rows of scores, lower is better.

A plugin is a class with the three methods of ``Placement``; it is registered under the entry point
group ``madang.placements`` and named in ``Policy.placement``. Scores may depend on the book and on
the policy alone. Infeasible machines are left out by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final, Protocol

import numpy as np

from madang.manager.scheduling.planner.book import Book, Floats, Ints
from madang.manager.scheduling.types import Policy


class Placement(Protocol):
    """Made for one pass over one group. All three ways to a score give exactly the same."""

    def __init__(self, book: Book, policy: Policy) -> None: ...

    def row(self, shape: int) -> Floats:
        """Of one shape on each machine."""

    def block(self, nodes: Sequence[int], shapes: Ints, slack: Floats) -> Floats:
        """(machines, shapes): of some shapes on some machines.

        *slack* is ``book.slack(nodes, shapes)``: what each would leave there.
        """

    def score(self, node: int, shape: int) -> float:
        """Of one shape on one machine, where it has room."""

    def pick(self, node: int, shape: int) -> tuple[tuple[int, int], ...]:
        """Which devices of the machine."""


class Pack:
    """The machine that is fullest afterwards: large gaps stay for large sessions.

    Only what is asked for counts, and devices always, so that a session without one goes where
    few are left.
    """

    sign: ClassVar[float] = 1.0

    def __init__(self, book: Book, policy: Policy) -> None:
        self._book: Final = book
        counts = (book.need > 0).astype(np.float64)
        counts[:, -3:-1] = 0
        counts[:, -1] = 1
        self._counts: Final = counts * self.sign
        self._across: Final = np.ascontiguousarray(self._counts.T)
        self._need: Final = book.need.astype(np.float64)
        self._terms: Final = [
            [(column, need, counts) for column, (need, counts) in enumerate(pairs) if counts]
            for pairs in np.stack((self._need, self._counts), 2).tolist()
        ]
        """By shape: what counts, in the order of columns."""
        self._inverse: Final[dict[int, list[float]]] = {}

    def row(self, shape: int) -> Floats:
        book = self._book
        score = np.zeros(len(book.rooms))
        for column, counts in enumerate(self._counts[shape].tolist()):
            if counts:
                left = book.amounts[column] - self._need[shape, column]
                score += left * counts * book.inverse[column]
        return score

    def block(self, nodes: Sequence[int], shapes: Ints, slack: Floats) -> Floats:
        left = slack * self._across.take(shapes, 1)[:, None, :]
        left *= self._book.inverse.take(nodes, 1)[:, :, None]
        found: Floats = np.add.reduce(left)
        return found

    def score(self, node: int, shape: int) -> float:
        amounts = self._book.state(node).amounts
        if (inverse := self._inverse.get(node)) is None:
            inverse = self._inverse[node] = self._book.inverse[:, node].tolist()
        found = 0.0
        for column, need, counts in self._terms[shape]:
            found += (amounts[column] - need) * counts * inverse[column]
        return found

    def pick(self, node: int, shape: int) -> tuple[tuple[int, int], ...]:
        return self._book.pick(node, shape)


class Spread(Pack):
    """The machine, and the device, that is emptiest afterwards."""

    sign: ClassVar[float] = -1.0

    def pick(self, node: int, shape: int) -> tuple[tuple[int, int], ...]:
        if share := self._book.shapes[shape].share:
            return ((int(np.argmax(self._book.state(node).devices)), share),)
        return self._book.pick(node, shape)
