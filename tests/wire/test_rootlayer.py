"""What a file of a whole root is, from what lies on a node's disk."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from madang.wire.rootlayer import MAX_ID, Meta, meta_of

IDS = st.integers(0, MAX_ID)


@given(st.builds(Meta, st.integers(0, 0o7777), IDS, IDS), st.booleans())
def test_what_was_kept_comes_back(meta: Meta, folder: bool) -> None:
    assert meta_of(meta.on_disk(folder), meta.record(), folder=folder) == meta


@given(st.builds(Meta, st.integers(0, 0o7777), IDS, IDS), st.integers(0, 0o777), st.booleans())
def test_whoever_changes_the_mode_has_the_last_word(meta: Meta, mode: int, folder: bool) -> None:
    if mode != meta.on_disk(folder):
        assert meta_of(mode, meta.record(), folder=folder) == Meta(mode)


@given(st.binary(max_size=40))
def test_a_record_is_a_mode_and_an_owner_or_nothing(record: bytes) -> None:
    meta = meta_of(0o644, record, folder=False)
    assert 0 <= meta.mode <= 0o7777
    assert 0 <= min(meta.uid, meta.gid) <= max(meta.uid, meta.gid) <= MAX_ID
    assert meta == Meta(0o644) or record == meta.record() or record.startswith(b"0")
