"""One pass over one group."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Final

import numpy as np

from madang.manager.scheduling.planner import plugins
from madang.manager.scheduling.planner.book import Book, Bools, Kept, Shape, State, key_of, shape_of
from madang.manager.scheduling.planner.calendar import Calendar
from madang.manager.scheduling.planner.holdings import Holdings
from madang.manager.scheduling.planner.order import Standing, mean_share
from madang.manager.scheduling.planner.preemption import Victims
from madang.manager.scheduling.planner.reasons import Reasons
from madang.manager.scheduling.planner.releases import NEVER, Releases
from madang.manager.scheduling.planner.scores import Scores
from madang.manager.scheduling.types import (
    WHOLE,
    Ask,
    Held,
    Place,
    Plan,
    Policy,
    Preempt,
    Room,
    Snapshot,
    Wait,
)  # fmt: skip

Devices = tuple[tuple[int, int], ...]


class Pass:
    """Places, keeps room and says why, in order; see the package's docstring."""

    def __init__(
        self,
        snapshot: Snapshot,
        group: str,
        asks: Sequence[Ask],
        policy: Policy,
        now: float,
        holdings: Holdings,
    ) -> None:
        self._policy: Final = policy
        self._now: Final = now
        self._asks: Final = asks
        rooms = sorted([r for r in snapshot.rooms if r.group == group], key=lambda r: r.node)
        nodes = {room.node for room in rooms}
        self._held: Final = [one for one in snapshot.held if one.node in nodes]
        self._used: Final = snapshot.used
        self._calendar: Final = Calendar(snapshot, rooms, policy, now)
        slots = {"cpu_milli"}.union(*[room.capacity for room in rooms], *[a.slots for a in asks])
        names = sorted(slots)
        self._shape: Final[dict[str, int]] = {}
        shapes: dict[Shape, int] = {}
        known: dict[tuple[object, ...], int] = {}
        for ask in asks:
            window = self._calendar.window(ask)
            key = key_of(ask, names, window)
            if (number := known.get(key)) is None:
                shape = shape_of(ask, names, window)
                number = known[key] = shapes.setdefault(shape, len(shapes))
            self._shape[ask.session] = number
        self._book: Final = Book(rooms, names, list(shapes))
        self._restrict(rooms)
        self._placement: Final = plugins.placement(policy.placement)(self._book, policy)
        self._scores: Final = Scores(self._book, self._placement, self._shape.values())
        self._none: Final = [math.inf] * len(shapes)
        """Fewest members for which a shape had no room: there is never more within a pass."""
        self._kept: Final[dict[int, Kept]] = {}
        self._lends: Final[dict[int, list[int]]] = {}
        self._keepers = 0
        self._places: Final[list[Place]] = []
        self._preempts: Final[list[Preempt]] = []
        self._holdings: Final = holdings
        self._reasons: Final = Reasons(self._book, self._held, now, policy.names)
        self._new: Final[list[tuple[Ask, Sequence[tuple[int, Devices]]]]] = []
        """What was placed and will end, since ``_releases`` looked."""
        self._future: Releases | None = None

    def _restrict(self, rooms: Sequence[Room]) -> None:
        """Machines that a shape may not use whatever is free there."""
        book = self._book
        there: dict[str, set[str]] = {}
        for one in self._held:
            if one.apart:
                there.setdefault(one.apart, set()).add(one.node)
        known: dict[tuple[object, ...], Bools] = {}
        for number, shape in enumerate(book.shapes):
            key = shape.models, shape.labels, shape.arch, shape.apart, shape.window, shape.keeps
            if not any(key):
                continue
            if key not in known:
                mask = self._calendar.mask(shape.window)
                taken = there.get(shape.apart, set()) if shape.apart else set()
                mask &= np.array([self._suits(shape, room, taken) for room in rooms], np.bool_)
                known[key] = mask
            book.allowed[number] = known[key]
            book.restricted = True

    def _suits(self, shape: Shape, room: Room, taken: set[str]) -> bool:
        return (
            (not shape.models or room.model in shape.models)
            and shape.labels <= room.labels
            and not shape.keeps & room.lacks
            and shape.arch in ("", room.arch)
            and room.node not in taken
        )

    def run(self) -> Plan:
        waits: list[Wait] = []
        turns = plugins.order(self._policy.order)(self._asks, self._standing())
        placed: bool | None = None
        try:
            while True:
                ask = next(turns) if placed is None else turns.send(placed)
                wait = self._try(ask)
                placed = wait is None
                if wait is not None:
                    waits.append(wait)
        except StopIteration:
            pass
        return Plan(tuple(self._places), tuple(waits), tuple(self._preempts))

    def _standing(self) -> Standing:
        book = self._book
        shares = (book.need / np.maximum(book.total, 1))[:, [*range(len(book.slots)), -1]]
        dominant = shares.max(1).tolist() if len(shares) else []
        return Standing(
            self._policy,
            lambda ask: float(dominant[self._shape[ask.session]] * ask.members),
            self._shares_held,
            {o: mean_share(u, self._policy.half_life_s) for o, u in self._used.items()},
        )

    def _shares_held(self) -> dict[str, float]:
        """Dominant share of each owner."""
        book = self._book
        by_owner: dict[str, Counter[str]] = {}
        for one in self._held:
            mine = by_owner.setdefault(one.owner, Counter())
            mine.update(one.slots)
            mine["device_milli"] += sum(milli for _, milli in one.devices)
        total = dict(zip([*book.slots, "", "", "device_milli"], book.total.tolist(), strict=True))
        return {
            owner: max((a / total[s] for s, a in mine.items() if total.get(s)), default=0.0)
            for owner, mine in by_owner.items()
        }

    def _try(self, ask: Ask) -> Wait | None:
        """Place it, or say why not."""
        if (ask.reservation or self._policy.limits) and (wait := self._refuse(ask)) is not None:
            return wait
        shape = self._shape[ask.session]
        chosen = self._find(ask, shape)
        self._scores.answered(shape)
        if chosen is not None:
            self._settle(ask, chosen)
            return None
        wait = self._reasons.why(ask, shape, self._kept)
        if self._now - ask.created_at >= self._policy.reserve_after_s:
            return self._insist(ask, shape, wait)
        return wait

    def _refuse(self, ask: Ask) -> Wait | None:
        """What has nothing to do with room."""
        one = self._calendar.find(ask.reservation) if ask.reservation else None
        if ask.reservation and (one is None or self._now < one.starts_at):
            return self._reasons.reservation(ask, one)
        if not self._policy.limits:
            return None
        return self._reasons.limit(ask, self._policy.limits, self._holdings)

    def _settle(self, ask: Ask, chosen: Sequence[tuple[int, Devices]]) -> None:
        rooms = self._book.rooms
        self._places.extend(
            [Place(ask.session, rooms[node].node, devices) for node, devices in chosen]
        )
        if ask.limit_s is not None:
            self._new.append((ask, chosen))
        self._holdings.take(ask)

    # Finding room

    def _find(self, ask: Ask, shape: int) -> list[tuple[int, Devices]] | None:
        """A place for each member, taken; None: nothing is changed."""
        if ask.members < self._none[shape]:
            one = ask.members == 1
            found = self._single(shape) if one else self._gang(ask.members, shape)
            if found is not None:
                return found
            self._none[shape] = ask.members
            if one:
                self._scores.drop(shape)
        return self._borrow(ask, shape)

    def _single(self, shape: int) -> list[tuple[int, Devices]] | None:
        if (node := self._scores.best(shape)) is None:
            return None
        devices = self._placement.pick(node, shape)
        self._take(node, shape, devices)
        return [(node, devices)]

    def _gang(self, members: int, shape: int) -> list[tuple[int, Devices]] | None:
        book = self._book
        most = book.count(shape, book.amounts, book.devices)[book.allowed[shape]]
        if int(np.minimum(most, members).sum()) < members:
            return None
        saved: list[tuple[int, State, Bools, State | None]] = []
        found: list[tuple[int, Devices]] = []
        while len(found) < members and (node := self._scores.best(shape)) is not None:
            really = self._kept[node].really.copy() if node in self._kept else None
            saved.append((node, book.state(node).copy(), book.allowed[:, node].copy(), really))
            devices = self._placement.pick(node, shape)
            self._take(node, shape, devices)
            found.append((node, devices))
        if len(found) == members:
            return found
        for node, state, allowed, really in reversed(saved):
            book.restore(node, state)
            if really is not None:
                self._kept[node].really = really
            book.allowed[:, node] = allowed
            self._scores.change(node)
        return None

    def _take(self, node: int, shape: int, devices: Devices) -> None:
        book = self._book
        book.take(node, shape, devices)
        if (kept := self._kept.get(node)) is not None:
            kept.really.take(book.needs[shape], devices)
        if book.restricted and (apart := book.shapes[shape].apart):
            for number, other in enumerate(book.shapes):
                if other.apart == apart:
                    book.allowed[number, node] = False
        self._scores.change(node)

    def _borrow(self, ask: Ask, shape: int) -> list[tuple[int, Devices]] | None:
        """Room that somebody keeps, for one that ends before it is needed (backfill)."""
        if ask.members > 1 or ask.limit_s is None or not self._kept:
            return None
        ends_at = self._now + ask.limit_s
        if shape not in self._lends:
            self._lends[shape] = self._lenders(shape)
        for node in self._lends[shape]:
            kept = self._kept[node]
            if ends_at <= kept.until and kept.really.has(self._book.needs[shape]):
                view = self._book.state(node).copy()
                self._book.restore(node, kept.really)
                devices = self._placement.pick(node, shape)
                self._take(node, shape, devices)
                self._show_less(node, view)
                return [(node, devices)]
        return None

    def _lenders(self, shape: int) -> list[int]:
        """Kept machines on which it would have room."""
        need, allowed = self._book.needs[shape], self._book.allowed[shape]
        return [
            node for node, kept in self._kept.items() if allowed[node] and kept.really.has(need)
        ]

    def _show_less(self, node: int, view: State) -> None:
        """Of what is free, leave no more than *view*."""
        free = self._book.state(node)
        left = State(
            list(map(min, free.amounts, view.amounts)), list(map(min, free.devices, view.devices))
        )
        left.derive()
        self._book.restore(node, left)
        self._lends.clear()
        self._scores.change(node)

    # Keeping room

    @cached_property
    def _victims(self) -> Victims:
        return Victims(self._book, self._held, self._policy, self._now)

    def _insist(self, ask: Ask, shape: int, wait: Wait) -> Wait:
        """Have others end for it, or keep room for it."""
        if self._keepers >= self._policy.reserve_at_most:
            return wait
        closed = np.zeros(len(self._book.rooms), np.bool_)
        closed[list(self._kept)] = True
        may = ask.preempts or (bool(self._policy.deserved) and self._victims.owed(ask))
        if may and (found := self._victims.find(ask, shape, closed)) is not None:
            new = [one for one in found.sessions if one not in self._victims.leaving]
            self._victims.leaving.update(found.sessions)
            self._keepers += 1
            self._preempts.extend(Preempt(one, ask.session, self._policy.grace_s) for one in new)
            for node, count in found.counts:
                self._keep(ask, shape, node, count, NEVER, None)
            return self._reasons.preempting(ask, found.names, self._policy.grace_s)
        self._keepers += self._reserve(ask, shape, closed)
        return wait

    def _reserve(self, ask: Ask, shape: int, closed: Bools) -> bool:
        """Whether there were machines to keep room on."""
        chance = self._releases().earliest(shape, ask.members, closed)
        if chance is not None:
            for (node, count), then in zip(chance.counts, chance.rooms, strict=True):
                self._keep(ask, shape, node, count, chance.at, then)
            return True
        counts = self._reasons.nearest_for(shape, ask.members, closed)
        for node, count in counts:
            self._keep(ask, shape, node, count, NEVER, None)
        return bool(counts)

    def _releases(self) -> Releases:
        """With what has been placed in this pass."""
        if self._future is None:
            self._future = Releases(self._book, self._held)
        for ask, chosen in self._new:
            for node, devices in chosen:
                self._future.add(self._as_held(ask, node, devices))
        self._new.clear()
        return self._future

    def _as_held(self, ask: Ask, node: int, devices: Devices) -> Held:
        ends_at = None if ask.limit_s is None else self._now + ask.limit_s
        return Held(
            node=self._book.rooms[node].node, name=ask.name, slots=ask.slots, session=ask.session,
            devices=devices, started_at=self._now, ends_at=ends_at,
        )  # fmt: skip

    def _keep(
        self, ask: Ask, shape: int, node: int, count: int, until: float,
        then: State | None,
    ) -> None:  # fmt: skip
        """Others are shown what is left beside it: now, and at that time if it is known."""
        book = self._book
        really = book.state(node).copy()
        self._kept[node] = Kept(ask, until, really)
        free = really if then is None else then
        left = [
            max(0, amount - need * count)
            for amount, need in zip(free.amounts, book.needs[shape], strict=True)
        ]
        beside = claim(free.devices, really.devices, book.shapes[shape], count)
        self._show_less(node, State(left, beside))


def claim(then: Sequence[int], now: Sequence[int], shape: Shape, count: int) -> list[int]:
    """What *count* members leave of each device; those that are least free now go first.

    Where too little is free even then, all of the fullest is claimed.
    """
    left = list(then)
    for _ in range(count * shape.devices):
        milli = shape.share or WHOLE
        fits = [number for number, free in enumerate(left) if free >= milli]
        if fits:
            left[min(fits, key=now.__getitem__)] -= milli
        elif left:
            most = max(left)
            left[left.index(most)] = min(most, 0)
    return left
