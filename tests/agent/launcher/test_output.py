"""Output on disk: what is kept is whole, new, and within the limit."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from madang.agent.launcher.checks import MIN_LOG_BYTES
from madang.agent.launcher.output import Log
from madang.wire.log import HEADER, MAX_DATA, unpack


def read(folder: Path) -> tuple[list[bytes], int, int]:
    """The kept chunks, the first offset, the end."""
    chunks: list[bytes] = []
    start = end = None
    for path in sorted(folder.iterdir()):
        assert end in {None, int(path.name)}, "a hole between segments"
        start = int(path.name) if start is None else start
        records, end = unpack(path.read_bytes(), int(path.name))
        assert end == int(path.name) + path.stat().st_size, "a torn record"
        chunks += [record.data for record in records]
    return chunks, start or 0, end or 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, MAX_DATA), max_size=60),
    st.sampled_from([MIN_LOG_BYTES, 3 * MIN_LOG_BYTES, 10**6, 2**40]),
)
def test_the_newest_output_is_kept_whole_within_the_limit(sizes: list[int], limit: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "log")
        log = Log(str(folder), limit)
        written = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
        for chunk in written:
            log.append(1, chunk)
            kept_bytes = sum(path.stat().st_size for path in folder.iterdir())
            assert kept_bytes <= max(limit, HEADER.size + MAX_DATA)
        log.close()
        kept, start, end = read(folder)
        assert end == log.end == sum(HEADER.size + size for size in sizes)
        assert kept == written[len(written) - len(kept) :]
        if sum(HEADER.size + size for size in sizes) <= limit // 2:
            assert start == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a small file system")
def test_a_full_disk_drops_output_and_leaves_whole_records(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    assert os.system(f"mount -t tmpfs -o size=200k none {folder}") == 0
    try:
        log = Log(str(folder), 10**7)
        for number in range(100):
            log.append(1, bytes([number]) * 5000)
        filled = log.end
        assert log.dropped_bytes > 0
        assert log.dropped_bytes % 5000 == 0
        (oldest,) = sorted(folder.iterdir())
        os.truncate(oldest, 0)  # Room again.
        os.truncate(oldest, filled)
        log.append(1, b"room")
        log.close()
    finally:
        os.system(f"umount {folder}")
    assert log.end == filled + HEADER.size + 4
