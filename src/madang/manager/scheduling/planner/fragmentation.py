"""Placement that keeps devices usable, over the typical mix of tasks.

Two things are weighed. *Fragments*: for one kind of task these are the thousandths of devices that
it can't use, all of a machine's where the task has no room, otherwise those of devices with less
left than it asks of one. The expected growth over the mix is rounded to a hundred steps: exact
comparison of tiny differences is worse. *Starved devices*: free devices for which fewer CPUs are
left than the mix takes beside one; each counts as many steps. Of equals the fullest wins.

Sources: fragments from Weng et al., Beware of Fragmentation: Scheduling GPU-Sharing Workloads
with Fragmentation Gradient Descent, USENIX ATC 2023; starved devices are ours, and worth about half
a percent of all devices on that paper's trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from madang.manager.scheduling.planner.book import Book, Floats, Ints
from madang.manager.scheduling.planner.placement import Pack
from madang.manager.scheduling.types import WHOLE, Policy, Typical

MASS: Final = 0.95
"""The most frequent kinds up to this part of all count as typical."""
STEPS: Final = 100.0
STARVED: Final = 30.0
"""Steps for one starved device."""
TIE: Final = 1e-4
KNOWN: Final = 1 << 22
"""Growths that are remembered, 32 MiB; all are forgotten together."""
AFTER: Final = 1 << 10
"""The same of devices."""


@dataclass(frozen=True, slots=True)
class After:
    """What is left of a machine's devices before and after, whatever its CPUs."""

    total: int
    usable: Floats
    """By goal: thousandths that it could use, with enough CPUs; so of the others."""
    shares: Floats
    """(kinds of share, devices taken, goals)."""
    remains: Floats
    """(kinds of share, devices taken): what is left in all; inf where it can't be."""
    wholes: Floats
    """(counts of whole devices, goals)."""
    rests: Floats
    """(counts of whole devices)."""


