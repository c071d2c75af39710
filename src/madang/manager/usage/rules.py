"""Cutting intervals at months and prices, and summing them; exact, in integers."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Final

from madang.manager.db import micros, seconds
from madang.manager.usage.types import Measured, PriceRow, Slot
from madang.wire.errors import InvalidRequest
from madang.wire.session import Ended
from madang.wire.usage import Bill, BillLine, UsageLine

MAX_TIME_S: Final = 1e11
HOUR_US: Final = 3_600_000_000
PRICE_DIGITS: Final = 9
SCALE: Final = 10**PRICE_DIGITS
ANY_GROUP: Final = "*"
SLOTS: Final = tuple(Slot)
_MONTH: Final = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])")
_CURRENCY: Final = re.compile(r"[A-Z]{3}")
_PRICE: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def time_of(given: float, field: str) -> int:
    """As stored. Raises InvalidRequest."""
    if not 0 <= given <= MAX_TIME_S:
        raise InvalidRequest(f"{field}: {given:g} is no time in seconds since 1970.", field=field)
    return micros(given)


def iso(at: int) -> str:
    """For people, in UTC, to the millisecond."""
    found = datetime.fromtimestamp(at // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{found}.{at // 1000 % 1000:03}Z"


def month_of(at: int) -> str:
    """``2026-11``, in UTC."""
    return datetime.fromtimestamp(at // 1_000_000, UTC).strftime("%Y-%m")


def month_bounds(month: str) -> tuple[int, int]:
    """Begin of that month and of the next. Raises InvalidRequest."""
    if (found := _MONTH.fullmatch(month)) is None or found[1] < "1970" or found[1] > "9998":
        raise InvalidRequest(f"month: {month[:40]!r} is none; write 2026-11.", field="month")
    year, number = int(found[1]), int(found[2])
    return _begin(year, number), _begin(year + number // 12, number % 12 + 1)


def _begin(year: int, number: int) -> int:
    return int(datetime(year, number, 1, tzinfo=UTC).timestamp()) * 1_000_000


def months_between(start: int, end: int) -> list[int]:
    """Where months begin after *start* and before *end*."""
    found = []
    at = month_bounds(month_of(start))[1]
    while at < end:
        found.append(at)
        at = month_bounds(month_of(at))[1]
    return found


def measured_of(ended: Ended) -> Measured:
    """What the agent counted."""
    network = ended.network
    return Measured(
        cpu_us=None if ended.cpu_s is None else micros(ended.cpu_s),
        mem_peak_bytes=ended.mem_peak_bytes,
        disk_used_bytes=ended.disk_used_bytes,
        received_bytes=None if network is None else network.received_bytes,
        sent_bytes=None if network is None else network.sent_bytes,
    )


# Prices


@dataclass(frozen=True, slots=True)
class Tariff:
    """What a slot costs in a group as time goes on; each price counts from its time on."""

    times: tuple[int, ...]
    prices: tuple[tuple[int, str], ...]
    """Price times ``SCALE``, and currency."""

    def at(self, time: int) -> tuple[int, str] | None:
        index = bisect_right(self.times, time)
        return self.prices[index - 1] if index else None


class Prices:
    """All prices that were ever set; of a group's own, or of ``*``."""

    def __init__(self, rows: Iterable[PriceRow]) -> None:
        by_slot: defaultdict[tuple[str, str], dict[int, tuple[int, str]]] = defaultdict(dict)
        for row in sorted(rows, key=lambda row: row.id):  # of two for one time the newer counts
            value = (int(Decimal(row.price).scaleb(PRICE_DIGITS)), row.currency)
            by_slot[row.group_name, row.slot][row.valid_from] = value
        self._tariffs: Final = {
            key: Tariff(tuple(sorted(found)), tuple(found[time] for time in sorted(found)))
            for key, found in by_slot.items()
        }
        self._of: dict[str, tuple[tuple[Slot, Tariff], ...]] = {}

    def of(self, group: str) -> tuple[tuple[Slot, Tariff], ...]:
        """Of the slots that have one."""
        if group not in self._of:
            tariffs = self._tariffs
            found = ((s, tariffs.get((group, s)) or tariffs.get((ANY_GROUP, s))) for s in SLOTS)
            self._of[group] = tuple((slot, tariff) for slot, tariff in found if tariff)
        return self._of[group]


