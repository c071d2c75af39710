"""Tokens of each kind, and the signatures that came before."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa

from madang.manager.db import Reader, Transaction
from madang.manager.identity.tables import domains, signatures, tokens, users
from madang.manager.identity.types import TokenKind

_B = sa.bindparam


def _text(name: str) -> sa.BindParameter[str]:
    return sa.bindparam(name, type_=sa.Text)


_ANY_TOKEN: Final = sa.select(tokens.c.id).limit(1)
_COLUMNS: Final = (
    tokens.c.id.label("token_id"),
    tokens.c.name.label("token"),
    tokens.c.kind,
    tokens.c.scopes,
    tokens.c.secret,
    tokens.c.created_at,
    tokens.c.expires_at,
    tokens.c.revoked_at,
    tokens.c.last_used_at,
    tokens.c.source,
    users.c.id.label("user_id"),
    users.c.name.label("user"),
    users.c.role,
    users.c.project_id,
    users.c.disabled_at,
    users.c.domain_id,
    users.c.version,
)
_TOKENS: Final = sa.select(*_COLUMNS).join_from(tokens, users, tokens.c.user_id == users.c.id)
_BY_DIGEST: Final = (
    sa.select(*_COLUMNS, domains.c.disabled_at.label("domain_disabled_at"))
    .join_from(tokens, users, tokens.c.user_id == users.c.id)
    .join(domains, users.c.domain_id == domains.c.id)
    .where(tokens.c.digest == _B("b_digest"))
)
_BY_ID: Final = _TOKENS.where(tokens.c.id == _B("b_id"))
_OF_USER: Final = (
    _TOKENS.where(
        tokens.c.user_id == _B("b_user"),
        tokens.c.revoked_at.is_(None),
        sa.or_(
            tokens.c.expires_at.is_(None),
            tokens.c.expires_at > sa.bindparam("b_now", type_=sa.BigInteger),
        ),
        sa.or_(_text("b_after").is_(None), tokens.c.id < _text("b_after")),
    )
    .order_by(tokens.c.id.desc())
    .limit(sa.bindparam("b_limit", type_=sa.Integer))
)
_COUNT: Final = sa.select(sa.func.count().label("count")).where(
    tokens.c.user_id == _B("b_user"),
    tokens.c.kind == _B("b_kind"),
    tokens.c.revoked_at.is_(None),
    sa.or_(
        tokens.c.expires_at.is_(None),
        tokens.c.expires_at > sa.bindparam("b_now", type_=sa.BigInteger),
    ),
)
_NEW_TOKEN: Final = sa.insert(tokens)
_USED: Final = sa.update(tokens).where(tokens.c.id == _B("b_id"))
_REVOKE: Final = sa.update(tokens).where(tokens.c.id == _B("b_id"), tokens.c.revoked_at.is_(None))
_REVOKE_LOGINS: Final = sa.update(tokens).where(
    tokens.c.user_id == _B("b_user"),
    tokens.c.revoked_at.is_(None),
    tokens.c.id != _B("b_but"),
    sa.or_(tokens.c.kind == str(TokenKind.BROWSER), tokens.c.kind == str(TokenKind.LOGIN)),
)
_PRUNE: Final = sa.delete(tokens).where(
    sa.or_(tokens.c.kind == str(TokenKind.BROWSER), tokens.c.kind == str(TokenKind.LOGIN)),
    sa.or_(
        tokens.c.expires_at < sa.bindparam("b_before", type_=sa.BigInteger),
        tokens.c.revoked_at < sa.bindparam("b_before", type_=sa.BigInteger),
    ),
)
_SEEN: Final = sa.select(signatures.c.nonce).where(
    signatures.c.token_id == _B("b_token"), signatures.c.nonce == _B("b_nonce")
)
_REMEMBER: Final = sa.insert(signatures)
_FORGET: Final = sa.delete(signatures).where(
    signatures.c.expires_at < sa.bindparam("b_now", type_=sa.BigInteger)
)


async def has_tokens(tx: Reader) -> bool:
    return await tx.one(_ANY_TOKEN) is not None


async def find_token(tx: Reader, digest: str) -> Any | None:
    """Token, user and domain of a digest, valid or not."""
    return await tx.one(_BY_DIGEST, b_digest=digest)


async def find_token_by_id(tx: Reader, token_id: str) -> Any | None:
    return await tx.one(_BY_ID, b_id=token_id)


async def list_tokens(
    tx: Reader, user_id: str, *, now: int, after: str | None, limit: int
) -> list[Any]:
    """Those that are valid, newest first."""
    return await tx.all(_OF_USER, b_user=user_id, b_now=now, b_after=after, b_limit=limit)


async def count_tokens(tx: Reader, user_id: str, kind: str, now: int) -> int:
    row = await tx.one(_COUNT, b_user=user_id, b_kind=kind, b_now=now)
    return 0 if row is None else int(row.count)


async def add_token(
    tx: Transaction,
    *,
    token_id: str,
    user_id: str,
    name: str,
    digest: str,
    created_at: int,
    expires_at: int | None = None,
    scopes: str = '["*"]',
    kind: str = "token",
    secret: str | None = None,
    source: str = "",
) -> None:
    await tx.execute(
        _NEW_TOKEN,
        id=token_id,
        user_id=user_id,
        name=name,
        digest=digest,
        scopes=scopes,
        created_at=created_at,
        expires_at=expires_at,
        kind=str(kind),
        secret=secret,
        source=source,
    )


async def mark_used(tx: Transaction, token_id: str, at: int) -> None:
    await tx.execute(_USED, b_id=token_id, last_used_at=at)


async def revoke(tx: Transaction, token_id: str, at: int) -> bool:
    return await tx.execute(_REVOKE, b_id=token_id, revoked_at=at) > 0


async def revoke_logins(tx: Transaction, user_id: str, at: int, *, but: str = "") -> int:
    """All browser sessions and `madang login` tokens of a user, but one."""
    return await tx.execute(_REVOKE_LOGINS, b_user=user_id, b_but=but, revoked_at=at)


async def prune_logins(tx: Transaction, before: int) -> int:
    """Logins that ended before; other tokens stay in the list of what there was."""
    return await tx.execute(_PRUNE, b_before=before)


async def remember_nonce(tx: Transaction, token_id: str, nonce: str, expires_at: int) -> bool:
    """False: it came before."""
    if await tx.one(_SEEN, b_token=token_id, b_nonce=nonce) is not None:
        return False
    await tx.execute(_REMEMBER, token_id=token_id, nonce=nonce, expires_at=expires_at)
    return True


async def forget_nonces(tx: Transaction, now: int) -> int:
    return await tx.execute(_FORGET, b_now=now)
