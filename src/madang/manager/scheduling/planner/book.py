"""What is free in one group while a pass goes on, in arrays.

A *shape* is all that decides where one member may go; asks of one shape share a row of scores, and
a placement changes one column. Columns of amounts: the slots, then devices that are whole, the most
that is left of one device, and the sum over devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import ge
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from madang.manager.scheduling.types import WHOLE, Ask, Room

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

DEVICE_COLUMNS: Final = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """One member's needs; equal ones are one."""

    slots: tuple[int, ...]
    devices: int
    milli: int
    models: frozenset[str]
    labels: frozenset[str]
    arch: str
    apart: str
    window: int
    """Which machines are open to it as to reservations; see ``calendar``."""
    keeps: frozenset[str] = frozenset()

    @property
    def share(self) -> int:
        """Thousandths of one device, where less than a whole is asked for."""
        return self.milli if self.devices and self.milli < WHOLE else 0

    def need(self) -> list[int]:
        whole = 0 if self.share else self.devices
        return [*self.slots, whole, self.share, self.devices * self.milli]


def shape_of(ask: Ask, slots: Sequence[str], window: int) -> Shape:
    amounts = tuple([ask.slots.get(slot, 0) for slot in slots])
    milli = ask.device_milli if ask.devices == 1 else WHOLE
    wanted = ask.models, ask.labels, ask.arch, ask.apart, window, ask.keeps
    return Shape(amounts, ask.devices, milli, *wanted)


