"""Reservations by calendar: which machines are open to whom, and until when."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from madang.manager.scheduling.planner.book import Bools
from madang.manager.scheduling.types import Ask, Policy, Reservation, Room, Snapshot


class Calendar:
    """For one group at one time. Asks that see the same machines have the same *window*."""

    def __init__(
        self, snapshot: Snapshot, rooms: Sequence[Room], policy: Policy, now: float
    ) -> None:
        self._rooms = rooms
        self._now = now
        self._notice_s = policy.notice_s
        self._windows: dict[tuple[bool, ...], int] = {}
        self._of: dict[tuple[str, float], int] = {}
        self._open: list[Reservation] = []
        if snapshot.reservations:
            self._open = self._current(snapshot)
            self._windows[(True,) * len(self._open)] = 0

    def _current(self, snapshot: Snapshot) -> list[Reservation]:
        """Neither over nor given back."""
        now, nodes = self._now, {room.node for room in self._rooms}
        claimed = {ask.reservation for ask in snapshot.pending}
        claimed |= {one.reservation for one in snapshot.held}
        return [
            one
            for one in sorted(snapshot.reservations, key=lambda r: (r.starts_at, r.name))
            if now < one.ends_at
            and one.nodes & nodes
            and (one.name in claimed or now < one.starts_at + one.no_show_s)
        ]

    def find(self, name: str) -> Reservation | None:
        return next((one for one in self._open if one.name == name), None)

    def window(self, ask: Ask) -> int:
        """A number that is the same for those who see the same machines; 0: all."""
        if not self._open:
            return 0
        limit = math.inf if ask.limit_s is None else ask.limit_s
        if (key := (ask.reservation, limit)) not in self._of:
            sees = tuple([self._may(ask.reservation, limit, one) for one in self._open])
            if ask.reservation:
                sees = (*sees, *[one.name == ask.reservation for one in self._open])
            self._of[key] = self._windows.setdefault(sees, len(self._windows))
        return self._of[key]

    def _may(self, name: str, limit: float, one: Reservation) -> bool:
        if name == one.name:
            return one.starts_at <= self._now
        if self._now >= one.starts_at:
            return False
        until = self._now + (self._notice_s if limit == math.inf else limit)
        return until <= one.starts_at

    def mask(self, window: int) -> Bools:
        """Machines that this window sees."""
        if window == 0:
            return np.ones(len(self._rooms), np.bool_)
        sees = next(key for key, number in self._windows.items() if number == window)
        count = len(self._open)
        found = np.ones(len(self._rooms), np.bool_)
        for open_, one in zip(sees, self._open, strict=False):
            if not open_:
                found &= ~self._among(one.nodes)
        if len(sees) > count:  # with a reservation: its machines only
            own = [one.nodes for mine, one in zip(sees[count:], self._open, strict=True) if mine]
            nodes = frozenset[str]().union(*own)
            found &= self._among(nodes)
        return found

    def _among(self, nodes: frozenset[str]) -> Bools:
        return np.array([room.node in nodes for room in self._rooms], np.bool_)
