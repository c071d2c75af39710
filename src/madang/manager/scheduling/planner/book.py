"""What is free in one group while a pass goes on, in arrays.

A *shape* is all that decides where one member may go; asks of one shape share a row of scores, and
a placement changes one column. Columns of amounts: the slots, then devices that are whole, the most
that is left of one device, and the sum over devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class State:
    """One machine as it was."""

    node: int
    amounts: Ints
    devices: Ints

    def copy(self) -> State:
        return State(self.node, self.amounts.copy(), self.devices.copy())


@dataclass(slots=True)
class Kept:
    """A machine on which somebody keeps room: what is really free, and until when."""

    ask: Ask
    until: float
    """When it will start at the latest; inf: nobody knows."""
    really: State

    def take(self, need: Ints, devices: Sequence[tuple[int, int]]) -> None:
        """Another got a place there."""
        self.really.amounts[:-3] -= need[:-3]
        for number, milli in devices:
            self.really.devices[number] -= milli
        self.really.amounts[-3:] = [int(c[0]) for c in device_columns(self.really.devices[None])]


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
        self.devices: Final[Ints] = np.full((count, width), -1, np.int64)
        """Thousandths left; -1: no such device."""
        by_width: dict[int, list[int]] = {}
        for number, room in enumerate(rooms):
            by_width.setdefault(len(room.devices), []).append(number)
        for wide, numbers in by_width.items():
            self.devices[numbers, :wide] = [rooms[number].devices for number in numbers]
        self.amounts: Final[Ints] = np.zeros((columns, count), np.int64)
        """What may still be taken."""
        self.capacity: Final[Ints] = np.zeros((columns, count), np.int64)
        for column, slot in enumerate(slots):
            self.amounts[column] = [room.free.get(slot, 0) for room in rooms]
            self.capacity[column] = [room.capacity.get(slot, 0) for room in rooms]
        there = (self.devices >= 0).sum(1)
        self.capacity[-3] = there
        self.capacity[-2] = WHOLE * (there > 0)
        self.capacity[-1] = WHOLE * there
        self.amounts[-3:] = device_columns(self.devices)
        self.start: Final[Ints] = self.amounts.copy()
        """As it was when the pass began."""
        self.need: Final[Ints] = np.array(
            [shape.need() for shape in shapes] or np.zeros((0, columns)), np.int64
        ).reshape(len(shapes), columns)
        self._need_across: Final[Floats] = np.ascontiguousarray(self.need.T, np.float64)
        self.inverse: Final[Floats] = 1.0 / np.maximum(self.capacity, 1)
        self.allowed: Final[Bools] = np.ones((len(shapes), count), np.bool_)
        self.restricted = False
        """Whether some machine is not allowed to some shape."""
        self.total: Final[Ints] = self.capacity.sum(1)
        self._index: Final = {room.node: number for number, room in enumerate(rooms)}

    def index(self, node: str) -> int | None:
        return self._index.get(node)

    def fits(self, shape: int) -> Bools:
        """Where one member of it has room now."""
        return self._within(shape, self.amounts)

    def possible(self, shape: int) -> Bools:
        """Where it would have room if nothing else were there."""
        return self._within(shape, self.capacity)

    def _within(self, shape: int, amounts: Ints) -> Bools:
        found: Bools = self.allowed[shape].copy()
        for column, need in enumerate(self.need[shape].tolist()):
            if need:
                found &= amounts[column] >= need
        return found

    def slack(self, node: int) -> Floats:
        """(columns, shapes): what one member of each would leave on a machine."""
        found: Floats = self.amounts[:, node, None] - self._need_across
        return found

    def count(self, shape: int, amounts: Ints, devices: Ints) -> Ints:
        """How many members each machine of *amounts* (columns × n), *devices* (n × width) takes."""
        most = np.full(amounts.shape[1], np.iinfo(np.int64).max)
        for column, need in enumerate(self.need[shape, :-2].tolist()):
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
        left = self.devices[node].tolist()
        if not wanted.share:
            whole = [number for number, milli in enumerate(left) if milli == WHOLE]
            return tuple([(number, WHOLE) for number in whole[: wanted.devices]])
        fitting = [(milli, number) for number, milli in enumerate(left) if milli >= wanted.share]
        return ((min(fitting)[1], wanted.share),)

    def save(self, node: int) -> State:
        return State(node, self.amounts[:, node].copy(), self.devices[node].copy())

    def restore(self, state: State) -> None:
        self.amounts[:, state.node] = state.amounts
        self.devices[state.node] = state.devices

    def take(self, node: int, shape: int, devices: Sequence[tuple[int, int]]) -> None:
        if not devices:
            self.amounts[:, node] -= self.need[shape]
            return
        row = self.devices[node]
        for number, milli in devices:
            row[number] -= milli
        self.amounts[:-3, node] -= self.need[shape, :-3]
        self.refresh(node)

    def refresh(self, node: int) -> None:
        """Derive the columns about devices again."""
        left = [milli for milli in self.devices[node].tolist() if milli > 0]
        self.amounts[-3:, node] = left.count(WHOLE), max(left, default=0), sum(left)


def device_columns(devices: Ints) -> Any:
    """Whole ones, most of one, sum: for each row of *devices*."""
    left = np.maximum(devices, 0)
    largest = left.max(1) if devices.shape[1] else np.zeros(len(devices), np.int64)
    return (left == WHOLE).sum(1), largest, left.sum(1)
