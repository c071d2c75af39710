"""Domains, projects, memberships and users."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa

from madang.manager.db import Reader, Transaction, one_of
from madang.manager.identity.store.sight import Viewer, viewer
from madang.manager.identity.tables import domains, memberships, projects, users
from madang.manager.identity.types import ProjectRole, Role

_B = sa.bindparam


def _text(name: str) -> sa.BindParameter[str]:
    return sa.bindparam(name, type_=sa.Text)


_LIMIT: Final = sa.bindparam("b_limit", type_=sa.Integer)
_ALL: Final = sa.bindparam("b_sees_all", type_=sa.Integer) == 1
_CALLER: Final = _text("b_viewer")
_MINE: Final = sa.select(memberships.c.project_id).where(memberships.c.user_id == _CALLER)
_MY_DOMAIN: Final = sa.select(users.c.domain_id).where(users.c.id == _CALLER).scalar_subquery()
_ADMINISTERED_DOMAIN: Final = (
    sa.select(users.c.domain_id)
    .where(users.c.id == _CALLER, users.c.role == str(Role.DOMAIN_ADMIN))
    .scalar_subquery()
)

_DOMAIN: Final = sa.select(domains).where(domains.c.name == _B("b_name"))
_DOMAIN_BY_ID: Final = sa.select(domains).where(domains.c.id == _B("b_id"))
_DOMAINS: Final = (
    sa.select(domains)
    .where(
        sa.or_(_ALL, domains.c.id == _MY_DOMAIN),
        sa.or_(_text("b_after").is_(None), domains.c.name > _text("b_after")),
    )
    .order_by(domains.c.name)
    .limit(_LIMIT)
)
_NEW_DOMAIN: Final = sa.insert(domains)
_CHANGE_DOMAIN: Final = sa.update(domains).where(
    domains.c.id == _B("b_id"), domains.c.version == _B("b_version")
)

_PROJECT_COLUMNS: Final = (*projects.c, domains.c.name.label("domain"))
_PROJECTS_OF: Final = sa.select(*_PROJECT_COLUMNS).join_from(
    projects, domains, projects.c.domain_id == domains.c.id
)
_PROJECT: Final = _PROJECTS_OF.where(
    domains.c.name == _B("b_domain"), projects.c.name == _B("b_name")
)
_PROJECT_BY_ID: Final = _PROJECTS_OF.where(projects.c.id == _B("b_id"))
_PROJECTS: Final = (
    _PROJECTS_OF.where(
        sa.or_(_ALL, projects.c.id.in_(_MINE), projects.c.domain_id == _ADMINISTERED_DOMAIN),
        sa.or_(_text("b_after").is_(None), projects.c.id > _text("b_after")),
    )
    .order_by(projects.c.id)
    .limit(_LIMIT)
)
_NEW_PROJECT: Final = sa.insert(projects)
_CHANGE_PROJECT: Final = sa.update(projects).where(
    projects.c.id == _B("b_id"), projects.c.version == _B("b_version")
)

_MEMBERS: Final = (
    sa.select(
        users.c.id.label("user_id"),
        users.c.name.label("user"),
        memberships.c.role,
        memberships.c.created_at,
    )
    .join_from(memberships, users, memberships.c.user_id == users.c.id)
    .where(
        memberships.c.project_id == _B("b_project"),
        sa.or_(_text("b_after").is_(None), users.c.name > _text("b_after")),
    )
    .order_by(users.c.name)
    .limit(_LIMIT)
)
_MEMBERSHIPS: Final = (
    sa.select(
        memberships.c.project_id,
        memberships.c.role,
        projects.c.name.label("project"),
        projects.c.domain_id,
        projects.c.disabled_at,
        domains.c.name.label("domain"),
        domains.c.disabled_at.label("domain_disabled_at"),
    )
    .join_from(memberships, projects, memberships.c.project_id == projects.c.id)
    .join(domains, projects.c.domain_id == domains.c.id)
    .where(memberships.c.user_id == _B("b_user"))
    .order_by(projects.c.name, projects.c.id)
)
_MEMBERSHIP: Final = sa.select(memberships).where(
    memberships.c.user_id == _B("b_user"), memberships.c.project_id == _B("b_project")
)
_JOIN: Final = sa.insert(memberships)
_SET_ROLE: Final = sa.update(memberships).where(
    memberships.c.user_id == _B("b_user"), memberships.c.project_id == _B("b_project")
)
_LEAVE: Final = sa.delete(memberships).where(
    memberships.c.user_id == _B("b_user"), memberships.c.project_id == _B("b_project")
)

_USER_COLUMNS: Final = (
    *users.c,
    domains.c.name.label("domain"),
    projects.c.name.label("project"),
)
_USERS_OF: Final = (
    sa.select(*_USER_COLUMNS)
    .join_from(users, domains, users.c.domain_id == domains.c.id)
    .join(projects, users.c.project_id == projects.c.id)
)
_USER: Final = sa.select(users).where(users.c.name == _B("b_name"))
_WHOLE_USER: Final = _USERS_OF.where(users.c.name == _B("b_name"))
_WHOLE_USER_BY_ID: Final = _USERS_OF.where(users.c.id == _B("b_id"))
_MEMBER_OF_MINE: Final = sa.select(memberships.c.user_id).where(memberships.c.project_id.in_(_MINE))
_USERS: Final = (
    _USERS_OF.where(
        sa.or_(
            _ALL,
            users.c.id == _CALLER,
            users.c.id.in_(_MEMBER_OF_MINE),
            sa.and_(
                users.c.domain_id == _ADMINISTERED_DOMAIN,
                one_of(users.c.role, (Role.USER, Role.DOMAIN_ADMIN)),
            ),
        ),
        sa.or_(_text("b_after").is_(None), users.c.name > _text("b_after")),
    )
    .order_by(users.c.name)
    .limit(_LIMIT)
)
_NEW_USER: Final = sa.insert(users)
_CHANGE_USER: Final = sa.update(users).where(
    users.c.id == _B("b_id"), users.c.version == _B("b_version")
)
_OTHER_ADMINS: Final = (
    sa.select(users.c.id)
    .join_from(users, domains, users.c.domain_id == domains.c.id)
    .where(
        users.c.role == str(Role.ADMIN),
        users.c.id != _B("b_id"),
        users.c.disabled_at.is_(None),
        domains.c.disabled_at.is_(None),
        sa.or_(_text("b_domain").is_(None), users.c.domain_id != _text("b_domain")),
    )
    .limit(1)
)


async def find_domain(tx: Reader, name: str) -> Any | None:
    return await tx.one(_DOMAIN, b_name=name)


async def get_domain_by_id(tx: Reader, domain_id: str) -> Any:
    """Of an id that a row has: domains are never deleted."""
    row = await tx.one(_DOMAIN_BY_ID, b_id=domain_id)
    assert row is not None
    return row


async def list_domains(tx: Reader, caller: Viewer, *, after: str | None, limit: int) -> list[Any]:
    return await tx.all(_DOMAINS, **viewer(caller), b_after=after, b_limit=limit)


async def add_domain(tx: Transaction, *, domain_id: str, name: str, at: int) -> None:
    await tx.execute(_NEW_DOMAIN, id=domain_id, name=name, created_at=at, version=1)


async def change_domain(tx: Transaction, row: Any, **columns: Any) -> bool:
    """False if *row* is out of date."""
    version = row.version + 1
    return (
        await tx.execute(
            _CHANGE_DOMAIN, b_id=row.id, b_version=row.version, version=version, **columns
        )
        > 0
    )


async def find_project(tx: Reader, domain: str, name: str) -> Any | None:
    """With its domain's name."""
    return await tx.one(_PROJECT, b_domain=domain, b_name=name)


