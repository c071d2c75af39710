"""Whose turn it is.

A plugin is a generator function ``(asks, standing) -> yields asks``; it is told by ``send`` whether
the one that it yielded was placed, and must yield each exactly once. It is registered under the
entry point group ``madang.orders`` and named in ``Policy.order``. Priority comes first in all of
ours.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from madang.manager.scheduling.types import Ask, Policy

Turns = Generator[Ask, bool, None]
Order = Callable[[Sequence[Ask], "Standing"], Turns]

LN2: Final = 0.6931471805599453


@dataclass(frozen=True, slots=True)
class Standing:
    """What an order may look at."""

    policy: Policy
    share: Callable[[Ask], float]
    """Largest fraction of the group that an ask takes of anything."""
    held: Callable[[], Mapping[str, float]]
    """The same of what each owner holds."""
    past: Mapping[str, float]
    """Mean share of each owner over the last half-lives."""


def decayed(used: float, seconds: float, half_life_s: float) -> float:
    """Share × seconds of the past, *seconds* later."""
    return used * math.exp(-LN2 * seconds / half_life_s)


def mean_share(used: float, half_life_s: float) -> float:
    """What constant share would have led to *used*."""
    return used * LN2 / half_life_s


def fifo(asks: Sequence[Ask], standing: Standing) -> Turns:
    """Priority, then time of creation."""
    yield from _one_by_one(sorted(asks, key=lambda a: (-a.priority, a.created_at, a.session)))


def short(asks: Sequence[Ask], standing: Standing) -> Turns:
    """Priority, then a due time that is later for longer ones: nobody's ever moves, so all come."""
    policy = standing.policy

    def due(ask: Ask) -> float:
        run = policy.usual_run_s if ask.limit_s is None else ask.limit_s
        return ask.created_at + policy.stretch * run

    yield from _one_by_one(
        sorted(asks, key=lambda a: (-a.priority, due(a), a.created_at, a.session))
    )


def _one_by_one(asks: Sequence[Ask]) -> Turns:
    for ask in asks:  # noqa: UP028 - a list can't be sent to
        yield ask


def drf(asks: Sequence[Ask], standing: Standing) -> Turns:
    """Priority, then who holds least of what they hold most of, by weight.

    Source: Ghodsi et al., Dominant Resource Fairness, NSDI 2011.
    """
    yield from _by_share(asks, standing, dict(standing.held()))


def fair(asks: Sequence[Ask], standing: Standing) -> Turns:
    """As ``drf``, with what they held in the past added: who had less comes first."""
    held, past = standing.held(), standing.past
    shares = {o: held.get(o, 0.0) + past.get(o, 0.0) for o in {*held, *past}}
    yield from _by_share(asks, standing, shares)


def _by_share(asks: Sequence[Ask], standing: Standing, shares: dict[str, float]) -> Turns:
    weights = standing.policy.weights
    levels: dict[int, dict[str, deque[Ask]]] = {}
    for ask in sorted(asks, key=attrgetter("created_at", "session")):
        levels.setdefault(ask.priority, {}).setdefault(ask.owner, deque()).append(ask)
    for priority in sorted(levels, reverse=True):
        queues = levels[priority]

        def turn(owner: str, queues: Mapping[str, deque[Ask]] = queues) -> tuple[float, float, str]:
            share = shares.get(owner, 0.0) / weights.get(owner, 1.0)
            return share, queues[owner][0].created_at, owner

        heap = [turn(owner) for owner in queues]
        heapq.heapify(heap)
        while heap:
            owner = heap[0][2]
            queue = queues[owner]
            ask = queue.popleft()
            placed = yield ask
            if placed:
                shares[owner] = shares.get(owner, 0.0) + standing.share(ask)
            if queue:
                heapq.heapreplace(heap, turn(owner))
            else:
                heapq.heappop(heap)


BUILT_IN: Final[Mapping[str, Order]] = {"fifo": fifo, "short": short, "drf": drf, "fair": fair}
