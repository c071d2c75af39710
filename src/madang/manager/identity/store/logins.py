"""Invitations, recovery codes, failed attempts."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa

from madang.manager.db import Reader, Transaction
from madang.manager.identity.tables import (
    attempts,
    domains,
    invitations,
    projects,
    recovery_codes,
    users,
)

_B = sa.bindparam
_OPEN: Final = sa.and_(
    invitations.c.used_at.is_(None),
    invitations.c.expires_at > sa.bindparam("b_now", type_=sa.BigInteger),
)
_FOR: Final = users.alias("for_user")
_BY: Final = users.alias("by_user")
_INVITATIONS: Final = (
    sa.select(
        *invitations.c,
        projects.c.name.label("project"),
        projects.c.domain_id,
        projects.c.disabled_at.label("project_disabled_at"),
        domains.c.name.label("domain"),
        domains.c.disabled_at.label("domain_disabled_at"),
        sa.func.coalesce(_FOR.c.name, "").label("for_user"),
        _BY.c.name.label("by_user"),
        _BY.c.role.label("by_role"),
        _BY.c.disabled_at.label("by_disabled_at"),
    )
    .join_from(invitations, projects, invitations.c.project_id == projects.c.id)
    .join(domains, projects.c.domain_id == domains.c.id)
    .join(_BY, invitations.c.made_by == _BY.c.id)
    .outerjoin(_FOR, invitations.c.user_id == _FOR.c.id)
)
_OPEN_BY_DIGEST: Final = _INVITATIONS.where(invitations.c.digest == _B("b_digest"), _OPEN)
_OPEN_BY_ID: Final = _INVITATIONS.where(invitations.c.id == _B("b_id"), _OPEN)
_LIST: Final = (
    _INVITATIONS.where(
        _OPEN,
        sa.or_(
            sa.bindparam("b_domain", type_=sa.Text).is_(None),
            projects.c.domain_id == sa.bindparam("b_domain", type_=sa.Text),
        ),
        sa.or_(
            sa.bindparam("b_after", type_=sa.Text).is_(None),
            invitations.c.id < sa.bindparam("b_after", type_=sa.Text),
        ),
    )
    .order_by(invitations.c.id.desc())
    .limit(sa.bindparam("b_limit", type_=sa.Integer))
)
_ADD: Final = sa.insert(invitations)
_USE: Final = sa.update(invitations).where(
    invitations.c.id == _B("b_id"),
    invitations.c.used_at.is_(None),
)
_WITHDRAW: Final = sa.update(invitations).where(
    invitations.c.user_id == _B("b_user"), invitations.c.used_at.is_(None)
)
_PRUNE: Final = sa.delete(invitations).where(
    invitations.c.expires_at < sa.bindparam("b_before", type_=sa.BigInteger)
)
_ADD_CODE: Final = sa.insert(recovery_codes)
_USE_CODE: Final = sa.delete(recovery_codes).where(
    recovery_codes.c.user_id == _B("b_user"), recovery_codes.c.digest == _B("b_digest")
)
_DROP_CODES: Final = sa.delete(recovery_codes).where(recovery_codes.c.user_id == _B("b_user"))
_STEP: Final = sa.update(users).where(
    users.c.id == _B("b_id"), users.c.totp_step < sa.bindparam("b_step", type_=sa.BigInteger)
)
_ATTEMPT: Final = sa.select(attempts).where(attempts.c.subject == _B("b_subject"))
_NEW_ATTEMPT: Final = sa.insert(attempts)
_COUNT_ATTEMPT: Final = sa.update(attempts).where(attempts.c.subject == _B("b_subject"))
_DROP_ATTEMPT: Final = sa.delete(attempts).where(attempts.c.subject == _B("b_subject"))
_PRUNE_ATTEMPTS: Final = sa.delete(attempts).where(
    attempts.c.last_at < sa.bindparam("b_before", type_=sa.BigInteger)
)


async def add_invitation(tx: Transaction, **columns: Any) -> None:
    await tx.execute(_ADD, **columns)


async def find_invitation(tx: Reader, digest: str, now: int) -> Any | None:
    """One that can still be used."""
    return await tx.one(_OPEN_BY_DIGEST, b_digest=digest, b_now=now)


async def find_invitation_by_id(tx: Reader, invitation_id: str, now: int) -> Any | None:
    return await tx.one(_OPEN_BY_ID, b_id=invitation_id, b_now=now)


async def list_invitations(
    tx: Reader, *, domain_id: str | None, now: int, after: str | None, limit: int
) -> list[Any]:
    """Those that can still be used, newest first; *domain_id* None: everywhere."""
    return await tx.all(_LIST, b_domain=domain_id, b_now=now, b_after=after, b_limit=limit)


async def use_invitation(tx: Transaction, invitation_id: str, at: int) -> bool:
    """False: another was faster."""
    return await tx.execute(_USE, b_id=invitation_id, used_at=at) > 0


async def withdraw_invitations(tx: Transaction, user_id: str, at: int) -> None:
    """All that would set this user's password."""
    await tx.execute(_WITHDRAW, b_user=user_id, used_at=at)


async def prune_invitations(tx: Transaction, before: int) -> int:
    return await tx.execute(_PRUNE, b_before=before)


async def set_recovery_codes(tx: Transaction, user_id: str, digests: list[str]) -> None:
    """In place of those before."""
    await tx.execute(_DROP_CODES, b_user=user_id)
    await tx.many(_ADD_CODE, [{"user_id": user_id, "digest": digest} for digest in digests])


async def use_recovery_code(tx: Transaction, user_id: str, digest: str) -> bool:
    return await tx.execute(_USE_CODE, b_user=user_id, b_digest=digest) > 0


async def use_totp_step(tx: Transaction, user_id: str, step: int) -> bool:
    """False: a code of this step, or of a later one, was used."""
    return await tx.execute(_STEP, b_id=user_id, b_step=step, totp_step=step) > 0


async def find_attempts(tx: Reader, subject: str) -> Any | None:
    return await tx.one(_ATTEMPT, b_subject=subject)


async def count_attempt(tx: Transaction, subject: str, failures: int, at: int) -> None:
    if not await tx.execute(_COUNT_ATTEMPT, b_subject=subject, failures=failures, last_at=at):
        await tx.execute(_NEW_ATTEMPT, subject=subject, failures=failures, last_at=at)


async def forgive(tx: Transaction, subject: str) -> None:
    await tx.execute(_DROP_ATTEMPT, b_subject=subject)


async def prune_attempts(tx: Transaction, before: int) -> int:
    return await tx.execute(_PRUNE_ATTEMPTS, b_before=before)
