"""All SQL of the identity slice."""

from __future__ import annotations

from typing import Any, Final, Protocol

import sqlalchemy as sa

from madang.manager.db import Reader, Transaction
from madang.manager.identity.tables import memberships, projects, tokens, users
from madang.manager.identity.types import ProjectRole, Role


class Viewer(Protocol):
    """Who asks."""

    @property
    def user_id(self) -> str: ...
    @property
    def sees_all(self) -> bool: ...


def visible(
    owner_id: sa.ColumnElement[str], project_id: sa.ColumnElement[str]
) -> sa.ColumnElement[bool]:
    """Which rows a viewer may know of; the statement takes the values of ``viewer``.

    Their own; those of a project that they administer; those of all projects of a domain that they
    administer; everything, for administrators and monitors. Every statement that reads something of
    somebody's for a caller has this in its WHERE: what is not visible is not there.
    """
    caller = sa.bindparam("b_viewer", type_=sa.Text)
    administered = sa.select(memberships.c.project_id).where(
        memberships.c.user_id == caller, memberships.c.role == str(ProjectRole.ADMIN)
    )
    of_domain = (
        sa.select(projects.c.id)
        .join_from(projects, users, projects.c.domain_id == users.c.domain_id)
        .where(users.c.id == caller, users.c.role == str(Role.DOMAIN_ADMIN))
    )
    return sa.or_(
        sa.bindparam("b_sees_all", type_=sa.Integer) == 1,
        owner_id == caller,
        project_id.in_(administered),
        project_id.in_(of_domain),
    )


def viewer(caller: Viewer) -> dict[str, Any]:
    """The values of ``visible``."""
    return {"b_viewer": caller.user_id, "b_sees_all": int(caller.sees_all)}


_ANY_TOKEN: Final = sa.select(tokens.c.id).limit(1)
_BY_DIGEST: Final = (
    sa.select(
        tokens.c.id.label("token_id"),
        tokens.c.name.label("token"),
        tokens.c.expires_at,
        tokens.c.revoked_at,
        tokens.c.last_used_at,
        users.c.id.label("user_id"),
        users.c.name.label("user"),
        users.c.role,
        users.c.project_id,
        users.c.disabled_at,
        users.c.domain_id,
    )
    .join_from(tokens, users, tokens.c.user_id == users.c.id)
    .where(tokens.c.digest == sa.bindparam("b_digest"))
)
_USER: Final = sa.select(users).where(users.c.name == sa.bindparam("b_name"))
_NEW_USER: Final = sa.insert(users)
_NEW_TOKEN: Final = sa.insert(tokens)
_USED: Final = sa.update(tokens).where(tokens.c.id == sa.bindparam("b_id"))
_REVOKE: Final = sa.update(tokens).where(
    tokens.c.id == sa.bindparam("b_id"), tokens.c.revoked_at.is_(None)
)


async def has_tokens(tx: Reader) -> bool:
    return await tx.one(_ANY_TOKEN) is not None


async def find_token(tx: Reader, digest: str) -> Any | None:
    """Token and user of a digest, valid or not."""
    return await tx.one(_BY_DIGEST, b_digest=digest)


async def find_user(tx: Reader, name: str) -> Any | None:
    return await tx.one(_USER, b_name=name)


async def add_user(
    tx: Transaction, *, user_id: str, name: str, role: str, project_id: str, created_at: int
) -> None:
    await tx.execute(
        _NEW_USER, id=user_id, name=name, role=role, project_id=project_id, created_at=created_at
    )


async def add_token(
    tx: Transaction,
    *,
    token_id: str,
    user_id: str,
    name: str,
    digest: str,
    created_at: int,
    expires_at: int | None = None,
) -> None:
    await tx.execute(
        _NEW_TOKEN,
        id=token_id,
        user_id=user_id,
        name=name,
        digest=digest,
        scopes='["*"]',
        created_at=created_at,
        expires_at=expires_at,
    )


async def mark_used(tx: Transaction, token_id: str, at: int) -> None:
    await tx.execute(_USED, b_id=token_id, last_used_at=at)


async def revoke(tx: Transaction, token_id: str, at: int) -> bool:
    return await tx.execute(_REVOKE, b_id=token_id, revoked_at=at) > 0
