"""All SQL of the audit slice. Records are only added; retention removes the oldest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import sqlalchemy as sa

from madang.manager.audit.tables import audit, audit_head
from madang.manager.db import Reader, Transaction
from madang.wire.audit import AuditHead, AuditRecord, canonical

PAGE: Final = 500


def _text(name: str) -> sa.BindParameter[str]:
    return sa.bindparam(name, type_=sa.Text)


def _number(name: str) -> sa.BindParameter[int]:
    return sa.bindparam(name, type_=sa.BigInteger)


def _unless_given(name: str, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    return sa.or_(_text(name).is_(None), condition)


_COLUMN: Final = {"at_us": "at", "id": "object_id", "name": "object"}
"""Field of a record → column, where they differ."""
_HEAD: Final = sa.select(audit_head).where(audit_head.c.id == 1)
_ADVANCE: Final = sa.update(audit_head).where(
    audit_head.c.id == 1,
    audit_head.c.count == _number("b_count"),
    audit_head.c.digest == _text("b_digest"),
)
_CUT: Final = sa.update(audit_head).where(audit_head.c.id == 1)
_ADD: Final = sa.insert(audit)
_FROM: Final = (
    sa.select(audit)
    .where(audit.c.seq > _number("b_after"), audit.c.seq <= _number("b_upto"))
    .order_by(audit.c.seq)
    .limit(PAGE)
)
_LIST: Final = (
    sa.select(audit)
    .where(
        _unless_given("b_domain", audit.c.domain == _text("b_domain")),
        _unless_given("b_actor", audit.c.actor == _text("b_actor")),
        _unless_given(
            "b_action",
            sa.or_(audit.c.action == _text("b_action"), audit.c.action.like(_text("b_below"))),
        ),
        _unless_given(
            "b_object",
            sa.or_(audit.c.object_id == _text("b_object"), audit.c.object == _text("b_object")),
        ),
        _unless_given("b_kind", audit.c.kind == _text("b_kind")),
        audit.c.at >= _number("b_since"),
        audit.c.at < _number("b_until"),
        audit.c.seq < _number("b_before"),
    )
    .order_by(audit.c.seq.desc())
    .limit(_number("b_limit"))
)
_LAST_BEFORE: Final = (
    sa.select(audit.c.seq, audit.c.digest)
    .where(audit.c.at < _number("b_before"))
    .order_by(audit.c.seq.desc())
    .limit(1)
)
_NOT_OLD: Final = (
    sa.select(audit.c.seq).where(audit.c.at >= _number("b_before")).order_by(audit.c.seq).limit(1)
)
_DIGEST: Final = sa.select(audit.c.digest).where(audit.c.seq == _number("b_seq"))
_REMOVE: Final = sa.delete(audit).where(audit.c.seq <= _number("b_upto"))


async def read_head(tx: Reader) -> AuditHead:
    row = await tx.one(_HEAD)
    assert row is not None, "the migration made it"
    return AuditHead(count=row.count, digest=row.digest, cut=row.cut, cut_digest=row.cut_digest)


async def advance(tx: Transaction, values: Mapping[str, Any], digest: str) -> bool:
    """Make the record of these *values* the head, if it continues the one that there is."""
    where = {"b_count": values["seq"] - 1, "b_digest": values["previous"]}
    return await tx.execute(_ADVANCE, **where, count=values["seq"], digest=digest) == 1


async def add(tx: Transaction, values: Mapping[str, Any], digest: str) -> None:
    """*values*: of an ``AuditRecord``, but for the digest."""
    columns = {_COLUMN.get(name, name): value for name, value in values.items()}
    for name in ("before", "after"):
        if columns[name] is not None:
            columns[name] = canonical(columns[name]).decode()
    await tx.execute(_ADD, **columns, digest=digest)


async def list_from(tx: Reader, *, after: int, upto: int) -> list[AuditRecord]:
    """The next ``PAGE`` at most, oldest first."""
    return [_record(row) for row in await tx.all(_FROM, b_after=after, b_upto=upto)]


async def list_newest(
    tx: Reader,
    *,
    domain: str | None,
    actor: str | None,
    action: str | None,
    kind: str | None,
    subject: str | None,
    since: int,
    until: int,
    before: int,
    limit: int,
) -> list[AuditRecord]:
    """Newest first, below the number *before*; *action* also names all that begin with it."""
    rows = await tx.all(
        _LIST,
        b_domain=domain,
        b_actor=actor,
        b_action=action,
        b_below=None if action is None else f"{action}.%",
        b_kind=kind,
        b_object=subject,
        b_since=since,
        b_until=until,
        b_before=before,
        b_limit=limit,
    )
    return [_record(row) for row in rows]


async def last_old(tx: Reader, before: int) -> tuple[int, str] | None:
    """Number and digest of the last of those oldest records that were all written before then."""
    first = await tx.one(_NOT_OLD, b_before=before)
    if first is None:
        row = await tx.one(_LAST_BEFORE, b_before=before)
        return None if row is None else (row.seq, row.digest)
    row = await tx.one(_DIGEST, b_seq=first.seq - 1)
    return None if row is None else (first.seq - 1, row.digest)


async def cut(tx: Transaction, upto: int, digest: str) -> int:
    """Remove records up to that one; how many."""
    await tx.execute(_CUT, cut=upto, cut_digest=digest)
    return await tx.execute(_REMOVE, b_upto=upto)


def _record(row: Any) -> AuditRecord:
    return AuditRecord(
        seq=row.seq,
        at_us=row.at,
        actor_id=row.actor_id,
        actor=row.actor,
        key=row.key,
        domain=row.domain,
        action=row.action,
        kind=row.kind,
        id=row.object_id,
        name=row.object,
        before=None if row.before is None else json.loads(row.before),
        after=None if row.after is None else json.loads(row.after),
        source=row.source,
        request_id=row.request_id,
        previous=row.previous,
        digest=row.digest,
    )
