"""The one reason that matters, with its evidence.

From the outside in: what the ask itself puts off, its owner's limit, a machine that could hold it
at all, then the machine nearest to having room and, there, what lacks most and who holds most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Final

import numpy as np

from madang.manager.scheduling.planner.book import Book, Bools, Floats, Ints, Kept
from madang.manager.scheduling.planner.holdings import Holdings, wanted
from madang.manager.scheduling.types import WHOLE, Amounts, Ask, Held, Reservation, Wait
from madang.wire.policy_kept import KINDS
from madang.wire.size import format_bytes, format_duration

OWN: Final = "own"
"""Of a machine: the rules of its own layer, which all its sessions have."""
NETWORK: Final = "network"
SHOWN: Final = {"cpu_milli": "cpu", "mem_bytes": "mem", "disk_bytes": "disk", "pids": "pids"}


class Reasons:
    """For one pass over one group."""

    def __init__(
        self, book: Book, held: Sequence[Held], now: float, names: Mapping[str, str]
    ) -> None:
        self._book: Final = book
        self._held: Final = held
        self._now: Final = now
        self._names: Final = names
        self._near: Final[dict[int, int | None]] = {}
        self._texts: Final[dict[tuple[object, ...], tuple[str, str]]] = {}

    def why(self, ask: Ask, shape: int, kept: Mapping[int, Kept]) -> Wait:
        """Nothing was found for it; *kept* are the machines on which others keep room."""
        if not self._book.rooms:
            text = "waits for a machine: none is connected."
            return Wait(ask.session, "node.none", text)
        node = self._nearest(shape)
        if node is None:
            return Wait(ask.session, *self._impossible(shape))
        keeper = kept.get(node)
        if keeper is not None and keeper.really.has(self._book.needs[shape]):
            waited = format_duration(self._now - keeper.ask.created_at)
            text = (
                f"waits its turn: {self._book.rooms[node].node} is kept for {keeper.ask.name}, "
                f"which has waited {waited}."
            )
            return Wait(ask.session, "capacity.reserved", text)
        if ask.members > 1:
            return Wait(ask.session, *self._gang(ask, shape))
        code, text = self._lacks(shape, node)
        return Wait(ask.session, code, text + self._elsewhere(shape))

    def _gang(self, ask: Ask, shape: int) -> tuple[str, str]:
        book = self._book
        key = (shape, ask.members)
        if key not in self._texts:
            could = book.count(shape, book.capacity, whole_devices(book))[book.allowed[shape]]
            if int(np.minimum(could, ask.members).sum()) < ask.members:
                return "size.impossible", (
                    f"the machines together hold {int(could.sum())} of its {ask.members} members "
                    "even when nothing else runs."
                )
            now = book.count(shape, book.amounts, book.devices)[book.allowed[shape]]
            room = int(np.minimum(now, ask.members).sum())
            self._texts[key] = (
                "capacity.gang",
                f"waits for room for all members at once: {room} of {ask.members} have it.",
            )
        return self._texts[key]

    def _lacks(self, shape: int, node: int) -> tuple[str, str]:
        book = self._book
        left = book.state(node).amounts
        key = (shape, node, *left)
        if key not in self._texts:
            need, capacity = book.needs[shape], book.capacity[:, node].tolist()
            asked = [column for column, amount in enumerate(need[:-1]) if amount]
            if not asked:
                return "capacity.none", "waits for a machine that takes it."
            column = max(
                asked,
                key=lambda c: ((need[c] - left[c]) / max(1, capacity[c]), self._slot(c)),
            )
            self._texts[key] = self._lack(column, node, need[column], left[column])
        return self._texts[key]

    def _slot(self, column: int) -> str:
        slots = self._book.slots
        return slots[column] if column < len(slots) else "gpu"

    def _lack(self, column: int, node: int, need: int, left: int) -> tuple[str, str]:
        book = self._book
        name = book.rooms[node].node
        if column == len(book.slots) + 1:
            return "capacity.gpu", (
                f"waits for gpu: asks {need / WHOLE:g} of one, the most that is left of one on "
                f"{name} is {left / WHOLE:g}{self._holder(name, 'gpu')}"
            )
        slot = self._slot(column)
        has = int(book.capacity[column, node])
        return f"capacity.{slot_name(slot)}", (
            f"waits for {slot_name(slot)}: asks {show(slot, need)}, {show(slot, left)} of "
            f"{show(slot, has)} free on {name}{self._holder(name, slot)}"
        )

    def _holder(self, node: str, slot: str) -> str:
        if (most := self._most.get((node, slot))) is None:
            return "."
        amount, name = most
        return (
            f"; {name} holds {amount / WHOLE:g}."
            if slot == "gpu"
            else (f"; {name} holds {show(slot, amount)}.")
        )

    @cached_property
    def _most(self) -> dict[tuple[str, str], tuple[int, str]]:
        """By node and slot, who holds most."""
        most: dict[tuple[str, str], tuple[int, str]] = {}
        for one in self._held:
            held = {**one.slots, "gpu": sum(milli for _, milli in one.devices)}
            for slot, amount in held.items():
                if amount and (amount, one.name) > most.get((one.node, slot), (0, "")):
                    most[one.node, slot] = amount, one.name
        return most

    def _impossible(self, shape: int) -> tuple[str, str]:
        book = self._book
        if (shape, -1) not in self._texts:
            everywhere = np.ones(len(book.rooms), np.bool_)
            for column, need in enumerate(book.needs[shape]):
                if need:
                    everywhere &= book.capacity[column] >= need
            self._texts[shape, -1] = (
                ("constraint.none", self._restricted(shape))
                if bool(everywhere.any())
                else ("size.impossible", self._too_large(shape))
            )
        return self._texts[shape, -1]

    def _restricted(self, shape: int) -> str:
        wanted = self._book.shapes[shape]
        has = [
            *[_named(label) for label in sorted(wanted.labels)],
            *([f"architecture {wanted.arch}"] if wanted.arch else []),
            *([f"gpu model {' or '.join(sorted(wanted.models))}"] if wanted.models else []),
            *([f"a place apart from {wanted.apart}"] if wanted.apart else []),
            *(["time before a reservation"] if wanted.window else []),
        ]
        keeps = " and ".join(kept_words(wanted.keeps & self._lacked))
        does = [*([f"has {', '.join(has)}"] if has else []), *([f"keeps {keeps}"] if keeps else [])]
        return f"no machine that is large enough {' and '.join(does)}."

    @cached_property
    def _lacked(self) -> frozenset[str]:
        """What some machine does not keep."""
        return frozenset().union(*[room.lacks for room in self._book.rooms])

    def _elsewhere(self, shape: int) -> str:
        """A machine that has room, and what it lacks; empty: there is none."""
        book, keeps = self._book, self._book.shapes[shape].keeps
        if not keeps & self._lacked:
            return ""
        need = book.need[shape, :, None]
        for node in np.flatnonzero((book.amounts >= need).all(0)).tolist():
            if lacks := keeps & book.rooms[node].lacks:
                name = book.rooms[node].node
                return f" {name} has room, but does not keep {' and '.join(kept_words(lacks))}."
        return ""

    def _too_large(self, shape: int) -> str:
        book = self._book
        asked = {
            self._slot(column): need for column, need in enumerate(book.needs[shape][:-2]) if need
        }
        largest = {
            self._slot(column): int(book.capacity[column].max())
            for column in range(len(book.slots) + 1)
        }
        if book.shapes[shape].share and not asked.keys() - SHOWN.keys():
            asked.setdefault("gpu", 1)
        slot, most = lacking(asked, [largest])
        return (
            f"no machine is large enough: asks {show(slot, asked[slot])} of {slot_name(slot)}, "
            f"the largest has {show(slot, most)}."
        )

    # Nearness

    def _nearest(self, shape: int) -> int | None:
        """Of the machines that could hold it, the one that lacks least as the pass began."""
        if shape not in self._near:
            lack = self._lack_of(shape, at_start=True)
            node = int(lack.argmin())
            self._near[shape] = None if lack[node] == np.inf else node
        return self._near[shape]

    def _lack_of(self, shape: int, *, at_start: bool) -> Floats:
        """How much is missing at most, as a fraction of the machine; inf where never possible."""
        book = self._book
        amounts = book.start if at_start else book.amounts
        lack = np.full(len(book.rooms), -np.inf)
        for column, need in enumerate(book.needs[shape][:-1]):
            if need:
                np.maximum(lack, (need - amounts[column]) * book.inverse[column], out=lack)
        found: Floats = np.where(book.possible(shape), lack, np.inf)
        return found

    def nearest_for(self, shape: int, members: int, closed: Bools) -> list[tuple[int, int]]:
        """Machines that lack least now, and how many members each could hold; [] if too few."""
        book = self._book
        lack = np.where(closed, np.inf, self._lack_of(shape, at_start=False))
        could = book.count(shape, book.capacity, whole_devices(book)) if members > 1 else None
        found: list[tuple[int, int]] = []
        for node in np.argsort(lack, kind="stable")[:members].tolist():
            if lack[node] == np.inf:
                return []
            count = 1 if could is None else min(members, int(could[node]))
            found.append((node, count))
            members -= count
            if members <= 0:
                return found
        return []

    # What has nothing to do with room

    def reservation(self, ask: Ask, one: Reservation | None) -> Wait:
        if one is None:
            text = f"reservation {ask.reservation} is over or was never made."
            return Wait(ask.session, "reservation.none", text)
        left = format_duration(one.starts_at - self._now)
        text = f"waits for reservation {one.name}, which starts in {left}."
        return Wait(ask.session, "reservation.later", text)

    def limit(self, ask: Ask, limits: Mapping[str, Amounts], holds: Holdings) -> Wait | None:
        """The limit, of all accounts that it goes to, that leaves least; None: within all."""
        asked, tightest = wanted(ask), 1.0
        found: tuple[str, str, int, int] | None = None
        for account in ask.payers:
            for slot, limit in limits.get(account, {}).items():
                left = max(0, limit - holds.of(account).get(slot, 0))
                wants = asked.get(slot, 0)
                if wants > left and left / wants < tightest:
                    tightest, found = left / wants, (account, slot, limit, left)
        if found is None:
            return None
        account, slot, limit, left = found
        kind, colon, _ = account.partition(":")
        text = (
            f"waits for {slot_name(slot)} within the limit of {self._names.get(account, account)}:"
            f" asks {show(slot, asked[slot])}, {show(slot, left)} of {show(slot, limit)} left."
        )
        code = f"limit.{kind}.{slot_name(slot)}" if colon else "policy.limit"
        return Wait(ask.session, code, text)

    def preempting(self, ask: Ask, names: Sequence[str], grace_s: float) -> Wait:
        text = f"waits for {', '.join(names)} to give way, at most {format_duration(grace_s)}."
        return Wait(ask.session, "capacity.preempting", text)


def _named(label: str) -> str:
    """``network:full`` is what a machine offers, ``disk=ssd`` a label that somebody gave it."""
    kind, offered, name = label.partition(":")
    return f"{kind} {name}" if offered and "=" not in kind else f"label {label}"


def kept_words(wanted: Iterable[str]) -> list[str]:
    """``crun:files`` → «rules about files (crun)»"""
    found = []
    for each in sorted(wanted):
        runtime, _, kind = each.partition(":")
        words = {**KINDS, OWN: "its own sandbox policy", NETWORK: "a network"}[kind]
        found.append(f"{words} ({runtime})" if runtime else words)
    return found


def whole_devices(book: Book) -> Ints:
    """All devices as if nothing were on them."""
    found: Ints = np.where(book.devices >= 0, WHOLE, -1)
    return found


def lacking(asked: Amounts, capacities: Sequence[Amounts]) -> tuple[str, int]:
    """The slot for which *asked* is furthest beyond any machine, and the most that one has."""
    most = {slot: max((c.get(slot, 0) for c in capacities), default=0) for slot in asked}
    slot = max(asked, key=lambda s: (asked[s] / max(1, most[s]), s))
    return slot, most[slot]


def show(slot: str, amount: int) -> str:
    """An amount for people."""
    if slot == "cpu_milli":
        return f"{amount / 1000:g}"
    if slot == "device_milli":
        return f"{amount / WHOLE:g}"
    return format_bytes(amount) if slot.endswith("_bytes") else str(amount)


def slot_name(slot: str) -> str:
    """``mem_bytes`` → ``mem``."""
    return "gpu" if slot == "device_milli" else SHOWN.get(slot, slot)