def check_price(text: str, currency: str) -> None:
    """Raises InvalidRequest."""
    if not _PRICE.fullmatch(text):
        shown = "a number such as 0.045, at most nine digits behind the point"
        raise InvalidRequest(f"price: {text[:40]!r} is not {shown}.", field="price")
    if not _CURRENCY.fullmatch(currency):
        text = f"currency: {currency[:40]!r} is no code such as EUR."
        raise InvalidRequest(text, field="currency")


# Sums


@dataclass(slots=True)
class Sum:
    """Amounts times microseconds, in the columns' own units."""

    intervals: int = 0
    open: int = 0
    time: int = 0
    slots: list[int] = field(default_factory=lambda: [0] * len(SLOTS))
    cpu_used: int = 0
    mem_peak: int = 0
    received: int = 0
    sent: int = 0
    cost: defaultdict[tuple[str, Slot], int] = field(default_factory=lambda: defaultdict(int))
    """(currency, slot) → column × microseconds × price × SCALE"""

    def add(self, row: Any, start: int, end: int) -> None:
        """The part of *row* from *start* to *end*."""
        length = end - start
        self.intervals += 1
        self.open += row.ended_at is None
        self.time += length
        slots = self.slots
        slots[0] += row.cpu_milli * length
        slots[1] += row.mem_bytes * length
        slots[2] += row.disk_bytes * length
        slots[3] += row.pids * length
        if row.ended_at is not None:
            self._add_measured(row, start - row.started_at, end - row.started_at)
        if row.mem_peak_bytes is not None and row.mem_peak_bytes > self.mem_peak:
            self.mem_peak = row.mem_peak_bytes

    def _add_measured(self, row: Any, start: int, end: int) -> None:
        """Shares by time, so that the parts of a row sum up to the whole exactly."""
        whole = row.ended_at - row.started_at

        def share(value: int | None) -> int:
            return 0 if value is None else value * end // whole - value * start // whole

        self.cpu_used += share(row.cpu_us)
        self.received += share(row.received_bytes)
        self.sent += share(row.sent_bytes)

    def charge(self, row: Any, start: int, end: int, prices: Prices) -> None:
        """Cut where prices change."""
        for slot, tariff in prices.of(row.group_name):
            amount = getattr(row, slot.column)
            if start >= tariff.times[-1]:  # the newest price, as most often
                price, currency = tariff.prices[-1]
                self.cost[currency, slot] += amount * (end - start) * price
                continue
            for begin, finish in pieces(start, end, tariff.times):
                if (found := tariff.at(begin)) is not None:
                    self.cost[found[1], slot] += amount * (finish - begin) * found[0]

    def join(self, other: Sum) -> None:
        """Add all of *other* but its numbers of intervals: a cut one is in several sums."""
        self.time += other.time
        self.slots = [one + more for one, more in zip(self.slots, other.slots, strict=True)]
        self.cpu_used += other.cpu_used
        self.mem_peak = max(self.mem_peak, other.mem_peak)
        self.received += other.received
        self.sent += other.sent
        for key, value in other.cost.items():
            self.cost[key] += value

    def line(self, by: Mapping[str, str]) -> UsageLine:
        cpu, mem, disk, pids = self.slots
        costs: defaultdict[str, Decimal] = defaultdict(Decimal)
        for (currency, slot), value in self.cost.items():
            costs[currency] += money(value, slot)
        return UsageLine(
            by=dict(by),
            intervals=self.intervals,
            open=self.open,
            time_s=seconds(self.time),
            cpu_core_s=seconds(cpu) / Slot.CPU.unit,
            mem_byte_s=seconds(mem),
            disk_byte_s=seconds(disk),
            pid_s=seconds(pids),
            cpu_used_s=seconds(self.cpu_used),
            mem_peak_bytes=self.mem_peak,
            received_bytes=self.received,
            sent_bytes=self.sent,
            cost={currency: f"{value:f}" for currency, value in sorted(costs.items())},
        )


