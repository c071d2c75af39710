"""Placement that keeps devices usable: where expected fragments over the typical mix grow least.

A machine's fragments for one kind of task are the thousandths of devices that this task can't use:
all of them where the task has no room, otherwise those of devices with less left than it asks of
one. The mean over the typical mix is what a placement changes. The change is rounded to a hundred
steps, and the fullest machine wins among equals: exact comparison of tiny differences is worse.

Source: Weng et al., Beware of Fragmentation: Scheduling GPU-Sharing Workloads with Fragmentation
Gradient Descent, USENIX ATC 2023.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np

from madang.manager.scheduling.planner.book import Book, Floats, Ints
from madang.manager.scheduling.planner.placement import Pack
from madang.manager.scheduling.types import WHOLE, Policy, Typical

MASS: Final = 0.95
"""The most frequent kinds up to this part of all count as typical."""
STEPS: Final = 100.0
TIE: Final = 1e-4


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
        self._cpus: Final = np.array(sorted({t.cpu_milli for t in typical}), np.int64)
        self._weights: Final = self._weigh(typical)
        self._kinds: Final = sorted({(s.devices, s.share) for s in book.shapes})
        kind = {kind: at for at, kind in enumerate(self._kinds)}
        self._kind: Final = np.array([kind[s.devices, s.share] for s in book.shapes], np.int64)
        self._known: Final[dict[tuple[int, ...], Floats]] = {}

    def _weigh(self, typical: Sequence[Typical]) -> Floats:
        """(models, cpu levels + 1, goals): how much of the mix has enough of so many CPUs."""
        found = np.zeros((len(self._models), len(self._cpus) + 1, max(1, len(self._goals))))
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
        found = np.empty(len(book.rooms))
        for node in range(len(book.rooms)):
            found[node] = self._growth(node)[shape]
        return _coarse(found) + TIE * self._pack.row(shape)

    def column(self, node: int) -> Floats:
        return _coarse(self._growth(node)) + TIE * self._pack.column(node)

    def _growth(self, node: int) -> Floats:
        """By shape; remembered, since machines that are equal grow equally."""
        left = self._book.devices[node]
        key = (self._model[node], int(self._book.amounts[self._cpu, node]), *sorted(left.tolist()))
        found = self._known.get(key)
        if found is None:
            found = self._options(node, np.unique(left[left > 0])).min(1)
            self._known[key] = found
        return found

    def _options(self, node: int, values: Ints) -> Floats:
        """(shapes, distinct devices): growth if a share goes there; inf where it can't."""
        usable, sums = self._after(node, values)
        cpu = int(self._book.amounts[self._cpu, node])
        weights = self._weights[self._model[node]]
        mine = weights[np.searchsorted(self._cpus, cpu - self._need_cpu, side="right")]
        now = weights[int(np.searchsorted(self._cpus, cpu, side="right"))]
        # The last kind is the machine as it is.
        before = sums[-1, 0] - float(now @ usable[-1, 0])
        after = sums[self._kind] - (usable[self._kind] * mine[:, None, :]).sum(2)
        found: Floats = after - before
        return found

    def _after(self, node: int, values: Ints) -> tuple[Floats, Floats]:
        """By kind of ask and device taken: what each goal can use, and the sum that is left."""
        left = self._book.devices[node]
        left = left[left > 0]
        full, total = int((left == WHOLE).sum()), int(left.sum())
        low = np.where(left[:, None] < self._levels, left[:, None], 0).sum(0)
        width = max(1, len(values))
        count = len(self._kinds)
        sums = np.full((count + 1, width), np.inf)
        usable = np.zeros((count + 1, width, max(1, len(self._goals))))
        partial = left[left < WHOLE]
        rest = int(partial.max()) if len(partial) else 0
        for at, (devices, share) in enumerate([*self._kinds, (0, 0)]):
            if share:
                fits = np.flatnonzero(values >= share)
                if not len(fits):
                    continue
                old = values[fits]
                new = old - share
                lows = (
                    low
                    - np.where(old[:, None] < self._levels, old[:, None], 0)
                    + np.where(new[:, None] < self._levels, new[:, None], 0)
                )
                fulls = full - (old == WHOLE)
                others = np.array([_largest_but(left, int(value)) for value in old], np.int64)
                most = np.maximum(others, new)
                sums[at, fits] = total - share
                usable[at, fits] = self._usable(fulls, most, total - share - lows)
            elif devices <= full:
                fulls = np.array([full - devices])
                most = np.array([WHOLE if full > devices else rest])
                remains = total - WHOLE * devices
                sums[at, 0] = remains
                usable[at, :1] = self._usable(fulls, most, (remains - low)[None])
        return usable, sums

    def _usable(self, fulls: Ints, most: Ints, above: Ints) -> Floats:
        """(options, goals): thousandths on devices that are large enough, if the goal fits."""
        if not self._goals:
            return np.zeros((len(fulls), 1))
        fits = (fulls[:, None] >= self._wholes) & (most[:, None] >= self._shares)
        found: Floats = np.where(fits, above, 0).astype(np.float64)
        return found

    def pick(self, node: int, shape: int) -> tuple[tuple[int, int], ...]:
        share = self._book.shapes[shape].share
        if not share:
            return self._book.pick(node, shape)
        left = self._book.devices[node]
        values = np.unique(left[left > 0])
        best = values[int(self._options(node, values)[shape].argmin())]
        return ((int((left == best).argmax()), share),)


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


def _largest_but(left: Ints, value: int) -> int:
    """The largest that remains when one *value* is taken away."""
    top = int(left.max())
    if value < top or (left == top).sum() > 1:
        return top
    others = left[left < top]
    return int(others.max()) if len(others) else 0


def _coarse(growth: Floats) -> Floats:
    """A hundred steps of a sigmoid; lower is better."""
    found: Floats = -np.floor(STEPS / (1.0 + np.exp(growth / WHOLE)))
    return found
