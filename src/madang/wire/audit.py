"""Audit records: one line each, chained by hash, and how anybody checks the chain.

A record's digest is SHA-256 over its canonical form without ``digest``; that form has the digest of
the record before it (``previous``). An export is: a line that says where it begins, the records in
order, a line with the head. Canonical: JSON with sorted keys, no blanks, ASCII only. A line that is
not exactly canonical counts as tampered with, so that no two readers understand it differently.

The standard library is enough to verify an export, so an auditor needs nothing of ours that runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

FORMAT: Final = 1
GENESIS: Final = "0" * 64
"""What the first record of all has as ``previous``."""
CUT: Final = "audit.cut"
"""Action of the record that tells that old records were removed; ``after`` has what was removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """Who did what to which object, from where."""

    seq: int
    """1, 2, 3, … without a gap."""
    at_us: int
    """Microseconds since 1970."""
    actor_id: str
    """A user's id; empty: Madang itself, or nobody who is known."""
    actor: str
    key: str
    """Name of the token that was used."""
    domain: str
    """Id of the domain that it concerns."""
    action: str
    """``session.created``, ``policy.applied``, …"""
    kind: str
    """Of the object: ``session``, ``policy``, …"""
    id: str
    name: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    source: str
    """Network address of the caller; empty: it came from inside."""
    request_id: str
    previous: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditPage:
    """Newest first."""

    items: tuple[AuditRecord, ...]
    next: int | None = None
    """``cursor`` of the next page; None: that was all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditHead:
    """How long the log is, and the digest of its last record. Keep it elsewhere."""

    count: int
    digest: str
    cut: int = 0
    """Records 1 to ``cut`` were removed by retention."""
    cut_digest: str = GENESIS

    def __str__(self) -> str:
        return f"{self.count}:{self.digest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditVerdict:
    """What ``verify`` found."""

    records: int
    """How many were read and found good."""
    count: int
    """``seq`` of the last good one."""
    digest: str
    problem: str = ""
    """Empty: nothing was changed, removed, put in or moved."""


_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_NAMES: Final = frozenset(each.name for each in fields(AuditRecord))


def canonical(value: Mapping[str, Any]) -> bytes:
    """See the module. Raises ValueError for what JSON has no word for."""
    return _ENCODER.encode(value).encode("ascii")


def digest_of(values: Mapping[str, Any]) -> str:
    """*values*: all of a record but its digest."""
    return hashlib.sha256(canonical(values)).hexdigest()


def export_lines(head: AuditHead, records: Iterable[AuditRecord]) -> Iterator[bytes]:
    """The whole export; *records* from ``head.cut + 1`` to ``head.count``."""
    yield first_line(head)
    for record in records:
        yield record_line(record)
    yield last_line(head)


def first_line(head: AuditHead) -> bytes:
    return canonical({"audit": FORMAT, "cut": head.cut, "digest": head.cut_digest}) + b"\n"


def record_line(record: AuditRecord) -> bytes:
    return canonical(asdict(record)) + b"\n"


def last_line(head: AuditHead) -> bytes:
    return canonical({"count": head.count, "head": head.digest}) + b"\n"


def parse_head(text: str) -> tuple[int, str]:
    """``COUNT:DIGEST``, as ``madang audit head`` prints it. Raises ValueError."""
    count, _, digest = text.strip().partition(":")
    if (
        not (count.isascii() and count.isdecimal())
        or len(digest) != 64
        or set(digest) - set("0123456789abcdef")
    ):
        raise ValueError(f"{text[:100]!r} is no head: COUNT:DIGEST, as `madang audit head` prints.")
    return int(count), digest


def verify(lines: Iterable[bytes], heads: Sequence[tuple[int, str]] = ()) -> AuditVerdict:
    """Read an export to its end, or to the first thing that is wrong.

    *heads*: counts and digests that were kept elsewhere; the log must still contain each.
    """
    chain = _Chain(heads)
    try:
        for line in lines:
            chain.take(line)
        chain.finish()
    except _Broken as exc:
        return AuditVerdict(
            records=chain.records, count=chain.count, digest=chain.digest, problem=str(exc)
        )
    return AuditVerdict(records=chain.records, count=chain.count, digest=chain.digest)


class _Broken(Exception):
    """The chain does not hold; says where."""


class _Chain:
    """Takes one line after the other."""

    def __init__(self, heads: Sequence[tuple[int, str]]) -> None:
        self._heads = dict(heads)
        self._wrong = [count for count, digest in heads if self._heads[count] != digest]
        self._cut: tuple[int, str] | None = None
        self._attested = False
        self._ended = False
        self.records = 0
        self.count = 0
        self.digest = GENESIS

    def take(self, line: bytes) -> None:
        if self._ended:
            raise _Broken("there is more after the line with the head.")
        found = self._parse(line)
        if self._cut is None:
            self._begin(found)
        elif "head" in found:
            self._end(found)
        else:
            self._follow(found)

    def finish(self) -> None:
        if not self._ended:
            raise _Broken(f"the export ends after record {self.count} without the head: cut short.")

    def _parse(self, line: bytes) -> dict[str, Any]:
        where = f"the line after record {self.count}"
        try:
            found = json.loads(line)
            same = isinstance(found, dict) and canonical(found) + b"\n" == line
        except (ValueError, RecursionError) as exc:
            raise _Broken(f"{where} can't be read: it is not as it was written.") from exc
        if not same:
            raise _Broken(f"{where} is not in canonical form: it is not as it was written.")
        return dict(found)

    def _begin(self, found: dict[str, Any]) -> None:
        if found.keys() != {"audit", "cut", "digest"} or not _same(found["audit"], FORMAT):
            raise _Broken(f"it does not begin as an audit export of format {FORMAT}.")
        count, digest = found["cut"], found["digest"]
        if type(count) is not int or count < 0 or not isinstance(digest, str):
            raise _Broken("its first line does not say where it begins.")
        if count == 0 and digest != GENESIS:
            raise _Broken("its first line is not that of a log from its beginning.")
        self._cut = (count, digest)
        self._attested = count == 0
        self.count, self.digest = count, digest
        if older := [kept for kept in self._heads if kept < count]:
            text = f"records up to {count} were removed by retention"
            raise _Broken(f"head {min(older)} can't be checked any more: {text}.")
        self._compare()

    def _follow(self, found: dict[str, Any]) -> None:
        seq = found.get("seq")
        if found.keys() != _NAMES or type(seq) is not int:
            raise _Broken(f"what follows record {self.count} is no audit record.")
        if seq != self.count + 1:
            raise _Broken(f"record {self.count + 1} is missing: {seq} follows {self.count}.")
        if found["previous"] != self.digest:
            raise _Broken(f"record {seq} does not continue record {self.count}.")
        digest = found.pop("digest")
        if digest != digest_of(found):
            raise _Broken(f"record {seq} was changed: its digest does not fit.")
        if found["action"] == CUT and self._cut is not None:
            removed = {"count": self._cut[0], "digest": self._cut[1]}
            self._attested = self._attested or found["after"] == removed
        self.count, self.digest = seq, digest
        self.records += 1
        self._compare()

    def _end(self, found: dict[str, Any]) -> None:
        if found.keys() != {"count", "head"}:
            raise _Broken("its last line is not the one with the head alone.")
        if not (_same(found["count"], self.count) and _same(found["head"], self.digest)):
            text = f"the head is record {found['count']}, but the log ends with {self.count}"
            raise _Broken(f"{text}: records at the end were removed or put in.")
        if not self._attested and self._cut is not None:
            raise _Broken(f"records up to {self._cut[0]} are gone, and no record tells of it.")
        if later := [kept for kept in self._heads if kept > self.count]:
            text = f"head {max(later)} was kept, but the log ends with record {self.count}"
            raise _Broken(f"{text}: records at the end were removed.")
        self._ended = True

    def _compare(self) -> None:
        kept = self._heads.get(self.count)
        if (kept is not None and kept != self.digest) or self.count in self._wrong:
            text = f"record {self.count} has another digest than the head that was kept"
            raise _Broken(f"{text}: the log was written anew from there or from before.")


def _same(one: object, other: object) -> bool:
    """Of the same type, too: true is not 1, and 1.0 neither."""
    return type(one) is type(other) and one == other
