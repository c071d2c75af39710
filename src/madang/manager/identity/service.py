"""Tokens: made, checked, revoked."""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from typing import Any, Final

from madang.kit.clock import Clock
from madang.kit.ids import new_id
from madang.kit.secret import Secret
from madang.manager.audit.service import HOST, AuditLog, madang
from madang.manager.db import Database, micros
from madang.manager.identity import store
from madang.manager.identity.types import DEFAULT_PROJECT, TOKEN_PREFIX, Principal, Role
from madang.wire.errors import Unauthenticated

CACHE_S: Final = 5.0
"""How long a token that was found valid is believed; as long a revocation elsewhere takes."""
CACHE_SIZE: Final = 1024
USED_EVERY_S: Final = 300.0
"""``last_used_at`` is kept this exact; a write for each read would cost more than the read."""
MAX_TOKEN: Final = 128


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


_INVALID: Final = "the token is not valid. `madang login URL` stores another."
_MISSING: Final = (
    "no token: `madang login URL` stores one; programs send `Authorization: Bearer mdg_…`."
)


class IdentityService:
    """Lookups go by the token's hash: an attacker's guess tells nothing by its timing."""

    def __init__(self, database: Database, clock: Clock, audit: AuditLog) -> None:
        self._database = database
        self._clock = clock
        self._audit = audit
        self._known: OrderedDict[str, tuple[float, Principal]] = OrderedDict()

    async def ensure_admin(self) -> Secret | None:
        """The first token ever, of the user ``admin``; None if there is one already."""
        now = micros(self._clock.now())
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        async with self._database.begin() as tx:
            if await store.has_tokens(tx):
                return None
            await self._add_admin_token(tx, "first", token, now)
        return Secret(token)

    async def new_admin_token(self, name: str) -> Secret:
        """One more token of the user ``admin``: for an operator who lost the first."""
        now = micros(self._clock.now())
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        async with self._database.begin() as tx:
            await self._add_admin_token(tx, name, token, now)
        return Secret(token)

    async def _add_admin_token(self, tx: Any, name: str, token: str, now: int) -> None:
        user = await store.find_user(tx, "admin")
        user_id = new_id() if user is None else user.id
        if user is None:
            await store.add_user(
                tx,
                user_id=user_id,
                name="admin",
                role=Role.ADMIN,
                project_id=DEFAULT_PROJECT,
                created_at=now,
            )
        token_id = new_id()
        await store.add_token(
            tx, token_id=token_id, user_id=user_id, name=name, digest=_digest(token), created_at=now
        )
        await self._audit.record(
            tx,
            actor=madang(HOST),
            action="token.created",
            kind="token",
            id=token_id,
            name=name,
            after={"user": "admin", "scopes": ["*"]},
        )

    async def revoke(self, token_id: str) -> bool:
        """Whether it was valid until now."""
        async with self._database.begin() as tx:
            done = await store.revoke(tx, token_id, micros(self._clock.now()))
            if done:
                await self._audit.record(
                    tx,
                    actor=madang(HOST),
                    action="token.revoked",
                    kind="token",
                    id=token_id,
                    name=token_id,
                )
        self._known.clear()
        return done

    async def authenticate(self, header: str | None) -> Principal:
        """The caller named by an ``Authorization`` header. Raises Unauthenticated."""
        scheme, _, token = (header or "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token.startswith(TOKEN_PREFIX):
            raise Unauthenticated(_MISSING)
        if len(token) > MAX_TOKEN:
            raise Unauthenticated(_INVALID)
        digest = _digest(token)
        at = self._clock.monotonic()
        known = self._known.get(digest)
        if known is not None and at - known[0] < CACHE_S:
            return known[1]
        principal = await self._look_up(digest)
        self._known[digest] = (at, principal)
        while len(self._known) > CACHE_SIZE:
            self._known.popitem(last=False)
        return principal

    async def _look_up(self, digest: str) -> Principal:
        now = self._clock.now()
        async with self._database.read() as tx:
            row = await store.find_token(tx, digest)
        if row is None or row.revoked_at is not None or row.disabled_at is not None:
            self._known.pop(digest, None)
            raise Unauthenticated(_INVALID)
        if row.expires_at is not None and row.expires_at <= micros(now):
            self._known.pop(digest, None)
            raise Unauthenticated(f"the token {row.token!r} has expired.")
        if row.last_used_at is None or micros(now) - row.last_used_at > micros(USED_EVERY_S):
            async with self._database.begin() as tx:
                await store.mark_used(tx, row.token_id, micros(now))
        return Principal(
            user_id=row.user_id,
            user=row.user,
            role=Role(row.role),
            token_id=row.token_id,
            token=row.token,
            project_id=row.project_id,
            domain_id=row.domain_id,
        )