def pieces(start: int, end: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """From *start* to *end*, cut at *cuts*, which are in order."""
    for cut in cuts[bisect_right(cuts, start) :]:
        if cut >= end:
            break
        yield start, cut
        start = cut
    if start < end:
        yield start, end


def money(value: int, slot: Slot) -> Decimal:
    """Of ``Sum.cost``; to nine digits behind the point, as prices are."""
    unit = slot.unit * HOUR_US
    return Decimal((2 * value + unit) // (2 * unit)).scaleb(-PRICE_DIGITS)


class Summing:
    """Takes intervals, cut to a span of time, into sums by what they have in common."""

    def __init__(
        self, by: Sequence[str], *, since: int | None, until: int, now: int, prices: Prices
    ) -> None:
        self._by: Final = tuple(by)
        self._months: Final = "month" in by
        self._since: Final = 0 if since is None else since
        self._until: Final = until
        self._now: Final = now
        self._prices: Final = prices
        self.sums: Final[defaultdict[tuple[str, ...], Sum]] = defaultdict(Sum)
        self._intervals = 0
        self._open = 0

    def add(self, row: Any, names: Sequence[str]) -> None:
        """*names*: what the row has for each of ``by``, empty for the month."""
        start = max(row.started_at, self._since)
        end = min(self._now if row.ended_at is None else row.ended_at, self._until)
        if end <= start:
            return
        self._intervals += 1
        self._open += row.ended_at is None
        if not self._months:
            self._add(tuple(names), row, start, end)
            return
        for begin, finish in pieces(start, end, months_between(start, end)):
            month = month_of(begin)
            self._add(tuple(name or month for name in names), row, begin, finish)

    def _add(self, key: tuple[str, ...], row: Any, start: int, end: int) -> None:
        found = self.sums[key]
        found.add(row, start, end)
        found.charge(row, start, end, self._prices)

    @property
    def total(self) -> Sum:
        """Of all; an interval counts once."""
        whole = Sum(intervals=self._intervals, open=self._open)
        for each in self.sums.values():
            whole.join(each)
        return whole

    def lines(self) -> tuple[UsageLine, ...]:
        found = sorted(self.sums.items())
        return tuple(each.line(dict(zip(self._by, key, strict=True))) for key, each in found)


# Bills


class Billing:
    """Sums of a month by who, where, what and at which price."""

    def __init__(self, start: int, end: int, now: int, prices: Prices) -> None:
        self._start: Final = start
        self._end: Final = end
        self._now: Final = now
        self._prices: Final = prices
        self._sums: Final[defaultdict[tuple[str, str, Slot, int, str], int]] = defaultdict(int)
        self._unpriced: Final[set[str]] = set()
        self._open = 0

    def add(self, row: Any) -> None:
        start = max(row.started_at, self._start)
        end = min(self._now if row.ended_at is None else row.ended_at, self._end)
        if end <= start:
            return
        self._open += row.ended_at is None
        tariffs = self._prices.of(row.group_name)
        if not tariffs:
            self._unpriced.add(row.group_name)
        for slot, tariff in tariffs:
            amount = getattr(row, slot.column)
            for begin, finish in pieces(start, end, tariff.times):
                price = tariff.at(begin)
                if price is None:
                    self._unpriced.add(f"{row.group_name} {slot}")
                else:
                    key = (row.user, row.group_name, slot, *price)
                    self._sums[key] += amount * (finish - begin)

    def bill(self, project: str, month: str) -> Bill:
        """Raises InvalidRequest if prices are in several currencies."""
        currencies = sorted({key[4] for key in self._sums})
        if len(currencies) > 1:
            text = f"prices are in {' and '.join(currencies)}; set those of one group anew."
            raise InvalidRequest(text, currencies=currencies)
        total = Decimal(0)
        lines = []
        for (user, group, slot, price, _), value in sorted(self._sums.items()):
            amount = _rounded(money(value * price, slot), "0.01")
            total += amount
            line = BillLine(
                user=user,
                group=group,
                slot=str(slot),
                unit_hours=f"{_rounded(_unit_hours(value, slot), '0.001'):f}",
                price=f"{Decimal(price).scaleb(-PRICE_DIGITS).normalize():f}",
                amount=f"{amount:f}",
            )
            lines.append(line)
        return Bill(
            project=project,
            month=month,
            currency=currencies[0] if currencies else "",
            lines=tuple(lines),
            total=f"{_rounded(total, '0.01'):f}",
            open=self._open,
            unpriced=tuple(sorted(self._unpriced)),
        )


def _unit_hours(value: int, slot: Slot) -> Decimal:
    return Decimal(value) / (slot.unit * HOUR_US)


def _rounded(value: Decimal, to: str) -> Decimal:
    return value.quantize(Decimal(to), ROUND_HALF_UP)
