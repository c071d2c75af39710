"""When there will be room, from what runs and when it ends at the latest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from madang.manager.scheduling.planner.book import (
    DEVICE_COLUMNS,
    Book,
    Bools,
    Floats,
    Ints,
    State,
    device_columns,
)
from madang.manager.scheduling.types import Held

NEVER: Final = math.inf


@dataclass(frozen=True, slots=True)
class Chance:
    """Where a gang could start at the earliest; members by machine, and how each looks then."""

    at: float
    counts: tuple[tuple[int, int], ...]
    """Machine, how many members."""
    rooms: tuple[State, ...]
    """Each of these machines at that time."""


class Releases:
    """What runs, in order of machine and end."""

    def __init__(self, book: Book, held: Sequence[Held]) -> None:
        self._book = book
        self._held: list[tuple[int, float, Held]] = []
        for one in held:
            self.add(one)

    def add(self, one: Held) -> None:
        node = self._book.index(one.node)
        if node is not None and one.ends_at is not None:
            self._held.append((node, one.ends_at, one))

    def earliest(self, shape: int, members: int, closed: Bools) -> Chance | None:
        """None: not even when all whose end is known have ended. *closed* machines don't count."""
        book = self._book
        where, when, amounts, devices = self._after()
        after = book.count(shape, amounts, devices)
        after[~book.allowed[shape][where] | closed[where]] = 0
        now = book.count(shape, book.amounts, book.devices)
        now[~book.allowed[shape] | closed] = 0
        before = np.where(np.r_[True, where[1:] != where[:-1]], now[where], np.r_[0, after[:-1]])
        order = np.lexsort((where, when))
        total = int(now.sum()) + np.cumsum((after - before)[order])
        enough = int(np.searchsorted(total, members))
        if enough == len(total):
            return None
        at = float(when[order[enough]])
        last = {int(where[e]): int(e) for e in order[: enough + 1]}
        final = now.copy()
        for node, event in last.items():
            final[node] = after[event]
        newest = int(where[order[enough]])
        return self._choose(at, final, newest, last, members, amounts, devices)

    def _choose(
        self, at: float, final: Ints, newest: int, last: dict[int, int], members: int,
        amounts: Ints, devices: Ints,
    ) -> Chance:  # fmt: skip
        """The machine that completes it first, then those with most room."""
        book = self._book
        counts: list[tuple[int, int]] = []
        rooms: list[State] = []
        order = [newest, *[n for n in np.argsort(-final, kind="stable").tolist() if n != newest]]
        for node in order:
            if members <= 0 or final[node] == 0:
                break
            taken = min(members, int(final[node]))
            members -= taken
            counts.append((node, taken))
            event = last.get(node)
            if event is None:
                rooms.append(book.state(node).copy())
            else:
                rooms.append(State(amounts[:, event].tolist(), devices[event].tolist()))
        return Chance(at, tuple(counts), tuple(rooms))

    def _after(self) -> tuple[Ints, Floats, Ints, Ints]:
        """Machine, time, amounts (columns × n), devices (n × width) after each end."""
        book = self._book
        held = sorted(self._held, key=lambda one: (one[0], one[1], one[2].session))
        where = np.array([node for node, _, _ in held], np.int64)
        when = np.array([end for _, end, _ in held], np.float64)
        columns = len(book.slots)
        freed = np.zeros((columns, len(held)), np.int64)
        for column, slot in enumerate(book.slots):
            freed[column] = [one.slots.get(slot, 0) for _, _, one in held]
        loose = np.zeros((len(held), book.devices.shape[1]), np.int64)
        for number, (_, _, one) in enumerate(held):
            for device, milli in one.devices:
                loose[number, device] += milli
        first = np.searchsorted(where, where)
        sums = np.cumsum(freed, 1)
        sums -= (sums - freed)[:, first]
        both = np.cumsum(loose, 0)
        both -= (both - loose)[first]
        devices: Ints = book.devices[where] + both
        amounts: Ints = np.empty((columns + DEVICE_COLUMNS, len(held)), np.int64)
        amounts[:columns] = book.amounts[:columns, where] + sums
        amounts[columns:] = device_columns(devices)
        return where, when, amounts, devices
