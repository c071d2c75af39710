"""Reading segments that somebody else writes and deletes."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from madang.agent.launcher.output import Log
from madang.agent.logs import LogReader, end_offset, find_start, segments
from madang.wire.errors import LogGone
from madang.wire.log import MAX_DATA, LogGap, LogRecord, pack

CHUNKS = st.lists(
    st.tuples(st.sampled_from([1, 2]), st.binary(min_size=1, max_size=300)), max_size=40
)


async def read_all(folder: str, offset: int = 0) -> list[LogRecord | LogGap]:
    reader = LogReader(folder, offset)
    found: list[LogRecord | LogGap] = []
    try:
        while (news := await reader.read()) is not None:
            found += [news] if isinstance(news, LogGap) else news
    finally:
        reader.close()
    return found


def write(folder: str, chunks: list[tuple[int, bytes]], limit: int = 10**9) -> Log:
    log = Log(folder, limit)
    for stream, data in chunks:
        log.append(stream, data)
    log.close()
    return log


@settings(max_examples=60, deadline=None)
@given(chunks=CHUNKS, limit=st.integers(1000, 20_000))
def test_what_was_written_is_read_in_order_with_a_gap_at_most(
    chunks: list[tuple[int, bytes]], limit: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = write(folder, chunks, limit)

        found = asyncio.run(read_all(folder))

        at = 0
        if found and isinstance(found[0], LogGap):
            assert found[0].start == 0
            at = found.pop(0).end
        kept = []
        for record in found:
            assert isinstance(record, LogRecord)
            assert record.offset == at
            at = record.end
            kept.append((record.stream, record.data))
        assert at == log.end
        assert kept == (chunks[-len(kept) :] if kept else [])
        assert end_offset(folder) == (log.end if chunks else None)


@settings(max_examples=60, deadline=None)
@given(chunks=CHUNKS, data=st.data())
def test_reading_begins_at_a_record_wherever_it_is_asked_to(
    chunks: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(folder, chunks, 4000)
        everything = asyncio.run(read_all(folder))
        records = [item for item in everything if isinstance(item, LogRecord)]
        end = records[-1].end if records else 0
        offset = data.draw(st.integers(0, end + 10))

        start = find_start(folder, offset=offset)

        rest = asyncio.run(read_all(folder, start))
        expected = [record for record in records if record.offset >= offset]
        assert [item for item in rest if isinstance(item, LogRecord)] == expected


@settings(max_examples=60, deadline=None)
@given(chunks=CHUNKS, tail=st.integers(0, 3000))
def test_a_tail_has_at_least_as_much_as_asked_and_no_record_more(
    chunks: list[tuple[int, bytes]], tail: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(folder, chunks, 100_000)
        records = asyncio.run(read_all(folder))

        rest = asyncio.run(read_all(folder, find_start(folder, offset=0, tail_bytes=tail)))

        sizes = [len(record.data) for record in rest if isinstance(record, LogRecord)]
        assert rest == records[len(records) - len(rest) :]
        assert sum(sizes) >= min(tail, sum(len(data) for _, data in chunks))
        assert sum(sizes[1:]) < tail or not sizes


def test_since_finds_the_first_record_that_is_not_older(tmp_path: Path) -> None:
    for number in range(3):
        first = number * 10
        records = b"".join(pack(1, at, b"x" * 4) for at in range(first, first + 10))
        (tmp_path / f"{number * 200:020d}").write_bytes(records)

    for since, at in ((0, 0), (7, 140), (10, 200), (29, 580), (30, 600), (99, 600)):
        assert find_start(str(tmp_path), offset=0, since_us=since) == at


async def test_a_reader_goes_on_where_the_writer_goes_on(tmp_path: Path) -> None:
    log = Log(str(tmp_path), 8000)
    reader = LogReader(str(tmp_path))
    seen = b""
    for number in range(300):
        log.append(1, b"%03d" % number * 30)
        while (news := await reader.read()) is not None:
            assert isinstance(news, list), "a reader that keeps up has no gaps"
            seen += b"".join(record.data for record in news)
    assert seen == b"".join(b"%03d" % number * 30 for number in range(300))
    reader.close()
    log.close()


async def test_what_is_deleted_under_a_slow_reader_is_a_gap(tmp_path: Path) -> None:
    log = Log(str(tmp_path), 4000)
    log.append(1, b"first")
    reader = LogReader(str(tmp_path))
    first = await reader.read()
    for _ in range(100):
        log.append(1, b"x" * 500)

    items = [news async for news in _news(reader)]

    assert isinstance(first, list)
    (gap,) = [item for item in items if isinstance(item, LogGap)]
    assert gap.end in segments(str(tmp_path))
    assert reader.offset == log.end
    reader.close()
    log.close()


async def _news(reader: LogReader):  # type: ignore[no-untyped-def]
    while (news := await reader.read()) is not None:
        yield news


async def test_a_torn_record_at_the_end_is_not_there(tmp_path: Path) -> None:
    whole = pack(1, 5, b"whole")
    (tmp_path / f"{0:020d}").write_bytes(whole + pack(1, 6, b"torn")[:-1])

    records = await read_all(str(tmp_path))

    assert [r.data for r in records if isinstance(r, LogRecord)] == [b"whole"]
    assert find_start(str(tmp_path), offset=len(whole) + 3) == len(whole) + 3


async def test_the_largest_records_are_read(tmp_path: Path) -> None:
    data = [bytes([number]) * MAX_DATA for number in range(20)]
    write(str(tmp_path), [(1, each) for each in data])

    records = await read_all(str(tmp_path))

    assert [r.data for r in records if isinstance(r, LogRecord)] == data


async def test_garbage_is_said_not_sent(tmp_path: Path) -> None:
    (tmp_path / f"{0:020d}").write_bytes(b"garbage" * 100)
    with pytest.raises(LogGone):
        await read_all(str(tmp_path))


async def test_a_log_that_is_not_there_has_nothing(tmp_path: Path) -> None:
    folder = str(tmp_path / "none")
    assert await read_all(folder, 77) == []
    assert end_offset(folder) is None
    for more in ({}, {"tail_bytes": 5}, {"since_us": 5}):
        find_start(folder, offset=0, **more)


async def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("x")
    (tmp_path / ("x" * 20)).write_text("x")
    assert segments(str(tmp_path)) == []
