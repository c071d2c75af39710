"""What limits allow: the tightest counts, and is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from madang.manager.limits.types import Amounts, Asked, Counts, InForce
from madang.wire.errors import Conflict, LimitExceeded, LimitRefused, PlatformError
from madang.wire.size import format_bytes, format_duration

_MORE = "or ask an administrator for more (limits {name}: `madang limits of`)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """A limit that is in the way."""

    by: InForce
    slot: str
    limit: int
    used: int
    asked: int

    @property
    def left(self) -> int:
        return max(0, self.limit - self.used)

    @property
    def code(self) -> str:
        """``limit.project.cpu``"""
        return f"limit.{self.by.account.partition(':')[0]}.{slot_name(self.slot)}"

    @property
    def text(self) -> str:
        slot = self.slot
        return (
            f"{self.by.shown}: {slot_name(slot)} {show(slot, self.limit)} at once, "
            f"{show(slot, self.used)} used, asks {show(slot, self.asked)} → "
            f"{show(slot, self.left)} left. Stop a session (`madang ps`), "
            f"{_MORE.format(name=self.by.name)}."
        )


def over(slots: Amounts, in_force: Sequence[InForce], held: Mapping[str, Amounts]) -> Over | None:
    """The slots-at-once limit that leaves least of what is asked; None: all of it is left.

    *held*: account → slots that it has; accounts that are missing have none.
    """
    found = [
        Over(by=by, slot=slot, limit=limit, used=used, asked=asked)
        for by in in_force
        for slot, limit in by.limits.at_once.items()
        if (asked := slots.get(slot, 0)) > 0
        and asked > limit - (used := held.get(by.account, {}).get(slot, 0))
    ]
    return min(found, key=lambda one: one.left / one.asked, default=None)


def refusal(
    asked: Asked,
    in_force: Sequence[InForce],
    counts: Mapping[str, Counts],
    hours: Mapping[str, float],
) -> PlatformError | None:
    """Why the session can't be made; None: it can, though it may have to wait.

    *counts*, *hours*: account → what it has, and CPU-hours of this month; where it matters.
    """
    return (
        _too_large(asked, in_force)
        or _too_long(asked, in_force)
        or _too_many(in_force, counts)
        or _spent(in_force, hours)
    )


def time_limit(asked: Asked, in_force: Sequence[InForce]) -> float | None:
    """A session's time limit: its own, or the shortest that it may have at most."""
    caps = [by.limits.time_s for by in in_force if by.limits.time_s is not None]
    return min(caps, default=None) if asked.time_s is None else asked.time_s


def protection(in_force: Iterable[InForce], session: str, for_s: float | None) -> float:
    """For how long a session is protected from being stopped as idle; None asks for the longest.

    Raises LimitRefused for longer than that, Conflict where nothing would ever stop it.
    """
    checked = [by for by in in_force if by.limits.idle]
    if for_s == 0:
        return 0.0
    if not checked:
        text = f"nothing stops {session} for being idle: no limits of its accounts have [[idle]]."
        raise Conflict(text)
    by = min(checked, key=lambda one: one.limits.protect_s)
    most = by.limits.protect_s
    if for_s is not None and for_s > most:
        text = (
            f"{by.shown}: a session is protected for at most {format_duration(most)} at once, "
            f"asked {format_duration(for_s)}. Protect it again later, {_MORE.format(name=by.name)}."
        )
        raise LimitRefused(text, **_details(by, "protect", limit=most, asked=for_s))
    return most if for_s is None else for_s


def month_of(now: float) -> float:
    """When the calendar month (UTC) of *now* began; Unix seconds."""
    at = datetime.fromtimestamp(now, UTC)
    return at.replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()


def _too_large(asked: Asked, in_force: Sequence[InForce]) -> LimitRefused | None:
    found = [
        (most, slot, by, words)
        for by in in_force
        for limits, words in ((by.limits.session, "a session"), (by.limits.at_once, "at once"))
        for slot, most in limits.items()
        if asked.slots.get(slot, 0) > most
    ]
    if not found:
        return None
    most, slot, by, words = min(found, key=lambda one: one[0] / asked.slots[one[1]])
    name, wants = slot_name(slot), asked.slots[slot]
    text = (
        f"{by.shown}: {name} {show(slot, most)} {words}, asked {show(slot, wants)}. Ask for less "
        f"with --{name}, {_MORE.format(name=by.name)}."
    )
    return LimitRefused(text, **_details(by, name, limit=most, asked=wants))


def _too_long(asked: Asked, in_force: Sequence[InForce]) -> LimitRefused | None:
    found = [
        (most, by)
        for by in in_force
        if (most := by.limits.time_s) is not None and (asked.time_s or 0.0) > most
    ]
    if not found:
        return None
    most, by = min(found, key=lambda one: one[0])
    assert asked.time_s is not None
    text = (
        f"{by.shown}: a session runs at most {format_duration(most)}, asked "
        f"{format_duration(asked.time_s)}. Ask for less with --time, "
        f"{_MORE.format(name=by.name)}."
    )
    return LimitRefused(text, **_details(by, "time", limit=most, asked=asked.time_s))


def _too_many(in_force: Sequence[InForce], counts: Mapping[str, Counts]) -> LimitExceeded | None:
    for what in ("sessions", "pending"):
        found = [
            (limit - count, limit, by)
            for by in in_force
            for limit, count in (_count(what, by, counts.get(by.account) or Counts()),)
            if limit is not None and count >= limit
        ]
        if found:
            left, limit, by = min(found, key=lambda one: one[:2])
            text = (
                f"{by.shown}: {what} {limit} at once, {limit - left} used → 0 left. Stop one "
                f"(`madang ps`), {_MORE.format(name=by.name)}."
            )
            details = _details(by, what, limit=limit, used=limit - left, asked=1, left=0)
            return LimitExceeded(text, **details)
    return None


def _count(what: str, by: InForce, counts: Counts) -> tuple[int | None, int]:
    if what == "sessions":
        return by.limits.sessions, counts.sessions
    return by.limits.pending, counts.pending


def _spent(in_force: Sequence[InForce], hours: Mapping[str, float]) -> LimitExceeded | None:
    found = [
        (limit - used, limit, by)
        for by in in_force
        if (limit := by.limits.cpu_hours) is not None
        and (used := hours.get(by.account, 0.0)) >= limit
    ]
    if not found:
        return None
    left, limit, by = min(found, key=lambda one: one[:2])
    used = round(limit - left, 2)
    text = (
        f"{by.shown}: {limit} CPU-hours a month, {used:g} used → 0 left. Wait for the next month "
        f"(UTC), {_MORE.format(name=by.name)}."
    )
    return LimitExceeded(text, **_details(by, "cpu_hours", limit=limit, used=used, left=0))


def _details(by: InForce, what: str, **figures: float) -> dict[str, object]:
    return {"account": by.account, "limits": by.name, "what": what, **figures}


def slot_name(slot: str) -> str:
    """``mem_bytes`` → ``mem``, as options and texts of limits have it."""
    return slot.partition("_")[0]


def show(slot: str, amount: int) -> str:
    """An amount for people."""
    if slot == "cpu_milli":
        return f"{amount / 1000:g}"
    return format_bytes(amount) if slot.endswith("_bytes") else str(amount)