async def get_project_by_id(tx: Reader, project_id: str) -> Any:
    """Of an id that a row has: projects are never deleted."""
    row = await tx.one(_PROJECT_BY_ID, b_id=project_id)
    assert row is not None
    return row


async def list_projects(tx: Reader, caller: Viewer, *, after: str | None, limit: int) -> list[Any]:
    """In the order of their ids, after the id *after*."""
    return await tx.all(_PROJECTS, **viewer(caller), b_after=after, b_limit=limit)


async def add_project(
    tx: Transaction, *, project_id: str, domain_id: str, name: str, at: int
) -> None:
    await tx.execute(
        _NEW_PROJECT, id=project_id, domain_id=domain_id, name=name, created_at=at, version=1
    )


async def change_project(tx: Transaction, row: Any, **columns: Any) -> bool:
    version = row.version + 1
    return (
        await tx.execute(
            _CHANGE_PROJECT, b_id=row.id, b_version=row.version, version=version, **columns
        )
        > 0
    )


async def list_members(tx: Reader, project_id: str, *, after: str | None, limit: int) -> list[Any]:
    return await tx.all(_MEMBERS, b_project=project_id, b_after=after, b_limit=limit)


async def list_memberships(tx: Reader, user_id: str) -> list[Any]:
    """Of one user, with the projects' names and whether they are disabled."""
    return await tx.all(_MEMBERSHIPS, b_user=user_id)


