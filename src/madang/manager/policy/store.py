"""All SQL of the policy slice. Rows are only ever added."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

import sqlalchemy as sa

from madang.manager.db import Reader, Transaction
from madang.manager.db.events import add_event
from madang.manager.policy.tables import policies
from madang.manager.policy.types import PolicyRow

_COLUMNS: Final = [policies.c[field.name] for field in fields(PolicyRow)]
_newer = policies.alias()
_IN_FORCE: Final = sa.select(*_COLUMNS).where(
    policies.c.version
    == sa.select(sa.func.max(_newer.c.version))
    .where(_newer.c.target == policies.c.target)
    .scalar_subquery()
)
_CURRENT: Final = (
    sa.select(*_COLUMNS)
    .where(policies.c.target == sa.bindparam("b_target"))
    .order_by(policies.c.version.desc())
    .limit(1)
)
_ALL: Final = _IN_FORCE.order_by(policies.c.target)
_HISTORY: Final = (
    sa.select(*_COLUMNS)
    .where(policies.c.target == sa.bindparam("b_target"))
    .order_by(policies.c.version.desc())
    .limit(sa.bindparam("b_limit", type_=sa.Integer))
)
_TWO: Final = _IN_FORCE.where(
    sa.or_(policies.c.target == sa.bindparam("b_one"), policies.c.target == sa.bindparam("b_two"))
).order_by(policies.c.id)
_ADD: Final = sa.insert(policies)


def _row(record: Any) -> PolicyRow:
    return PolicyRow(**record._asdict())


async def find(tx: Reader, target: str) -> PolicyRow | None:
    """What is in force for *target*."""
    record = await tx.one(_CURRENT, b_target=target)
    return None if record is None else _row(record)


async def list_in_force(tx: Reader) -> list[PolicyRow]:
    return [_row(record) for record in await tx.all(_ALL)]


async def find_two(tx: Reader, one: str, two: str) -> dict[str, PolicyRow]:
    """What is in force for two targets, by target."""
    rows = [_row(record) for record in await tx.all(_TWO, b_one=one, b_two=two)]
    return {row.target: row for row in rows}


async def list_history(tx: Reader, target: str, limit: int) -> list[PolicyRow]:
    """Newest first."""
    return [_row(record) for record in await tx.all(_HISTORY, b_target=target, b_limit=limit)]


async def add(tx: Transaction, row: PolicyRow) -> None:
    """A new version. Its ``id`` is given by the database."""
    values = {f.name: getattr(row, f.name) for f in fields(row) if f.name != "id"}
    await tx.execute(_ADD, **values)
    payload = {
        "target": row.target,
        "version": row.version,
        "digest": row.digest,
        "author": row.author,
    }
    await add_event(
        tx,
        at=row.at,
        kind="policy.applied",
        subject=row.target,
        owner_id=row.author_id,
        payload=payload,
    )
