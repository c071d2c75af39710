"""The log of decisions: the inputs of each pass that decided something, and what came of it.

Each entry holds what is different from the one before; a whole one comes first after a start and
now and then. Written in the transaction that carries the decision out, never changed. Whoever reads
them back must come to the same plans.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from madang.kit.codec import from_json, to_json
from madang.manager.scheduling.types import Ask, Held, Plan, Policy, Reservation, Room, Snapshot

EVERY: Final = 200
"""Entries from one whole one to the next."""
LEVEL: Final = 1
"""Of compression: each further one costs more time than it saves room."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What changed since the step before."""

    now: float
    pending: tuple[Ask, ...] = ()
    rooms: tuple[Room, ...] = ()
    held: tuple[Held, ...] = ()
    gone: tuple[str, ...] = ()
    """Keys of what is not there any more."""
    reservations: tuple[Reservation, ...] | None = None
    used: dict[str, float] | None = None
    ended: dict[str, bool] = field(default_factory=dict)
    policies: dict[str, Policy] | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    whole: bool
    inputs: bytes
    digest: str


def digest_of(plan: Plan) -> str:
    """Of all that was decided, with the reasons of those that wait."""
    return hashlib.sha256(to_json(plan)).hexdigest()


class Journal:
    """Of one server; what it wrote last is what the next entry is compared with."""

    def __init__(self) -> None:
        self._last: _State | None = None
        self._count = 0

    def entry(
        self, snapshot: Snapshot, policies: Mapping[str, Policy], now: float, plan: Plan
    ) -> Entry:
        whole = self._last is None or self._count >= EVERY
        before = _State() if whole or self._last is None else self._last
        after = _State.of(snapshot, policies)
        inputs = zlib.compress(to_json(after.since(before, now)), LEVEL)
        self._last, self._count = after, 1 if whole else self._count + 1
        return Entry(whole, inputs, digest_of(plan))

    def forget(self) -> None:
        """The last entry was not stored."""
        self._last = None


@dataclass(slots=True)
class _State:
    """A snapshot by keys."""

    things: dict[str, Any] = field(default_factory=dict)
    reservations: tuple[Reservation, ...] | None = None
    used: dict[str, float] | None = None
    ended: dict[str, bool] = field(default_factory=dict)
    policies: dict[str, Policy] | None = None

    @classmethod
    def of(cls, snapshot: Snapshot, policies: Mapping[str, Policy]) -> _State:
        everything: tuple[Ask | Room | Held, ...] = (
            *snapshot.pending,
            *snapshot.rooms,
            *snapshot.held,
        )
        things = {_key(thing): thing for thing in everything}
        return cls(
            things,
            snapshot.reservations,
            dict(snapshot.used),
            dict(snapshot.ended),
            dict(policies),
        )

    def since(self, before: _State, now: float) -> Step:
        old = before.things
        news = [thing for key, thing in self.things.items() if old.get(key) != thing]
        return Step(
            now=now,
            pending=_only(Ask, news),
            rooms=_only(Room, news),
            held=_only(Held, news),
            gone=tuple(key for key in old if key not in self.things),
            reservations=_changed(self.reservations, before.reservations),
            used=_changed(self.used, before.used),
            ended={k: v for k, v in self.ended.items() if before.ended.get(k) is not v},
            policies=_changed(self.policies, before.policies),
        )

    def follow(self, step: Step) -> None:
        for key in step.gone:
            del self.things[key]
        news: tuple[Ask | Room | Held, ...] = (*step.pending, *step.rooms, *step.held)
        for thing in news:
            self.things[_key(thing)] = thing
        self.reservations = self.reservations if step.reservations is None else step.reservations
        self.used = self.used if step.used is None else step.used
        self.policies = self.policies if step.policies is None else step.policies
        self.ended.update(step.ended)

    def snapshot(self) -> Snapshot:
        things = self.things.values()
        return Snapshot(
            pending=_only(Ask, things),
            rooms=_only(Room, things),
            held=_only(Held, things),
            reservations=self.reservations or (),
            used=self.used or {},
            ended=dict(self.ended),
        )


def _key(thing: Ask | Room | Held) -> str:
    match thing:
        case Ask():
            return f"ask {thing.session}"
        case Room():
            return f"room {thing.node}"
        case Held():
            return f"held {thing.session} {thing.node}"


def _only(kind: type[T], things: Iterable[Any]) -> tuple[T, ...]:
    return tuple(thing for thing in things if isinstance(thing, kind))


def _changed(new: T, old: T) -> T | None:
    return None if new == old else new


def read(rows: Iterable[Any]) -> Iterator[tuple[Snapshot, dict[str, Policy], float, str]]:
    """(snapshot, policies, time, digest of what was decided) of stored decisions, oldest first.

    What comes before the first whole one is left out.
    """
    state: _State | None = None
    for row in rows:
        step = from_json(Step, zlib.decompress(row.inputs))
        if row.whole:
            state = _State()
        if state is not None:
            state.follow(step)
            yield state.snapshot(), dict(state.policies or {}), step.now, row.digest


def emptied(room: Room) -> Room:
    """As if nothing were on it."""
    return replace(room, free=room.capacity, devices=tuple(1000 for _ in room.devices))
