"""Orders and placements by name: ours, and what other packages register."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Final

from madang.manager.scheduling.planner.fragmentation import Fragments
from madang.manager.scheduling.planner.order import BUILT_IN, Order
from madang.manager.scheduling.planner.placement import Pack, Placement, Spread

PLACEMENTS: Final[Mapping[str, type[Placement]]] = {
    "pack": Pack,
    "spread": Spread,
    "fragments": Fragments,
}


class UnknownPlugin(ValueError):
    """A policy names an order or a placement that nobody has registered."""


@cache
def order(name: str) -> Order:
    """Raises UnknownPlugin."""
    found: Order = _find(name, BUILT_IN, "madang.orders")
    return found


@cache
def placement(name: str) -> type[Placement]:
    """Raises UnknownPlugin."""
    found: type[Placement] = _find(name, PLACEMENTS, "madang.placements")
    return found


def _find(name: str, ours: Mapping[str, Any], group: str) -> Any:
    """Ours can't be replaced by a package that takes their name."""
    if name in ours:
        return ours[name]
    theirs = {point.name: point for point in entry_points(group=group)}
    if name not in theirs:
        known = ", ".join(sorted({*ours, *theirs}))
        raise UnknownPlugin(f"no {group.removeprefix('madang.')[:-1]} {name!r}; there are {known}")
    return theirs[name].load()
