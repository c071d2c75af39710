"""When a session counts as idle: from what its machine reports, looked at now and then.

A look is taken of counters that only grow, so that nothing between two looks is missed. What is
kept of former looks (``Marks``) lives in one server's memory: after a restart of the server it
begins anew, and until it is long enough nobody can say that a session is idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from madang.manager.limits.types import Check, IdleKind, InForce
from madang.wire.size import format_bytes, format_duration

SAMPLES: Final = 64
"""How many former readings of CPU and network are kept; the span is divided by them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a machine said of a session; None: it could not be measured."""

    at: float
    """Monotonic seconds of the server."""
    outputs: int | None
    """Grows with its output."""
    inputs: int | None
    """Grows with each input, signal and exec."""
    visits: int | None
    """Grows with each client that comes, and each exec."""
    clients: int | None
    """Attached at present."""
    cpu_s: float | None
    network_bytes: int | None
    """Sent and received; 0 where it has no network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What is remembered of former looks."""

    last: Look
    output_at: float
    client_at: float
    samples: tuple[Look, ...]
    """Oldest first, not all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    by: InForce
    grace_s: float
    text: str
    """``no output for 52m, nobody connected for 1h2m``"""


@dataclass(frozen=True, slots=True)
class Busy:
    """Something was seen that is not idle."""


def begin(look: Look) -> Marks:
    """With the first look nothing is known of the time before it."""
    return Marks(last=look, output_at=look.at, client_at=look.at, samples=(look,))


def observe(marks: Marks, look: Look, *, span_s: float) -> Marks:
    """After one more look; *span_s*: the longest time that any check asks about."""
    last = marks.last
    if _fell(last, look):  # another attempt, or its agent began to count anew
        return begin(look)
    spoke = (look.outputs, look.inputs) != (last.outputs, last.inputs)
    visited = bool(look.clients) or look.visits != last.visits
    samples = marks.samples
    if look.at - samples[-1].at >= span_s / SAMPLES:
        samples = (*samples, look)
    oldest = look.at - span_s
    while len(samples) > 1 and samples[1].at <= oldest:
        samples = samples[1:]
    return replace(
        marks,
        last=look,
        output_at=look.at if spoke else marks.output_at,
        client_at=look.at if visited else marks.client_at,
        samples=samples,
    )


def _fell(last: Look, look: Look) -> bool:
    pairs = (
        (last.outputs, look.outputs),
        (last.inputs, look.inputs),
        (last.visits, look.visits),
        (last.cpu_s, look.cpu_s),
        (last.network_bytes, look.network_bytes),
    )
    return any(a is not None and b is not None and b < a for a, b in pairs)


def judge(marks: Marks, in_force: Sequence[InForce]) -> Idle | Busy | None:
    """Whether somebody's limits call it idle; None: nobody can say yet, or nobody asks.

    Of several that do, the one with the shortest grace counts.
    """
    found: list[Idle] = []
    asked, busy = False, True
    for by in in_force:
        if not by.limits.idle:
            continue
        asked = True
        told = [_quiet(marks, check) for check in by.limits.idle]
        if all(told):
            grace_s = by.limits.idle_grace_s
            texts = [_tell(marks, check) for check in by.limits.idle]
            found.append(Idle(by=by, grace_s=grace_s, text=", ".join(texts)))
        if not any(one is False for one in told):
            busy = False
    if found:
        return min(found, key=lambda idle: idle.grace_s)
    return Busy() if asked and busy else None


def _quiet(marks: Marks, check: Check) -> bool | None:
    """None: the looks do not reach back far enough, and so far it was quiet."""
    last = marks.last
    if check.kind in {IdleKind.CPU, IdleKind.NETWORK}:
        return _below(marks, check)
    if check.kind is IdleKind.OUTPUT:
        known, since = last.outputs is not None and last.inputs is not None, marks.output_at
    else:
        known, since = last.clients is not None, marks.client_at
    if not known:
        return False
    if last.at - since >= check.after_s:
        return True
    return None if since <= marks.samples[0].at else False


def _below(marks: Marks, check: Check) -> bool | None:
    rate, reaches = _rate(marks, check)
    if rate is None:
        return False
    if rate >= check.below > 0 or (check.below == 0 and rate > 0):
        return False
    return True if reaches else None


def _rate(marks: Marks, check: Check) -> tuple[float | None, bool]:
    """Average per second over the check's time, and whether the looks reach back so far."""
    last = marks.last
    start = last.at - check.after_s
    first, reaches = marks.samples[0], marks.samples[0].at <= start
    for sample in marks.samples:
        if sample.at <= start:
            first = sample
    now, before = _reading(last, check), _reading(first, check)
    if now is None or before is None:
        return None, reaches
    span = last.at - first.at
    return ((now - before) / span if span > 0 else 0.0), reaches


def _reading(look: Look, check: Check) -> float | None:
    return look.cpu_s if check.kind is IdleKind.CPU else look.network_bytes


def _tell(marks: Marks, check: Check) -> str:
    now = marks.last.at
    match check.kind:
        case IdleKind.OUTPUT:
            return f"no output or input for {format_duration(now - marks.output_at)}"
        case IdleKind.CONNECTION:
            return f"nobody connected for {format_duration(now - marks.client_at)}"
        case IdleKind.CPU:
            return f"under {check.below:g} CPU for {format_duration(check.after_s)}"
        case IdleKind.NETWORK:
            rate = format_bytes(round(check.below))
            return f"under {rate}/s of network for {format_duration(check.after_s)}"


# What follows from it


@dataclass(frozen=True, slots=True)
class Warn:
    """Say that it will be stopped, and when."""

    stop_at: float
    text: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    """It is not idle any more, or protected."""


@dataclass(frozen=True, slots=True)
class Stop:
    by: InForce
    text: str


Judged = Idle | Busy | None
Step = Warn | Withdraw | Stop


def next_step(
    judged: Judged, *, stop_at: float | None, protected_until: float | None, now: float
) -> Step | None:
    """*stop_at*: when it will be stopped, if that was said; times are Unix seconds.

    It is never stopped without a warning and its grace, nor while nobody can say that it is idle.
    """
    if isinstance(judged, Busy) or (protected_until is not None and protected_until > now):
        return None if stop_at is None else Withdraw()
    if judged is None:
        return None
    if stop_at is None:
        return Warn(now + judged.grace_s, judged.text)
    if now < stop_at:
        return None
    return Stop(judged.by, judged.text)