class Fragments:
    """See the module's docstring. ``cpu_milli`` must be among the slots."""

    def __init__(self, book: Book, policy: Policy) -> None:
        self._book: Final = book
        self._pack: Final = Pack(book, policy)
        self._cpu: Final = book.slots.index("cpu_milli")
        self._need_cpu: Final = book.need[:, self._cpu]
        typical = frequent(policy.typical or _mix(book))
        self._goals: Final = sorted({(t.devices, _share(t)) for t in typical if t.devices})
        self._shares: Final = np.array([share for _, share in self._goals], np.int64)
        self._wholes: Final = np.array([0 if s else n for n, s in self._goals], np.int64)
        self._levels: Final = np.where(self._shares > 0, self._shares, WHOLE)
        self._models: Final = sorted({room.model for room in book.rooms})
        number = {model: at for at, model in enumerate(self._models)}
        self._model: Final = [number[room.model] for room in book.rooms]
        self._cpu_beside: Final = beside(policy.typical or _mix(book))
        self._cpus: Final = np.array(sorted({t.cpu_milli for t in typical}), np.int64)
        self._weights: Final = self._weigh(typical)
        shares = np.array([shape.share for shape in book.shapes], np.int64)
        self._is_share: Final = np.flatnonzero(shares)
        self._is_whole: Final = np.flatnonzero(shares == 0)
        self._share_kinds, share_kind = np.unique(shares[self._is_share], return_inverse=True)
        self._whole_kinds, whole_kind = np.unique(
            book.need[self._is_whole, -3], return_inverse=True
        )
        self._share_pairs, self._share_pair = self._pairs(share_kind, self._is_share)
        self._whole_pairs, self._whole_pair = self._pairs(whole_kind, self._is_whole)
        self._known: Final[dict[tuple[int, ...], Floats]] = {}
        self._after: Final[dict[tuple[int, ...], After]] = {}

    def _pairs(self, kind: Ints, shapes: Ints) -> tuple[Ints, Ints]:
        """What growth depends on, (kind, CPUs) across; and by shape, which of these it is."""
        both = np.stack((kind, self._need_cpu[shapes]), 1)
        pairs, which = np.unique(both, axis=0, return_inverse=True)
        return np.ascontiguousarray(pairs.T), which.reshape(-1)

    def _weigh(self, typical: Sequence[Typical]) -> Floats:
        """(models, cpu levels + 1, goals): how much of the mix has enough of so many CPUs."""
        found = np.zeros((len(self._models), len(self._cpus) + 1, len(self._goals)))
        for one in typical:
            if not one.devices:
                continue
            goal = self._goals.index((one.devices, _share(one)))
            level = int(np.searchsorted(self._cpus, one.cpu_milli)) + 1
            for at, model in enumerate(self._models):
                if not one.models or model in one.models:
                    found[at, level:, goal] += one.weight
        return found

    def row(self, shape: int) -> Floats:
        book = self._book
        steps = np.array([self._steps(node).item(shape) for node in range(len(book.rooms))])
        cpus, devices = book.amounts[self._cpu], book.amounts[-1]
        starved = self._starved(cpus - self._need_cpu[shape], devices - book.need[shape, -1])
        starved -= self._starved(cpus, devices)
        return steps + STARVED * starved + TIE * self._pack.row(shape)

    def block(self, nodes: Sequence[int], shapes: Ints, slack: Floats) -> Floats:
        amounts = self._book.amounts
        starved = self._starved(slack[self._cpu], slack[-1])
        starved -= self._starved(amounts[self._cpu, nodes, None], amounts[-1, nodes, None])
        steps = np.array([self._steps(node) for node in nodes])[:, shapes]
        pack = self._pack.block(nodes, shapes, slack)
        found: Floats = steps + STARVED * starved + TIE * pack
        return found

    def score(self, node: int, shape: int) -> float:
        amounts, needs = self._book.state(node).amounts, self._book.needs[shape]
        cpus, devices = amounts[self._cpu], amounts[-1]
        starved = max(
            (devices - needs[-1]) / WHOLE - (cpus - needs[self._cpu]) / self._cpu_beside, 0.0
        )
        starved -= max(devices / WHOLE - cpus / self._cpu_beside, 0.0)
        pack = self._pack.score(node, shape)
        return self._steps(node).item(shape) + STARVED * starved + TIE * pack

    def _starved(self, cpus: Ints | Floats, devices: Ints | Floats) -> Floats:
        """How many of the free devices would lack CPUs."""
        found: Floats = np.maximum(devices / WHOLE - cpus / self._cpu_beside, 0.0)
        return found

    def _steps(self, node: int) -> Floats:
        """Growth by shape, coarse; remembered, since machines that are equal grow equally."""
        state = self._book.state(node)
        key = (self._model[node], state.amounts[self._cpu], *sorted(state.devices))
        found = self._known.get(key)
        if found is None:
            if len(self._known) * len(self._need_cpu) > KNOWN:
                self._known.clear()
            found = self._known[key] = _coarse(self._growth(node))
        return found

    def _growth(self, node: int) -> Floats:
        """By shape, on the device where it is least; inf where there is none."""
        state = self._book.state(node)
        after = self._after_of(tuple(sorted(state.devices)))
        weights, cpu = self._weights[self._model[node]], state.amounts[self._cpu]
        found = np.full(len(self._need_cpu), np.inf)
        kind, mine = self._mine(weights, cpu, self._whole_pairs)
        gained = (after.wholes[kind] * mine).sum(1)
        found[self._is_whole] = (after.rests[kind] - gained)[self._whole_pair]
        if state.devices:
            kind, mine = self._mine(weights, cpu, self._share_pairs)
            gains = (after.shares[kind] * mine[:, None, :]).sum(2)
            found[self._is_share] = (after.remains[kind] - gains).min(1)[self._share_pair]
        return found - self._before(after, weights, cpu)

    def _mine(self, weights: Floats, cpu: int, pairs: Ints) -> tuple[Ints, Floats]:
        """Kinds, and (pairs, goals): how much of the mix has enough of the CPUs that are left."""
        kind, need = pairs
        return kind, weights[np.searchsorted(self._cpus, cpu - need, side="right")]

    def _before(self, after: After, weights: Floats, cpu: int) -> float:
        now = weights[int(np.searchsorted(self._cpus, cpu, side="right"))]
        return after.total - float(now @ after.usable)

    def _after_of(self, devices: tuple[int, ...]) -> After:
        if (found := self._after.get(devices)) is None:
            if len(self._after) > AFTER:
                self._after.clear()
            found = self._after[devices] = self._compute(devices)
        return found

    def _compute(self, devices: tuple[int, ...]) -> After:
        left = np.maximum(np.array(devices, np.int64), 0)
        low = np.where(left[:, None] < self._levels, left[:, None], 0)
        sums = low.sum(0)
        full, total = int((left == WHOLE).sum()), int(left.sum())
        most = int(left.max()) if len(left) else 0
        usable = self._usable(np.array(full), np.array(most), total - sums)
        return After(
            total,
            usable,
            *self._after_share(left, low, full, total),
            *self._after_whole(left, sums, full, total),
        )

    def _after_share(self, left: Ints, low: Ints, full: int, total: int) -> tuple[Floats, Floats]:
        """By share and device taken: what each goal can use; what is left, inf if it can't be."""
        new = left - self._share_kinds[:, None]  # (shares, devices)
        lows = low.sum(0) - low + np.where(new[:, :, None] < self._levels, new[:, :, None], 0)
        order = np.sort(left)
        top, second = (order[-1], order[-2]) if len(order) > 1 else (left.max(initial=0), 0)
        alone = (left == top) & (top > second)
        most = np.maximum(np.where(alone, second, top), new)
        fulls = np.broadcast_to(full - (left == WHOLE), new.shape)
        remains = np.where(new < 0, np.inf, float(total) - self._share_kinds[:, None])
        above = (total - self._share_kinds)[:, None, None] - lows
        return self._usable(fulls, most, above), remains

    def _after_whole(self, left: Ints, low: Ints, full: int, total: int) -> tuple[Floats, Floats]:
        """By count of whole devices taken, the same."""
        fulls = full - self._whole_kinds
        rest = int(left[left < WHOLE].max(initial=0))
        remains = np.where(fulls < 0, np.inf, total - WHOLE * self._whole_kinds)
        above = (total - WHOLE * self._whole_kinds)[:, None] - low
        return self._usable(fulls, np.where(fulls > 0, WHOLE, rest), above), remains

    def _usable(self, fulls: Ints, most: Ints, above: Ints) -> Floats:
        """(…, goals): thousandths on devices that are large enough, if the goal fits."""
        fits = (fulls[..., None] >= self._wholes) & (most[..., None] >= self._shares)
        found: Floats = np.where(fits, above, 0).astype(np.float64)
        return found

    def pick(self, node: int, shape: int) -> tuple[tuple[int, int], ...]:
        share = self._book.shapes[shape].share
        if not share:
            return self._book.pick(node, shape)
        state = self._book.state(node)
        after = self._after_of(tuple(state.devices))
        weights, cpu = self._weights[self._model[node]], state.amounts[self._cpu]
        kind = int(np.searchsorted(self._share_kinds, share))
        need = int(self._need_cpu[shape])
        mine = weights[int(np.searchsorted(self._cpus, cpu - need, side="right"))]
        growth = after.remains[kind] - (after.shares[kind] * mine).sum(1)
        return ((int((growth - self._before(after, weights, cpu)).argmin()), share),)


