from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.wire.errors import SizeInvalid
from madang.wire.size import (
    Size,
    check,
    format_bytes,
    format_duration,
    parse_bytes,
    parse_cpu,
    parse_duration,
)

GOOD = Size(cpu=1, mem_bytes=64 << 20, pids=64, disk_bytes=1 << 30)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512m", 512 << 20),
        ("2g", 2 << 30),
        ("2GiB", 2 << 30),
        ("1.5k", 1536),
        ("7", 7),
        ("1 MB", 1 << 20),
    ],
)
def test_bytes_are_read_in_powers_of_1024(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "1e30", "nan", "inf", "12q", "m", "1.2.3g", "９g", "9" * 40, "99999p", "1g\n2"],
)
def test_nonsense_bytes_are_refused_in_words(text: str) -> None:
    with pytest.raises(SizeInvalid) as caught:
        parse_bytes(text, field="mem")
    assert "mem" in str(caught.value)


@pytest.mark.parametrize(("text", "cores"), [("0.5", 0.5), ("2", 2.0), ("250m", 0.25)])
def test_cores_are_read(text: str, cores: float) -> None:
    assert parse_cpu(text) == cores


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "", "x", "m", "-5m"])
def test_nonsense_cores_are_refused(text: str) -> None:
    with pytest.raises(SizeInvalid):
        parse_cpu(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90.0), ("90s", 90.0), ("2h30m", 9000.0), ("1.5d", 129600.0)]
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1s", "1e30", "s", "5 x", "9" * 30])
def test_nonsense_durations_are_refused(text: str) -> None:
    with pytest.raises(SizeInvalid):
        parse_duration(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cpu": 0.0},
        {"cpu": -1.0},
        {"cpu": math.nan},
        {"cpu": 1e30},
        {"mem_bytes": 0},
        {"mem_bytes": 10**30},
        {"pids": 0},
        {"disk_bytes": -1},
        {"time_s": 0.0},
        {"time_s": math.inf},
    ],
)
def test_a_size_that_makes_no_sense_is_refused_and_named(wrong: dict[str, float]) -> None:
    values = {"cpu": 1.0, "mem_bytes": 64 << 20, "pids": 64, "disk_bytes": 1 << 30, **wrong}
    with pytest.raises(SizeInvalid) as caught:
        check(Size(**values))  # type: ignore[arg-type]
    assert next(iter(wrong)).split("_")[0] in str(caught.value)


def test_a_sensible_size_passes() -> None:
    assert check(GOOD) is GOOD


@given(st.text(max_size=40))
def test_any_text_is_a_size_or_our_error(text: str) -> None:
    for parse in (parse_bytes, parse_cpu, parse_duration):
        try:
            assert parse(text) > 0
        except SizeInvalid:
            pass


@given(st.integers(min_value=1, max_value=1 << 58))
def test_a_printed_size_is_near_what_it_prints(count: int) -> None:
    printed = format_bytes(count)
    assert abs(parse_bytes(printed.replace("TiB", "t")) - count) <= max(1, count * 0.05)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.012, "12 ms"), (3.2, "3.2 s"), (75, "1m15s"), (90000, "1d1h")]
)
def test_durations_are_printed_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