async def join(
    tx: Transaction, *, user_id: str, project_id: str, role: ProjectRole, at: int
) -> str | None:
    """Idempotent; the role that they had before."""
    known = await tx.one(_MEMBERSHIP, b_user=user_id, b_project=project_id)
    if known is None:
        await tx.execute(
            _JOIN, user_id=user_id, project_id=project_id, role=str(role), created_at=at
        )
        return None
    await tx.execute(_SET_ROLE, b_user=user_id, b_project=project_id, role=str(role))
    return str(known.role)


async def leave(tx: Transaction, user_id: str, project_id: str) -> bool:
    return await tx.execute(_LEAVE, b_user=user_id, b_project=project_id) > 0


async def find_user(tx: Reader, name: str) -> Any | None:
    return await tx.one(_USER, b_name=name)


async def find_whole_user(tx: Reader, name: str) -> Any | None:
    """With the names of domain and default project."""
    return await tx.one(_WHOLE_USER, b_name=name)


async def get_user_by_id(tx: Reader, user_id: str) -> Any:
    """Of an id that a row has: users are never deleted."""
    row = await tx.one(_WHOLE_USER_BY_ID, b_id=user_id)
    assert row is not None
    return row


async def list_users(tx: Reader, caller: Viewer, *, after: str | None, limit: int) -> list[Any]:
    return await tx.all(_USERS, **viewer(caller), b_after=after, b_limit=limit)


async def add_user(
    tx: Transaction,
    *,
    user_id: str,
    name: str,
    role: str,
    project_id: str,
    created_at: int,
    domain_id: str = "default",
    password: str | None = None,
) -> None:
    """With a membership in their default project."""
    await tx.execute(
        _NEW_USER,
        id=user_id,
        name=name,
        role=str(role),
        project_id=project_id,
        created_at=created_at,
        domain_id=domain_id,
        version=1,
        password=password,
    )
    await join(tx, user_id=user_id, project_id=project_id, role=ProjectRole.MEMBER, at=created_at)


async def change_user(tx: Transaction, row: Any, **columns: Any) -> bool:
    """False if *row* is out of date."""
    version = row.version + 1
    return (
        await tx.execute(
            _CHANGE_USER, b_id=row.id, b_version=row.version, version=version, **columns
        )
        > 0
    )


async def has_other_admin(tx: Reader, user_id: str, *, outside: str | None = None) -> bool:
    """Whether an enabled administrator is left without *user_id* (and outside of a domain)."""
    return await tx.one(_OTHER_ADMINS, b_id=user_id, b_domain=outside) is not None
