"""No change to an export goes unnoticed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.wire.audit import (
    CUT,
    GENESIS,
    AuditHead,
    AuditRecord,
    canonical,
    digest_of,
    export_lines,
    first_line,
    last_line,
    parse_head,
    record_line,
    verify,
)

EMPTY = AuditRecord(
    seq=1, at_us=5, actor_id="u", actor="ann", key="k", domain="d", action="session.created",
    kind="session", id="s", name="calm-otter", before=None, after=None, source="", request_id="",
    previous=GENESIS, digest="",
)  # fmt: skip

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner,
                                                                max_size=2),
    max_leaves=4,
)  # fmt: skip
drafts = st.builds(
    replace,
    st.just(EMPTY),
    at_us=st.integers(0, 2**53),
    actor=st.text(max_size=5),
    name=st.text(max_size=5),
    after=st.none() | st.dictionaries(st.text(max_size=3), values, max_size=3),
)


def chained(found: list[AuditRecord], start: int = 0, previous: str = GENESIS) -> list[AuditRecord]:
    records = []
    for seq, draft in enumerate(found, start + 1):
        fields = asdict(replace(draft, seq=seq, previous=previous))
        del fields["digest"]
        previous = digest_of(fields)
        records.append(AuditRecord(**fields, digest=previous))
    return records


def export(records: list[AuditRecord]) -> list[bytes]:
    head = AuditHead(count=len(records), digest=records[-1].digest if records else GENESIS)
    return list(export_lines(head, records))


@given(st.lists(drafts, max_size=5))
def test_what_was_written_verifies(found: list[AuditRecord]) -> None:
    records = chained(found)
    lines = export(records)
    heads = [(record.seq, record.digest) for record in records]

    verdict = verify(lines, heads)

    assert (verdict.problem, verdict.records) == ("", len(records))


@st.composite
def tampered(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """An export, and the same after somebody changed it."""
    lines = export(chained(draw(st.lists(drafts, min_size=1, max_size=5))))
    changed = list(lines)
    at = draw(st.integers(0, len(lines) - 1))
    other = draw(st.integers(0, len(lines) - 1))
    match draw(st.sampled_from(("change", "remove", "insert", "swap", "cut", "byte", "respell"))):
        case "change":
            fields: dict[str, Any] = json.loads(changed[at])
            name = draw(st.sampled_from(sorted(fields)))
            fields[name] = draw(values)
            changed[at] = canonical(fields) + b"\n"
        case "remove":
            del changed[at]
        case "insert":
            changed.insert(at, changed[other])
        case "swap":
            changed[at], changed[other] = changed[other], changed[at]
        case "cut":
            del changed[at:]
        case "byte":
            line = bytearray(changed[at])
            line[draw(st.integers(0, len(line) - 1))] ^= 1 << draw(st.integers(0, 7))
            changed[at] = bytes(line)
        case "respell":
            changed[at] = json.dumps(json.loads(changed[at])).encode() + b"\n"
    return lines, changed


@given(tampered())
def test_whatever_was_changed_is_found(pair: tuple[list[bytes], list[bytes]]) -> None:
    lines, changed = pair
    verdict = verify(changed)
    assert bool(verdict.problem) is (changed != lines)


@given(st.lists(drafts, min_size=2, max_size=5), st.data())
def test_a_chain_made_anew_is_found_by_a_head_that_was_kept(
    found: list[AuditRecord], data: st.DataObject
) -> None:
    """Whoever can write to the database can compute digests, too."""
    records = chained(found)
    kept = [(record.seq, record.digest) for record in records[-1:]]
    at = data.draw(st.integers(0, len(found) - 1))
    forged = list(found)
    if data.draw(st.booleans()):
        del forged[at]
    else:
        forged[at] = replace(found[at], actor=found[at].actor + "x")
    lines = export(chained(forged))

    assert verify(lines).problem == ""
    assert verify(lines, kept).problem


@pytest.mark.parametrize(
    ("at", "old", "new"),
    [(0, b'"audit":1', b'"audit":true'), (2, b'"count":1', b'"count":1.0'),
     (2, b'"count":1', b'"also":2,"count":1'), (0, b'"cut":0', b'"cut":0.0')],
)  # fmt: skip
def test_what_only_looks_the_same_is_found(at: int, old: bytes, new: bytes) -> None:
    lines = export(chained([EMPTY]))
    assert old in lines[at]
    lines[at] = lines[at].replace(old, new)
    assert verify(lines).problem


def test_a_key_that_stands_twice_is_no_record() -> None:
    """One reader would see the first, another the last."""
    lines = export(chained([EMPTY]))
    assert lines[1].startswith(b'{"action":"session.created"')
    lines[1] = lines[1].replace(b"{", b'{"action":"session.removed",', 1)
    assert "canonical" in verify(lines).problem


def cut_log() -> tuple[AuditHead, list[AuditRecord]]:
    old = chained([EMPTY, EMPTY, EMPTY])
    removed = {"count": 2, "digest": old[1].digest}
    notice = replace(EMPTY, action=CUT, kind="audit", after=removed)
    records = chained([EMPTY, notice], 2, old[1].digest)
    head = AuditHead(count=4, digest=records[-1].digest, cut=2, cut_digest=old[1].digest)
    return head, records


def test_a_cut_that_a_record_tells_of_is_good() -> None:
    head, records = cut_log()
    verdict = verify(export_lines(head, records), [(2, head.cut_digest), (4, head.digest)])
    assert (verdict.problem, verdict.records, verdict.count) == ("", 2, 4)


@pytest.mark.parametrize(
    ("heads", "problem"),
    [
        ([(1, "a" * 64)], "head 1 can't be checked any more"),
        ([(2, "a" * 64)], "record 2 has another digest"),
        ([(5, "a" * 64)], "head 5 was kept, but the log ends with record 4"),
    ],
)
def test_heads_and_a_cut(heads: list[tuple[int, str]], problem: str) -> None:
    head, records = cut_log()
    assert problem in verify(export_lines(head, records), heads).problem


def test_two_heads_for_one_place_can_t_both_be_right() -> None:
    records = chained([EMPTY])
    heads = [(1, records[0].digest), (1, "a" * 64)]
    assert verify(export(records), heads).problem
    assert verify(export(records), heads[::-1]).problem


def test_a_cut_to_another_place_than_was_told_is_found() -> None:
    head, records = cut_log()
    lines = [
        first_line(replace(head, cut=3, cut_digest=records[0].digest)),
        record_line(records[1]),
        last_line(head),
    ]
    assert "no record tells of it" in verify(lines).problem


@pytest.mark.parametrize("lines", [[], [b""], [b"[]\n"], [b"\xff\n"], [b"[" * 99999], [b"1\n"]])
def test_garbage_is_no_log(lines: list[bytes]) -> None:
    assert verify(lines).problem


@pytest.mark.parametrize("text", ["", "7", "7:", ":abc", f"x:{'a' * 64}", f"7:{'A' * 64}"])
def test_what_is_no_head_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no head"):
        parse_head(text)
