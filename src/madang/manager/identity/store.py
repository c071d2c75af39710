"""All SQL of the identity slice."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa

from madang.manager.db import Reader, Transaction
from madang.manager.identity.tables import tokens, users

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