def frequent(mix: Sequence[Typical]) -> list[Typical]:
    """The most frequent kinds that make up ``MASS`` of all, with weights that sum to 1."""
    weights: Counter[tuple[int, int, int, frozenset[str]]] = Counter()
    for one in mix:
        weights[one.cpu_milli, one.devices, one.device_milli, one.models] += one.weight  # type: ignore[assignment]
    ranked = sorted(weights.items(), key=lambda item: (-item[1], item[0][:3], sorted(item[0][3])))
    total = sum(weights.values())
    chosen: list[tuple[tuple[int, int, int, frozenset[str]], float]] = []
    mass = 0.0
    for kind, weight in ranked:
        if mass >= MASS * total:
            break
        chosen.append((kind, weight))
        mass += weight
    return [
        Typical(
            cpu_milli=cpu, devices=devices, device_milli=milli, models=models, weight=weight / mass
        )
        for (cpu, devices, milli, models), weight in chosen
    ]


def beside(mix: Sequence[Typical]) -> float:
    """Thousandths of CPUs that the mix takes for each whole device."""
    with_device = [one for one in mix if one.devices]
    devices = sum(one.devices * one.device_milli * one.weight for one in with_device) / WHOLE
    cpus = sum(one.cpu_milli * one.weight for one in with_device)
    return max(1.0, cpus / devices) if devices else 1.0


def _mix(book: Book) -> list[Typical]:
    """Without a known mix: each shape that waits, once."""
    cpu = book.slots.index("cpu_milli")
    return [
        Typical(
            cpu_milli=shape.slots[cpu],
            devices=shape.devices,
            device_milli=shape.milli,
            models=shape.models,
            weight=1.0,
        )
        for shape in book.shapes
    ]


def _share(one: Typical) -> int:
    return one.device_milli if one.device_milli < WHOLE else 0


def _coarse(growth: Floats) -> Floats:
    """A hundred steps of a sigmoid; lower is better."""
    found: Floats = -np.floor(STEPS / (1.0 + np.exp(growth / WHOLE)))
    return found
