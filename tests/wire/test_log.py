from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.wire.log import HEADER, MAX_DATA, LogRecord, Stream, pack, unpack

chunks = st.lists(
    st.tuples(st.sampled_from([Stream.STDOUT, Stream.STDERR]), st.binary(max_size=300)), max_size=20
)


def written(parts: list[tuple[Stream, bytes]]) -> bytes:
    return b"".join(pack(stream, at, data) for at, (stream, data) in enumerate(parts))


@given(chunks, st.integers(min_value=0, max_value=1 << 50))
def test_what_is_packed_is_unpacked_byte_for_byte(
    parts: list[tuple[Stream, bytes]], offset: int
) -> None:
    records, end = unpack(written(parts), offset)
    assert [(r.stream, r.data) for r in records] == parts
    assert end == offset + len(written(parts))


@given(chunks, st.data())
def test_a_cut_record_waits_for_the_rest(
    parts: list[tuple[Stream, bytes]], data: st.DataObject
) -> None:
    whole = written(parts)
    cut = data.draw(st.integers(min_value=0, max_value=len(whole)))
    first, middle = unpack(whole[:cut], 0)
    rest, end = unpack(whole[middle:], middle)
    assert [r.data for r in first + rest] == [data for _, data in parts]
    assert end == len(whole)


def test_each_record_knows_where_the_next_begins() -> None:
    records, _ = unpack(written([(Stream.STDOUT, b"ab"), (Stream.STDERR, b"c")]), 100)
    assert records[0].end == records[1].offset == 100 + HEADER.size + 2
    assert records[1] == LogRecord(records[0].end, 1, Stream.STDERR, b"c")


@given(st.binary(min_size=16, max_size=64).filter(lambda b: b[0] != 0xA7))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(ValueError, match="no log record"):
        unpack(garbage, 0)


def test_an_endless_record_is_refused() -> None:
    with pytest.raises(ValueError, match="no log record"):
        unpack(HEADER.pack(0xA7, 1, MAX_DATA + 1, 0), 0)
