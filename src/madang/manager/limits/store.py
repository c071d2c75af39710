"""All SQL of the limits slice. Versions are only ever added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Final

import sqlalchemy as sa

from madang.manager.db import Reader, Transaction
from madang.manager.db.events import add_event
from madang.manager.identity.tables import domains, memberships, projects, tokens, users
from madang.manager.limits.tables import limit_targets, limits, presets
from madang.manager.limits.types import AssignmentRow, LimitsRow, PresetRow

_B = sa.bindparam


def _text(name: str) -> sa.BindParameter[str]:
    return sa.bindparam(name, type_=sa.Text)


_COLUMNS: Final = [limits.c[field.name] for field in fields(LimitsRow)]
_newer = limits.alias()
_NEWEST: Final = (
    limits.c.version
    == sa.select(sa.func.max(_newer.c.version)).where(_newer.c.name == limits.c.name)
    .scalar_subquery()
)  # fmt: skip
_CURRENT: Final = (
    sa.select(*_COLUMNS)
    .where(limits.c.name == _B("b_name"))
    .order_by(limits.c.version.desc())
    .limit(1)
)
_PAGE: Final = (
    sa.select(*_COLUMNS)
    .where(
        _NEWEST,
        limits.c.removed == 0,
        sa.or_(_text("b_after").is_(None), limits.c.name > _text("b_after")),
    )
    .order_by(limits.c.name)
    .limit(_B("b_limit", type_=sa.Integer))
)
_HISTORY: Final = (
    sa.select(*_COLUMNS)
    .where(limits.c.name == _B("b_name"))
    .order_by(limits.c.version.desc())
    .limit(_B("b_limit", type_=sa.Integer))
)
_ADD: Final = sa.insert(limits)

_ASSIGNED: Final = (
    sa.select(limit_targets.c.target, limits.c.name, limits.c.version, limits.c.text)
    .join_from(limit_targets, limits, limit_targets.c.name == limits.c.name)
    .where(_NEWEST)
)
_TARGETS: Final = ("token", "user", "project", "domain")
_ASSIGNED_TO: Final = _ASSIGNED.where(
    sa.or_(
        *(limit_targets.c.target == _B(f"b_{kind}") for kind in _TARGETS),
        *(limit_targets.c.target == f"{kind}:*" for kind in _TARGETS),
    )
)
_TARGETS_OF: Final = (
    sa.select(limit_targets)
    .where(limit_targets.c.name == _B("b_name"))
    .order_by(limit_targets.c.target)
)
_ALL_TARGETS: Final = sa.select(limit_targets).order_by(limit_targets.c.target)
_TARGET: Final = sa.select(limit_targets).where(limit_targets.c.target == _B("b_target"))
_ASSIGN: Final = sa.insert(limit_targets)
_REASSIGN: Final = sa.update(limit_targets).where(limit_targets.c.target == _B("b_target"))
_UNASSIGN: Final = sa.delete(limit_targets).where(limit_targets.c.target == _B("b_target"))

_DOMAIN_OF: Final = sa.select(projects.c.domain_id).where(projects.c.id == _B("b_project"))
_DOMAINS: Final = {
    "token": sa.select(users.c.domain_id)
    .join_from(tokens, users, tokens.c.user_id == users.c.id)
    .where(tokens.c.id == _B("b_id")),
    "user": sa.select(users.c.domain_id).where(users.c.id == _B("b_id")),
    "project": sa.select(projects.c.domain_id).where(projects.c.id == _B("b_id")),
    "domain": sa.select(domains.c.id.label("domain_id")).where(domains.c.id == _B("b_id")),
}
_NAMES: Final = {
    "token": sa.select(tokens.c.name).where(tokens.c.id == _B("b_id")),
    "user": sa.select(users.c.name).where(users.c.id == _B("b_id")),
    "project": sa.select(projects.c.name).where(projects.c.id == _B("b_id")),
    "domain": sa.select(domains.c.name).where(domains.c.id == _B("b_id")),
}
_FIND: Final = {
    "token": sa.select(tokens.c.id)
    .join_from(tokens, users, tokens.c.user_id == users.c.id)
    .where(
        sa.or_(
            tokens.c.id == _text("b_ref"),
            sa.and_(users.c.name == _text("b_in"), tokens.c.name == _text("b_ref")),
        ),
        tokens.c.revoked_at.is_(None),
    )
    .limit(2),
    "user": sa.select(users.c.id).where(
        sa.or_(users.c.id == _text("b_ref"), users.c.name == _text("b_ref")),
        _text("b_in").is_(None),
    ),
    "project": sa.select(projects.c.id)
    .join_from(projects, domains, projects.c.domain_id == domains.c.id)
    .where(
        sa.or_(projects.c.id == _text("b_ref"), projects.c.name == _text("b_ref")),
        sa.or_(_text("b_in").is_(None), domains.c.name == _text("b_in")),
    )
    .limit(2),
    "domain": sa.select(domains.c.id).where(
        sa.or_(domains.c.id == _text("b_ref"), domains.c.name == _text("b_ref")),
        _text("b_in").is_(None),
    ),
}
"""By id or name; ``b_in``: the domain of a project, the user of a token."""
_OWN_ACCOUNTS: Final = sa.union_all(
    sa.select((sa.literal("project:") + memberships.c.project_id).label("account")).where(
        memberships.c.user_id == _text("b_user")
    ),
    sa.select((sa.literal("token:") + tokens.c.id).label("account")).where(
        tokens.c.user_id == _text("b_user")
    ),
)

_PRESETS: Final = sa.select(presets).order_by(presets.c.name)
_PRESET: Final = sa.select(presets).where(presets.c.name == _B("b_name"))
_ADD_PRESET: Final = sa.insert(presets)
_SET_PRESET: Final = sa.update(presets).where(presets.c.name == _B("b_name"))
_REMOVE_PRESET: Final = sa.delete(presets).where(presets.c.name == _B("b_name"))


def _row(record: Any) -> LimitsRow:
    return LimitsRow(**record._asdict())


# Texts


async def find(tx: Reader, name: str) -> LimitsRow | None:
    """The newest version, even where it says that there are none any more."""
    record = await tx.one(_CURRENT, b_name=name)
    return None if record is None else _row(record)


async def list_page(tx: Reader, *, after: str | None, limit: int) -> list[LimitsRow]:
    """Newest versions, by name, above the name *after*."""
    return [_row(record) for record in await tx.all(_PAGE, b_after=after, b_limit=limit)]


async def list_history(tx: Reader, name: str, limit: int) -> list[LimitsRow]:
    """Newest first."""
    return [_row(record) for record in await tx.all(_HISTORY, b_name=name, b_limit=limit)]


async def add(tx: Transaction, row: LimitsRow) -> None:
    """A new version. Its ``id`` is given by the database."""
    values = {f.name: getattr(row, f.name) for f in fields(row) if f.name != "id"}
    await tx.execute(_ADD, **values)
    payload = {"name": row.name, "version": row.version, "author": row.author}
    await add_event(
        tx,
        at=row.at,
        kind="limits.removed" if row.removed else "limits.applied",
        subject=row.name,
        owner_id=row.author_id,
        payload=payload,
    )


# Assignments


async def list_assigned(tx: Reader, accounts: Sequence[str] | None = None) -> list[Any]:
    """Target, name, version and text; of all, or of what can count for *accounts*.

    *accounts*: at most one of each kind.
    """
    if accounts is None:
        return await tx.all(_ASSIGNED)
    given = {f"b_{account.partition(':')[0]}": account for account in accounts}
    return await tx.all(_ASSIGNED_TO, **{f"b_{kind}": "" for kind in _TARGETS} | given)


async def list_targets(tx: Reader, name: str | None = None) -> list[AssignmentRow]:
    rows = await (tx.all(_ALL_TARGETS) if name is None else tx.all(_TARGETS_OF, b_name=name))
    return [AssignmentRow(**row._asdict()) for row in rows]


async def find_target(tx: Reader, target: str) -> AssignmentRow | None:
    row = await tx.one(_TARGET, b_target=target)
    return None if row is None else AssignmentRow(**row._asdict())


async def assign(
    tx: Transaction, target: str, name: str, *, author: str, author_id: str, at: int
) -> None:
    values = {"name": name, "author": author, "at": at}
    if await tx.execute(_REASSIGN, b_target=target, **values) == 0:
        await tx.execute(_ASSIGN, target=target, **values)
    await _tell_assigned(tx, target, name, author_id=author_id, at=at)


async def unassign(tx: Transaction, target: str, *, author_id: str, at: int) -> bool:
    if await tx.execute(_UNASSIGN, b_target=target) == 0:
        return False
    await _tell_assigned(tx, target, None, author_id=author_id, at=at)
    return True


async def _tell_assigned(
    tx: Transaction, target: str, name: str | None, *, author_id: str, at: int
) -> None:
    await add_event(
        tx,
        at=at,
        kind="limits.assigned",
        subject=target,
        owner_id=author_id,
        payload={"target": target, "name": name},
    )


# Accounts


async def find_domain(tx: Reader, project: str) -> str:
    """The domain of a project; empty if there is no such project."""
    row = await tx.one(_DOMAIN_OF, b_project=project)
    return "" if row is None else str(row.domain_id)


async def find_name(tx: Reader, account: str) -> str | None:
    kind, _, id_ = account.partition(":")
    row = await tx.one(_NAMES[kind], b_id=id_)
    return None if row is None else str(row.name)


async def find_domain_of(tx: Reader, account: str) -> str | None:
    """The domain whose administrators may know of the account."""
    kind, _, id_ = account.partition(":")
    row = await tx.one(_DOMAINS[kind], b_id=id_)
    return None if row is None else str(row.domain_id)


async def list_ids(tx: Reader, kind: str, ref: str, within: str | None) -> list[str]:
    """Ids of what is meant by *ref*, an id or a name; more than one: it is ambiguous."""
    return [row.id for row in await tx.all(_FIND[kind], b_ref=ref, b_in=within)]


async def list_own_accounts(tx: Reader, user: str) -> list[str]:
    """Projects and tokens of a user."""
    return [row.account for row in await tx.all(_OWN_ACCOUNTS, b_user=user)]


# Presets


async def list_presets(tx: Reader) -> list[PresetRow]:
    return [PresetRow(**row._asdict()) for row in await tx.all(_PRESETS)]


async def find_preset(tx: Reader, name: str) -> PresetRow | None:
    row = await tx.one(_PRESET, b_name=name)
    return None if row is None else PresetRow(**row._asdict())


async def put_preset(tx: Transaction, row: PresetRow, *, author_id: str) -> None:
    """A new one, or a newer version of it."""
    values = {f.name: getattr(row, f.name) for f in fields(row) if f.name != "name"}
    if await tx.execute(_SET_PRESET, b_name=row.name, **values) == 0:
        await tx.execute(_ADD_PRESET, name=row.name, **values)
    await _tell_preset(tx, row.name, "preset.set", author_id=author_id, at=row.at)


async def remove_preset(tx: Transaction, name: str, *, author_id: str, at: int) -> bool:
    if await tx.execute(_REMOVE_PRESET, b_name=name) == 0:
        return False
    await _tell_preset(tx, name, "preset.removed", author_id=author_id, at=at)
    return True


async def _tell_preset(tx: Transaction, name: str, kind: str, *, author_id: str, at: int) -> None:
    await add_event(tx, at=at, kind=kind, subject=name, owner_id=author_id, payload={"name": name})
