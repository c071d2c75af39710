"""Whether a kernel shall stand still: a register with two writers, the manager and the kernel.

The manager's word is an order with a number: the node's revision at which it was given, so numbers
only grow, and every newer order wins over all that was before it. An order is followed once. What
happens here afterwards, at once and without asking, stays until the next order:

```
 order N: freeze ──▶ frozen ──input──▶ awake ──(list names order N again)──▶ awake
 order N+1: freeze ──▶ frozen          │
                                       └── no input and no CPU for a while ──▶ frozen (if set so)
```

The report says what is, and the newest order that this takes into account (``freeze_revision``).
The manager's row follows a report whose number is at least its own; a report with a smaller one was
made before the newest order arrived, and is only late. So the two never fight:

- an order that crosses a wake-up on its way is newer, and is followed: the user who froze the
  session had not heard of the input;
- a wake-up that crosses an order cannot undo it: its report carries the older number;
- what was woken is not frozen again by the order that had frozen it, however often that is
  repeated: after a break of the link, after a restart of manager, agent or both.

The journal keeps the report, written when the runtime had done it. Where journal and runtime differ
after a restart the runtime is right, except that an order without its report is followed again.

Woken by: input, a resize, a signal, an exec; and, in ``reconcile``, by all that ends it. Reading
output does not wake, nor do files: neither needs the program. The keeper, which holds the time
limit, is never frozen; it tells us when the limit has passed, because a frozen program can't obey.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from madang.wire.kernel import Assignment, KernelReport, KernelSpec
from madang.wire.session import Usage

IDLE_CORES: Final = 0.001
"""Less is no work: a terminal's cursor, a timer that finds nothing."""


@dataclass(frozen=True, slots=True)
class Frost:
    """Whether to freeze, and the newest order that this takes into account."""

    frozen: bool = False
    revision: int = 0


def reported(report: KernelReport) -> Frost:
    return Frost(report.frozen_since is not None, report.freeze_revision)


def follow(frost: Frost, order: Assignment | None) -> Frost:
    """A newer order wins; one that was followed changes nothing."""
    if order is None or order.freeze_revision <= frost.revision:
        return frost
    return Frost(order.frozen, order.freeze_revision)


def woken(frost: Frost) -> Frost:
    return replace(frost, frozen=False)


def left_alone(frost: Frost) -> Frost:
    """Nobody used it for long."""
    return replace(frost, frozen=True)


def waits_for_people(spec: KernelSpec) -> bool:
    """No main program, or one at a terminal: it can stand still until somebody comes."""
    return not spec.build and (spec.tty or not spec.argv)


@dataclass(frozen=True, slots=True)
class Activity:
    """Since when a kernel rests, as measured."""

    since: float
    """Monotonic seconds: the last input, or the last look that found it at work."""
    at: float
    cpu_s: float | None = None


def observe(seen: Activity, usage: Usage, now: float) -> Activity:
    """After one more look; where CPU time can't be measured it never counts as resting."""
    if usage.cpu_s is None or seen.cpu_s is None:
        return Activity(now, now, usage.cpu_s)
    worked = usage.cpu_s - seen.cpu_s > IDLE_CORES * (now - seen.at)
    return Activity(now if worked else seen.since, now, usage.cpu_s)


def touched(seen: Activity, now: float) -> Activity:
    """Input came."""
    return replace(seen, since=now)
