"""What callers hold: tokens, key pairs, logins."""

from __future__ import annotations

import secrets
from typing import Any, Final

from madang.kit.clock import Clock
from madang.kit.codec import from_json, to_json
from madang.kit.ids import new_id
from madang.manager.audit.service import actor_of as actor_of_caller
from madang.manager.db import Database, Transaction, micros, seconds
from madang.manager.identity.rules import names
from madang.manager.identity.rules.rights import Act, may
from madang.manager.identity.rules.scopes import check_granted, check_scopes
from madang.manager.identity.service.actors import (
    actor_of,
    find_user,
    need,
    no_such,
    target_of_user,
)
from madang.manager.identity.service.authentication import IdentityService, digest_of
from madang.manager.identity.service.journal import Journal
from madang.manager.identity.service.vault import Vault
from madang.manager.identity.store import people
from madang.manager.identity.store import tokens as store
from madang.manager.identity.types import TOKEN_PREFIX, Principal, TokenKind
from madang.wire.errors import Conflict, Forbidden, InvalidRequest
from madang.wire.people import NewToken, Token, TokenDraft
from madang.wire.signing import ACCESS_PREFIX

MAX_TOKENS: Final = 200
"""Of each kind, for one user."""
MAX_LIFE_S: Final = 10 * 366 * 86400.0
_CAPPED: Final = frozenset({TokenKind.TOKEN, TokenKind.KEY})
"""What these make can't outlive them; behind the others is a password."""


class Tokens:
    def __init__(
        self,
        database: Database,
        clock: Clock,
        identity: IdentityService,
        journal: Journal,
        vault: Vault,
    ) -> None:
        self._database: Final = database
        self._clock: Final = clock
        self._identity: Final = identity
        self._journal: Final = journal
        self._vault: Final = vault

    async def list(
        self, caller: Principal, user: str | None, *, after: str | None, limit: int
    ) -> list[Token]:
        """The caller's own, or those of *user*: valid ones, newest first."""
        now = micros(self._clock.now())
        async with self._database.read() as tx:
            user_id = caller.user_id
            if user is not None:
                actor = await actor_of(tx, caller)
                row, target = await find_user(tx, actor, user)
                need(actor, Act.SEE_TOKENS, target)
                user_id = row.id
            rows = await store.list_tokens(tx, user_id, now=now, after=after, limit=limit)
        return [view(row) for row in rows]

    async def add(self, caller: Principal, draft: TokenDraft, source: str) -> NewToken:
        """Never more than the caller's own token has, and not for longer."""
        names.check_label(draft.name, "name")
        if draft.kind not in _CAPPED:
            raise InvalidRequest(
                f"kind: {draft.kind[:40]!r} is neither token nor key.", field="kind"
            )
        scopes = check_scopes(draft.scopes)
        check_granted(caller.scopes, scopes)
        now = micros(self._clock.now())
        expires_at = _expiry(caller, draft.expires_s, now)
        token_id = new_id()
        is_key = draft.kind == TokenKind.KEY
        secret = secrets.token_urlsafe(32) if is_key else TOKEN_PREFIX + secrets.token_urlsafe(32)
        access_key = ACCESS_PREFIX + token_id if is_key else ""
        sealed = self._vault.seal(secret.encode(), f"key {token_id}") if is_key else None
        async with self._database.begin() as tx:
            await self.check_count(tx, caller.user_id, draft.kind, now)
            await store.add_token(
                tx,
                token_id=token_id,
                user_id=caller.user_id,
                name=draft.name,
                digest=digest_of(access_key or secret),
                created_at=now,
                expires_at=expires_at,
                scopes=to_json(sorted(scopes)).decode(),
                kind=draft.kind,
                secret=sealed,
                source=source,
            )
            row = await store.find_token_by_id(tx, token_id)
            await self._journal.note(
                tx,
                actor_of_caller(caller),
                "token.created",
                "token",
                token_id,
                draft.name,
                after={"kind": draft.kind, "scopes": sorted(scopes), "user": caller.user},
            )
        self._journal.tell()
        return NewToken(token=view(row), secret=secret, access_key=access_key)

    async def check_count(self, tx: Transaction, user_id: str, kind: str, now: int) -> None:
        if await store.count_tokens(tx, user_id, kind, now) >= MAX_TOKENS:
            text = f"there are {MAX_TOKENS} of kind {kind} already: `madang token revoke` some."
            raise Conflict(text, kind=kind)

    async def revoke(self, caller: Principal, token_id: str) -> None:
        """At once; whose it is, or who administers them. Raises NotFound."""
        now = micros(self._clock.now())
        async with self._database.begin() as tx:
            row = await store.find_token_by_id(tx, token_id)
            if row is None:
                raise no_such("token", token_id)
            if row.user_id != caller.user_id:
                actor = await actor_of(tx, caller)
                whole = await people.get_user_by_id(tx, row.user_id)
                target = await target_of_user(tx, whole)
                if not may(actor, Act.SEE_TOKENS, target):
                    raise no_such("token", token_id)
                need(actor, Act.CHANGE_USER, target)
            if await store.revoke(tx, token_id, now):
                await self._journal.note(
                    tx,
                    actor_of_caller(caller),
                    "token.revoked",
                    "token",
                    token_id,
                    row.token,
                    before={"kind": row.kind, "user": row.user},
                )
        self._identity.forget()
        self._journal.tell()


def _expiry(caller: Principal, wanted_s: float | None, now: int) -> int | None:
    if wanted_s is not None and not 1 <= wanted_s <= MAX_LIFE_S:
        raise InvalidRequest("expires_s: between one second and ten years.", field="expires_s")
    wanted = None if wanted_s is None else now + micros(wanted_s)
    if caller.kind not in _CAPPED or caller.expires_at is None:
        return wanted
    if wanted is None:
        return caller.expires_at
    if wanted > caller.expires_at:
        text = f"the token {caller.token!r} expires before that; what it makes can't outlive it."
        raise Forbidden(text)
    return wanted


def view(row: Any) -> Token:
    return Token(
        id=row.token_id,
        name=row.token,
        kind=row.kind,
        user=row.user,
        scopes=tuple(from_json(list[str], row.scopes)),
        created_at=seconds(row.created_at),
        expires_at=None if row.expires_at is None else seconds(row.expires_at),
        last_used_at=None if row.last_used_at is None else seconds(row.last_used_at),
        source=row.source,
    )