def key_of(ask: Ask, slots: Sequence[str], window: int) -> tuple[object, ...]:
    """Equal ones have equal shapes; quicker than a shape."""
    return (
        *map(ask.slots.get, slots), ask.devices, ask.device_milli, ask.models, ask.labels,
        ask.arch, ask.apart, window,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class State:
    """One machine: amounts by column, thousandths left of each device."""

    amounts: list[int]
    devices: list[int]

    def copy(self) -> State:
        return State(self.amounts.copy(), self.devices.copy())

    def derive(self) -> None:
        """The columns about devices, from these."""
        left = [milli for milli in self.devices if milli > 0]
        self.amounts[-3:] = left.count(WHOLE), max(left, default=0), sum(left)

    def take(self, need: Sequence[int], devices: Sequence[tuple[int, int]]) -> None:
        """One member that needs *need* gets a place there."""
        amounts = self.amounts
        for column in range(len(amounts) - DEVICE_COLUMNS):
            amounts[column] -= need[column]
        if devices:
            for number, milli in devices:
                self.devices[number] -= milli
            self.derive()

    def has(self, need: Sequence[int]) -> bool:
        """Whether there is room for it."""
        return all(map(ge, self.amounts, need))


@dataclass(slots=True)
class Kept:
    """A machine on which somebody keeps room: what is really free, and until when."""

    ask: Ask
    until: float
    """When it will start at the latest; inf: nobody knows."""
    really: State


class Book:
    """Machines × columns, and shapes × columns."""

    def __init__(
        self, rooms: Sequence[Room], slots: Sequence[str], shapes: Sequence[Shape]
    ) -> None:
        """*rooms* in the order that decides between equals."""
        self.rooms: Final = rooms
        self.slots: Final = tuple(slots)
        self.shapes: Final = shapes
        count, columns = len(rooms), len(slots) + DEVICE_COLUMNS
        width = max((len(room.devices) for room in rooms), default=0)
        self._devices: Final[Ints] = np.full((count, width), -1, np.int64)
        by_width: dict[int, list[int]] = {}
        for number, room in enumerate(rooms):
            by_width.setdefault(len(room.devices), []).append(number)
        for wide, numbers in by_width.items():
            self._devices[numbers, :wide] = [rooms[number].devices for number in numbers]
        self._amounts: Final[Ints] = np.zeros((columns, count), np.int64)
        self.capacity: Final[Ints] = np.zeros((columns, count), np.int64)
        for column, slot in enumerate(slots):
            self._amounts[column] = [room.free.get(slot, 0) for room in rooms]
            self.capacity[column] = [room.capacity.get(slot, 0) for room in rooms]
        there = (self._devices >= 0).sum(1)
        self.capacity[-3] = there
        self.capacity[-2] = WHOLE * (there > 0)
        self.capacity[-1] = WHOLE * there
        self._amounts[-3:] = device_columns(self._devices)
        self.start: Final[Ints] = self._amounts.copy()
        """As it was when the pass began."""
        self.need: Final[Ints] = np.array(
            [shape.need() for shape in shapes] or np.zeros((0, columns)), np.int64
        ).reshape(len(shapes), columns)
        self.needs: Final[list[list[int]]] = self.need.tolist()
        self.asked: Final = [
            [(column, need) for column, need in enumerate(needs) if need] for needs in self.needs
        ]
        """By shape: column and need, where something is needed."""
        self._need_across: Final[Floats] = np.ascontiguousarray(self.need.T, np.float64)
        self.inverse: Final[Floats] = 1.0 / np.maximum(self.capacity, 1)
        self.allowed: Final[Bools] = np.ones((len(shapes), count), np.bool_)
        self.restricted = False
        """Whether some machine is not allowed to some shape."""
        self.total: Final[Ints] = self.capacity.sum(1)
        self._index: Final = {room.node: number for number, room in enumerate(rooms)}
        self._states: Final[dict[int, State]] = {}
        """Machines that were looked at: these hold, the arrays may be behind."""
        self._behind: Final[set[int]] = set()

    def index(self, node: str) -> int | None:
        return self._index.get(node)

    @property
    def amounts(self) -> Ints:
        """What may still be taken, columns × machines."""
        self._catch_up()
        return self._amounts

    @property
    def devices(self) -> Ints:
        """Thousandths left, machines × devices; -1: no such device."""
        self._catch_up()
        return self._devices

    def _catch_up(self) -> None:
        if self._behind:
            nodes = list(self._behind)
            self._amounts[:, nodes] = self._amounts_of(nodes)
            self._devices[nodes] = [self._states[node].devices for node in nodes]
            self._behind.clear()

    def _amounts_of(self, nodes: Sequence[int]) -> Ints:
        return np.array([self.state(node).amounts for node in nodes], np.int64).T

    def state(self, node: int) -> State:
        """Of one machine; to be looked at only."""
        if (found := self._states.get(node)) is None:
            found = State(self._amounts[:, node].tolist(), self._devices[node].tolist())
            self._states[node] = found
        return found

    def fits(self, shape: int) -> Bools:
        """Where one member of it has room now."""
        return self._within(shape, self.amounts)

    def possible(self, shape: int) -> Bools:
        """Where it would have room if nothing else were there."""
        return self._within(shape, self.capacity)

    def _within(self, shape: int, amounts: Ints) -> Bools:
        found: Bools = self.allowed[shape].copy()
        for column, need in enumerate(self.needs[shape]):
            if need:
                found &= amounts[column] >= need
        return found

    def slack(self, nodes: Sequence[int], shapes: Ints) -> Floats:
        """(columns, machines, shapes): what one member of each would leave on each."""
        left = np.ascontiguousarray(np.maximum(self._amounts_of(nodes), 0), np.float64)
        found: Floats = left[:, :, None] - self._need_across.take(shapes, 1)[:, None, :]
        return found

    def count(self, shape: int, amounts: Ints, devices: Ints) -> Ints:
        """How many members each machine of *amounts* (columns × n), *devices* (n × width) takes."""
        most = np.full(amounts.shape[1], np.iinfo(np.int64).max)
        for column, need in enumerate(self.needs[shape][:-2]):
            if need:
                most = np.minimum(most, amounts[column] // need)
        if share := self.shapes[shape].share:
            most = np.minimum(most, (np.maximum(devices, 0) // share).sum(1))
        if self.shapes[shape].apart:
            most = np.minimum(most, 1)
        found: Ints = np.maximum(most, 0)
        return found

    def pick(self, node: int, shape: int) -> tuple[tuple[int, int], ...]:
        """Devices for one member: whole ones from the first, a share where least stays."""
        wanted = self.shapes[shape]
        if not wanted.devices:
            return ()
        left = self.state(node).devices
        if not (share := wanted.share):
            if wanted.devices == 1:
                return ((left.index(WHOLE), WHOLE),)
            whole = [number for number, milli in enumerate(left) if milli == WHOLE]
            return tuple([(number, WHOLE) for number in whole[: wanted.devices]])
        least = min([milli for milli in left if milli >= share])
        return ((left.index(least), share),)

    def restore(self, node: int, state: State) -> None:
        """As a copy of it was kept."""
        self._states[node] = state.copy()
        self._behind.add(node)

    def take(self, node: int, shape: int, devices: Sequence[tuple[int, int]]) -> None:
        self.state(node).take(self.needs[shape], devices)
        self._behind.add(node)


def device_columns(devices: Ints) -> Any:
    """Whole ones, most of one, sum: for each row of *devices*."""
    left = np.maximum(devices, 0)
    largest = left.max(1) if devices.shape[1] else np.zeros(len(devices), np.int64)
    return (left == WHOLE).sum(1), largest, left.sum(1)
