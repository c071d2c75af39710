"""Cutting and summing, against a slow and obvious account of the same."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.manager.usage import rules
from madang.manager.usage.types import PriceRow, Slot, UsageRow
from madang.wire.errors import InvalidRequest

DAY = 86_400_000_000
T0 = rules.month_bounds("2026-10")[0]
ROW = UsageRow(
    id="s.1", session_id="s", session="calm-otter", kind="run", attempt=1, nonce="n", node="n1",
    user_id="u", user="ann", project_id="p", domain_id="d", group_name="gpu", token_id="",
    cpu_milli=1500, mem_bytes=3 << 30, disk_bytes=0, pids=9, started_at=0, ended_at=0,
    closed_by="agent", cpu_us=1_000_003, mem_peak_bytes=7, disk_used_bytes=None,
    received_bytes=11, sent_bytes=None, corrects=None, reason="", recorded_at=0,
)  # fmt: skip


def price(number: int, *, group: str = "gpu", slot: str = "cpu", text: str = "1",
          since: int = 0, currency: str = "EUR") -> PriceRow:  # fmt: skip
    return PriceRow(number, group, slot, text, currency, since, "admin", 0)


def length(row: UsageRow) -> int:
    assert row.ended_at is not None
    return row.ended_at - row.started_at


spans = st.tuples(st.integers(0, 120 * DAY), st.integers(1, 80 * DAY)).map(
    lambda pair: replace(ROW, started_at=T0 + pair[0], ended_at=T0 + pair[0] + pair[1])
)
tariffs = st.lists(
    st.tuples(st.integers(0, 150), st.decimals("0", "99", places=3)), max_size=4
).map(
    lambda found: [
        price(at, text=str(value), since=T0 + day * DAY) for at, (day, value) in enumerate(found)
    ]
)


@given(st.lists(spans, max_size=5), tariffs)
def test_months_add_up_to_the_whole(rows: list[UsageRow], prices: list[PriceRow]) -> None:
    """Whatever is cut, nothing is lost and nothing counts twice, to the microsecond."""
    summing = rules.Summing(
        ("month",), since=None, until=T0 + 999 * DAY, now=T0, prices=rules.Prices(prices)
    )
    for row in rows:
        summing.add(row, [""])

    sums = summing.sums.values()
    assert sum(each.time for each in sums) == sum(map(length, rows))
    assert sum(each.slots[0] for each in sums) == summing.total.slots[0]
    assert sum(each.cpu_used for each in sums) == len(rows) * 1_000_003 == summing.total.cpu_used
    assert sum(each.received for each in sums) == len(rows) * 11
    assert sum(each.cost["EUR", Slot.CPU] for each in sums) == summing.total.cost["EUR", Slot.CPU]


@given(spans, st.integers(0, 200), st.integers(0, 200))
def test_a_span_of_time_and_its_parts_are_the_same(row: UsageRow, one: int, other: int) -> None:
    cuts = sorted({T0, T0 + one * DAY, T0 + other * DAY, T0 + 300 * DAY})
    parts = 0
    for start, end in pairwise(cuts):
        summing = rules.Summing((), since=start, until=end, now=T0, prices=rules.Prices([]))
        summing.add(row, [])
        parts += summing.total.time
    assert parts == length(row)


@given(spans, tariffs)
def test_each_moment_costs_what_was_in_force_then(row: UsageRow, prices: list[PriceRow]) -> None:
    """Against a walk over the days; prices change at midnight only."""
    begin = (row.started_at // DAY) * DAY
    row = replace(row, started_at=begin, ended_at=begin + 30 * DAY)
    summing = rules.Summing(
        (), since=None, until=T0 + 999 * DAY, now=T0, prices=rules.Prices(prices)
    )
    summing.add(row, [])

    wanted = Fraction(0)
    for day in range(30):
        known = [each for each in prices if each.valid_from <= begin + day * DAY]
        if known:
            best = max(known, key=lambda each: (each.valid_from, each.id))
            wanted += Fraction(best.price) * 24 * 3 / 2
    cost = summing.total.line({}).cost
    assert Fraction(cost.get("EUR", "0")) == wanted


def test_a_price_of_the_group_goes_before_that_of_all() -> None:
    prices = rules.Prices([price(1, group="*", text="5"), price(2, text="7")])
    assert [tariff.at(0) for _, tariff in prices.of("gpu")] == [(7 * rules.SCALE, "EUR")]
    assert [tariff.at(0) for _, tariff in prices.of("cpu")] == [(5 * rules.SCALE, "EUR")]


def test_a_bill_adds_up_as_it_is_printed() -> None:
    start, end = rules.month_bounds("2026-11")
    rows = [price(1, text="0.045"), price(2, slot="mem", text="0.005"),
            price(3, text="0.05", since=start + 10 * DAY)]  # fmt: skip
    billing = rules.Billing(start, end, end, rules.Prices(rows))
    billing.add(replace(ROW, started_at=start - DAY, ended_at=start + 20 * DAY))
    billing.add(replace(ROW, started_at=start, ended_at=start + DAY // 7, user="bob"))
    billing.add(replace(ROW, started_at=start, ended_at=None, group_name="free"))

    bill = billing.bill("p", "2026-11")

    lines = {(line.user, line.slot, line.price): line for line in bill.lines}
    assert lines["ann", "cpu", "0.045"].unit_hours == "360.000"
    assert lines["ann", "cpu", "0.045"].amount == "16.20"
    assert lines["ann", "cpu", "0.05"].amount == "18.00"
    assert lines["ann", "mem", "0.005"].amount == "7.20"
    assert bill.total == str(sum(Decimal(line.amount) for line in bill.lines))
    assert (bill.open, bill.unpriced, bill.currency) == (1, ("free",), "EUR")


def test_a_bill_in_two_currencies_is_refused() -> None:
    start, end = rules.month_bounds("2026-11")
    prices = rules.Prices([price(1), price(2, slot="mem", currency="USD")])
    billing = rules.Billing(start, end, end, prices)
    billing.add(replace(ROW, started_at=start, ended_at=end))
    with pytest.raises(InvalidRequest, match="EUR and USD"):
        billing.bill("p", "2026-11")


@pytest.mark.parametrize("text", ["2026-13", "2026-1", "26-11", "9999-12", "1969-12", "abc"])
def test_what_is_no_month_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        rules.month_bounds(text)


@pytest.mark.parametrize("text", ["-1", "1e9", "NaN", "0.0000000001", "", "1,5", "٣"])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        rules.check_price(text, "EUR")
