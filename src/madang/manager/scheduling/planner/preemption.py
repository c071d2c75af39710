"""Whom to end so that one that may preempt has room: the least loss that is enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from madang.manager.scheduling.planner.book import Book, Bools, Ints, device_columns
from madang.manager.scheduling.planner.borrowing import Borrowing, Loans
from madang.manager.scheduling.types import Ask, Held, Policy


@dataclass(frozen=True, slots=True)
class Found:
    """Who has to end, those that were told already among them, and where the members go."""

    sessions: tuple[str, ...]
    names: tuple[str, ...]
    counts: tuple[tuple[int, int], ...]


class Victims:
    """What may be ended in one pass."""

    def __init__(self, book: Book, held: Sequence[Held], policy: Policy, now: float) -> None:
        self._book: Final = book
        self._now: Final = now
        self._min_run_s: Final = policy.min_run_s
        self._borrowing: Final = Borrowing(policy.deserved, held)
        self._by_session: Final[dict[str, list[Held]]] = {}
        for one in held:
            self._by_session.setdefault(one.session or one.name, []).append(one)
        self._loans = Loans({})
        self.leaving: Final = {s for s, parts in self._by_session.items() if parts[0].leaving}

    def owed(self, ask: Ask) -> bool:
        """Whether it may take back what others have borrowed."""
        return self._borrowing.owed(ask)

    def find(self, ask: Ask, shape: int, closed: Bools) -> Found | None:
        """For all members, or None."""
        self._loans = self._borrowing.loans() if self.owed(ask) else Loans({})
        for session in self.leaving:
            self._loans.give_back_all(self._by_session[session])
        amounts, devices = self._book.amounts.copy(), self._book.devices.copy()
        chosen: dict[str, None] = {}
        counts: dict[int, int] = {}
        usable = self._book.allowed[shape] & ~closed
        for _ in range(ask.members):
            best = self._best(ask, shape, usable, amounts, devices, chosen)
            if best is None:
                return None
            node, sessions = best
            for session in sessions:
                self._release(session, amounts, devices)
                chosen[session] = None
                if session not in self.leaving:
                    self._loans.give_back_all(self._by_session[session])
            self._take(shape, node, amounts, devices)
            counts[node] = counts.get(node, 0) + 1
            if self._book.shapes[shape].apart:
                usable[node] = False
        if not chosen:
            return None
        names = tuple(self._by_session[one][0].name for one in chosen)
        return Found(tuple(chosen), names, tuple(counts.items()))

    def _best(
        self, ask: Ask, shape: int, usable: Bools, amounts: Ints, devices: Ints,
        chosen: dict[str, None],
    ) -> tuple[int, list[str]] | None:  # fmt: skip
        on: dict[int, list[Held]] = {}
        for session, parts in self._by_session.items():
            if session in chosen or not self._may_end(session, parts[0], ask):
                continue
            for one in parts:
                node = self._book.index(one.node)
                if node is not None and usable[node]:
                    on.setdefault(node, []).append(one)
        fits = usable & (self._book.count(shape, amounts, devices) > 0)
        if bool(fits.any()):
            return int(fits.argmax()), []
        found = [
            (cost, node, sessions)
            for node, parts in sorted(on.items())
            if (answer := self._enough(ask, shape, node, parts, amounts, devices)) is not None
            for cost, sessions in [answer]
        ]
        if not found:
            return None
        _, node, sessions = min(found)
        return node, sessions

    def _may_end(self, session: str, one: Held, ask: Ask) -> bool:
        if session in self.leaving:
            return True
        if self._now - one.started_at < self._min_run_s:
            return False
        return self._yields(one, ask) or (
            one.priority <= ask.priority and self._loans.borrowed(one)
        )

    def _yields(self, one: Held, ask: Ask) -> bool:
        """To a higher priority, if the asking one may have others ended for that."""
        return ask.preempts and one.preemptible and one.priority < ask.priority

    def _enough(
        self, ask: Ask, shape: int, node: int, parts: list[Held], amounts: Ints, devices: Ints
    ) -> tuple[tuple[int, int, float], list[str]] | None:
        """Cost (highest priority, how many, seconds lost) and who; who leaves anyway is free."""

        def loss(one: Held) -> tuple[bool, int, float, str]:
            stays = (one.session or one.name) not in self.leaving
            return stays, one.priority, -one.started_at, one.session

        left, loose = amounts[:, node].copy(), devices[node].copy()
        ended: list[Held] = []
        loans = self._loans.copy()
        for one in sorted(parts, key=loss):
            if loss(one)[0]:
                if not self._yields(one, ask) and not loans.borrowed(one):
                    continue  # others of its account gave back enough
                loans.give_back(one)
            self._add(one, left, loose)
            ended.append(one)
            if self._has_room(shape, left, loose):
                break
        else:
            return None
        for one in list(ended[:-1]):  # whoever is not needed after all stays
            self._add(one, left, loose, sign=-1)
            if self._has_room(shape, left, loose):
                ended.remove(one)
            else:
                self._add(one, left, loose)
        new = [one for one in ended if loss(one)[0]]
        lost = sum(self._now - one.started_at for one in new)
        cost = (max((one.priority for one in new), default=-(1 << 31)), len(new), lost)
        return cost, list(dict.fromkeys(one.session or one.name for one in ended))

    def _has_room(self, shape: int, left: Ints, loose: Ints) -> bool:
        left[-3:] = [int(column[0]) for column in device_columns(loose[None])]
        return bool((left >= self._book.need[shape]).all())

    def _add(self, one: Held, left: Ints, loose: Ints, sign: int = 1) -> None:
        for column, slot in enumerate(self._book.slots):
            left[column] += sign * one.slots.get(slot, 0)
        for number, milli in one.devices:
            loose[number] += sign * milli

    def _release(self, session: str, amounts: Ints, devices: Ints) -> None:
        for one in self._by_session[session]:
            node = self._book.index(one.node)
            if node is not None:
                left = amounts[:, node].copy()
                self._add(one, left, devices[node])
                amounts[:, node] = left
                amounts[-3:, node] = [int(c[0]) for c in device_columns(devices[node][None])]

    def _take(self, shape: int, node: int, amounts: Ints, devices: Ints) -> None:
        wanted = self._book.shapes[shape]
        amounts[:-3, node] -= self._book.need[shape, :-3]
        row = devices[node]
        if wanted.share:
            fitting = np.flatnonzero(row >= wanted.share)
            row[fitting[row[fitting].argmin()]] -= wanted.share
        elif wanted.devices:
            row[np.flatnonzero(row == 1000)[: wanted.devices]] = 0
        amounts[-3:, node] = [int(c[0]) for c in device_columns(row[None])]
