"""All SQL of the policy slice. Versions are only ever added, counts only grow."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

import sqlalchemy as sa

from madang.manager.db import Reader, Transaction
from madang.manager.db.events import add_event
from madang.manager.fleet.tables import groups, nodes
from madang.manager.identity.tables import domains, memberships, projects, users
from madang.manager.identity.types import ProjectRole
from madang.manager.policy.tables import policies, policy_counts
from madang.manager.policy.types import SESSION_PREFIX, CountRow, PolicyRow, ProjectRow

_COLUMNS: Final = [policies.c[field.name] for field in fields(PolicyRow)]
_newer = policies.alias()
_former = policies.alias()
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
_OF_SESSIONS: Final = policies.c.target.like(f"{SESSION_PREFIX}%")
_ALL: Final = _IN_FORCE.where(sa.not_(_OF_SESSIONS)).order_by(policies.c.target)
_HISTORY: Final = (
    sa.select(*_COLUMNS)
    .where(policies.c.target == sa.bindparam("b_target"))
    .order_by(policies.c.version.desc())
    .limit(sa.bindparam("b_limit", type_=sa.Integer))
)
_PROJECTS: Final = sa.select(
    projects.c.id,
    projects.c.name,
    projects.c.domain_id,
    domains.c.name.label("domain"),
    memberships.c.role,
).select_from(
    projects.join(domains, domains.c.id == projects.c.domain_id).outerjoin(
        memberships,
        sa.and_(
            memberships.c.project_id == projects.c.id,
            memberships.c.user_id == sa.bindparam("b_user"),
        ),
    )
)
_PROJECT: Final = _PROJECTS.where(
    projects.c.name == sa.bindparam("b_name"),
    sa.or_(
        domains.c.id == sa.bindparam("b_domain_id", type_=sa.Text),
        domains.c.name == sa.bindparam("b_domain", type_=sa.Text),
    ),
)
_PROJECT_BY_ID: Final = _PROJECTS.where(projects.c.id == sa.bindparam("b_id"))
_ADMINS: Final = (
    sa.select(users.c.name)
    .join_from(memberships, users, memberships.c.user_id == users.c.id)
    .where(
        memberships.c.project_id == sa.bindparam("b_id"),
        memberships.c.role == str(ProjectRole.ADMIN),
        users.c.disabled_at.is_(None),
    )
    .order_by(memberships.c.created_at, users.c.name)
    .limit(3)
)
_GROUP_TEXT: Final = sa.select(groups.c.text).where(groups.c.name == sa.bindparam("b_name"))
_GROUP: Final = sa.union_all(
    sa.select(groups.c.name).where(groups.c.name == sa.bindparam("b_name")),
    sa.select(nodes.c.group_name).where(nodes.c.group_name == sa.bindparam("b_name")),
)
_LOG: Final = (
    sa.select(*_COLUMNS, _former.c.text.label("former"))
    .select_from(
        policies.outerjoin(
            _former,
            sa.and_(
                _former.c.target == policies.c.target,
                _former.c.version == policies.c.version - 1,
            ),
        )
    )
    .where(
        sa.or_(
            sa.bindparam("b_target", type_=sa.Text).is_(None),
            policies.c.target == sa.bindparam("b_target", type_=sa.Text),
        )
    )
    .order_by(policies.c.id.desc())
    .limit(sa.bindparam("b_limit", type_=sa.Integer))
)
_ADD: Final = sa.insert(policies)
_OF_RULE: Final = (
    policy_counts.c.target == sa.bindparam("b_target"),
    policy_counts.c.version == sa.bindparam("b_version"),
    policy_counts.c.line == sa.bindparam("b_line"),
)
_COUNT: Final = (
    sa.update(policy_counts)
    .where(*_OF_RULE)
    .values(refused=policy_counts.c.refused + sa.bindparam("b_more", type_=sa.BigInteger))
)
_BEGIN_COUNT: Final = sa.insert(policy_counts)
_COUNTS: Final = (
    sa.select(
        policy_counts.c.target,
        policy_counts.c.version,
        policy_counts.c.line,
        policy_counts.c.refused,
    )
    .where(
        policy_counts.c.version
        == sa.select(sa.func.max(_newer.c.version))
        .where(_newer.c.target == policy_counts.c.target)
        .scalar_subquery()
    )
    .order_by(policy_counts.c.target, policy_counts.c.line)
)


def _row(record: Any) -> PolicyRow:
    return PolicyRow(**record._asdict())


async def find(tx: Reader, target: str) -> PolicyRow | None:
    """What is in force for *target*."""
    record = await tx.one(_CURRENT, b_target=target)
    return None if record is None else _row(record)


async def list_in_force(tx: Reader) -> list[PolicyRow]:
    return [_row(record) for record in await tx.all(_ALL)]


async def list_projects(tx: Reader, user: str) -> list[ProjectRow]:
    """All of them, with what *user*, an id, is there."""
    return [ProjectRow(**record._asdict()) for record in await tx.all(_PROJECTS, b_user=user)]


async def find_project(
    tx: Reader, user: str, name: str, *, domain_id: str | None = None, domain: str | None = None
) -> ProjectRow | None:
    """In the domain of that id, or of that name."""
    found = await tx.one(_PROJECT, b_user=user, b_name=name, b_domain_id=domain_id, b_domain=domain)
    return None if found is None else ProjectRow(**found._asdict())


async def find_project_by_id(tx: Reader, project: str) -> ProjectRow | None:
    found = await tx.one(_PROJECT_BY_ID, b_user="", b_id=project)
    return None if found is None else ProjectRow(**found._asdict())


async def list_project_admins(tx: Reader, project: str) -> list[str]:
    """Names of some."""
    return [record.name for record in await tx.all(_ADMINS, b_id=project)]


async def find_group_text(tx: Reader, name: str) -> str:
    """Its settings; a group that nobody has set up has none."""
    found = await tx.one(_GROUP_TEXT, b_name=name)
    return "" if found is None else str(found.text)


async def has_group(tx: Reader, name: str) -> bool:
    return bool(await tx.all(_GROUP, b_name=name))


async def list_history(tx: Reader, target: str, limit: int) -> list[PolicyRow]:
    """Newest first."""
    return [_row(record) for record in await tx.all(_HISTORY, b_target=target, b_limit=limit)]


async def list_log(tx: Reader, target: str | None, limit: int) -> list[tuple[PolicyRow, str]]:
    """Versions of *target*, or of all, newest first, each with the text before it."""
    found = []
    for record in await tx.all(_LOG, b_target=target, b_limit=limit):
        values = record._asdict()
        found.append((values.pop("former") or "", PolicyRow(**values)))
    return [(row, former) for former, row in found]


async def list_counts(tx: Reader) -> list[CountRow]:
    """Of the versions in force."""
    return [CountRow(**record._asdict()) for record in await tx.all(_COUNTS)]


async def count(tx: Transaction, target: str, version: int, line: int, more: int) -> None:
    """A rule has refused *more* things."""
    where = {"b_target": target, "b_version": version, "b_line": line}
    if await tx.execute(_COUNT, **where, b_more=more) == 0:
        await tx.execute(_BEGIN_COUNT, target=target, version=version, line=line, refused=more)


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
