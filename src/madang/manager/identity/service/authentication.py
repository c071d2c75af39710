"""Who calls: tokens, cookies and signatures, checked."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

from madang.kit.clock import Clock
from madang.kit.codec import from_json
from madang.kit.ids import new_id
from madang.kit.secret import Secret
from madang.manager.audit.service import HOST, AuditLog, madang
from madang.manager.db import Database, micros
from madang.manager.http import Caller, Credentials
from madang.manager.identity import store
from madang.manager.identity.rules import origins
from madang.manager.identity.rules.scopes import effective
from madang.manager.identity.service.journal import KIND
from madang.manager.identity.service.vault import Vault
from madang.manager.identity.store import tokens as token_store
from madang.manager.identity.types import (
    COOKIE_PREFIX,
    DEFAULT_PROJECT,
    TOKEN_PREFIX,
    IdentitySettings,
    Principal,
    Role,
    TokenKind,
)
from madang.wire import signing
from madang.wire.api import Event
from madang.wire.errors import CrossSite, SignatureInvalid, Unauthenticated

CACHE_S: Final = 5.0
"""How long a token that was found valid is believed where no change is heard of."""
CACHE_SIZE: Final = 1024
USED_EVERY_S: Final = 300.0
"""``last_used_at`` is kept this exact; a write for each read would cost more than the read."""
MAX_TOKEN: Final = 128
_SENT: Final = frozenset({TokenKind.TOKEN, TokenKind.LOGIN})
_INVALID: Final = "the token is not valid. `madang login URL` stores another."
_MISSING: Final = (
    "no token: `madang login URL` stores one; programs send `Authorization: Bearer mdg_…`."
)


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True, slots=True)
class _Known:
    at: float
    principal: Principal
    secret: str | None
    """Of a key pair, sealed."""


class IdentityService:
    """Lookups go by the token's hash: an attacker's guess tells nothing by its timing."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        audit: AuditLog,
        settings: IdentitySettings,
        vault: Vault,
    ) -> None:
        self._audit = audit
        self._database = database
        self._clock = clock
        self._settings = settings
        self._vault = vault
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._epoch = 0

    # The first administrator

    async def ensure_admin(self) -> Secret | None:
        """The first token ever, of the user ``admin``; None if there is one already."""
        now = micros(self._clock.now())
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        async with self._database.begin() as tx:
            if await token_store.has_tokens(tx):
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
            tx,
            token_id=token_id,
            user_id=user_id,
            name=name,
            digest=digest_of(token),
            created_at=now,
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
            done = await token_store.revoke(tx, token_id, micros(self._clock.now()))
            if done:
                await self._audit.record(
                    tx,
                    actor=madang(HOST),
                    action="token.revoked",
                    kind="token",
                    id=token_id,
                    name=token_id,
                )
        self.forget()
        return done

    # Callers

    async def identify(self, shown: Credentials) -> Principal:
        """The caller of a request. Raises Unauthenticated, CrossSite."""
        if len(shown.authorization) > 1:
            raise Unauthenticated("the request has several Authorization headers.")
        if shown.authorization:
            header = shown.authorization[0]
            if header.startswith(signing.SCHEME):
                return await self._signed(shown, header)
            return await self.authenticate(header)
        cookie = shown.cookie(origins.SECURE_COOKIE) or shown.cookie(origins.COOKIE)
        if cookie is not None:
            return await self._browser(shown, cookie)
        raise Unauthenticated(_MISSING)

    async def authenticate(self, header: str | None) -> Principal:
        """The caller named by a bearer token. Raises Unauthenticated."""
        scheme, _, token = (header or "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token.startswith(TOKEN_PREFIX):
            raise Unauthenticated(_MISSING)
        if len(token) > MAX_TOKEN:
            raise Unauthenticated(_INVALID)
        known = await self._find(digest_of(token))
        if known.principal.kind not in _SENT:
            raise Unauthenticated(_INVALID)
        return known.principal

    async def _browser(self, shown: Credentials, cookie: str) -> Principal:
        if len(cookie) > MAX_TOKEN or not cookie.startswith(COOKIE_PREFIX):
            raise Unauthenticated(_INVALID)
        known = await self._find(digest_of(cookie))
        if known.principal.kind != TokenKind.BROWSER:
            raise Unauthenticated(_INVALID)
        if shown.changes:
            if not origins.is_ours(shown.origin, shown.fetch_site, shown.host):
                raise CrossSite("the request comes from another site, or doesn't say from where.")
            csrf = (shown.csrf or "").encode("utf-8", "surrogateescape")
            right = hmac.compare_digest(csrf, origins.csrf_of(cookie).encode())
            if not shown.upgrade and not right:
                raise CrossSite(f"the header {origins.CSRF_HEADER} is missing or wrong.")
        return known.principal

    async def _signed(self, shown: Credentials, header: str) -> Principal:
        signature = signing.parse(header)
        if signature is None:
            raise SignatureInvalid(
                "the Authorization header does not have the form of a signature."
            )
        try:
            known = await self._find(digest_of(signature.access_key))
        except Unauthenticated as exc:
            raise SignatureInvalid(
                "the access key is not valid, or the signature is wrong."
            ) from exc
        if known.principal.kind != TokenKind.KEY or known.secret is None:
            raise SignatureInvalid("the access key is not valid, or the signature is wrong.")
        path, _, query = shown.target.partition("?")
        text = signing.text_to_sign(
            method=shown.method,
            host=shown.host,
            path=path,
            query=query,
            date=signature.date,
            nonce=signature.nonce,
            body=signature.body,
        )
        secret = self._vault.open(known.secret, f"key {known.principal.token_id}").decode()
        if not hmac.compare_digest(signing.sign(secret, text), signature.signature):
            raise SignatureInvalid("the access key is not valid, or the signature is wrong.")
        await self._refuse_replay(known.principal, signature)
        return known.principal

    async def _refuse_replay(self, caller: Principal, signature: signing.Signature) -> None:
        now = self._clock.now()
        if abs(now - signature.date) > signing.WINDOW_S:
            text = (
                f"the request was signed {abs(now - signature.date):.0f} s "
                f"{'ago' if now > signature.date else 'in the future'}; at most "
                f"{signing.WINDOW_S} s are taken. Set this machine's clock."
            )
            raise SignatureInvalid(text, server_time=now)
        expires = micros(signature.date + 2 * signing.WINDOW_S)
        async with self._database.begin() as tx:
            fresh = await token_store.remember_nonce(tx, caller.token_id, signature.nonce, expires)
        if not fresh:
            raise SignatureInvalid("this signed request came before; sign each one anew.")

    # What is believed

    def heard(self, event: Event) -> None:
        """Somebody's rights changed, perhaps in another server."""
        if event.kind == KIND:
            self.forget()

    def forget(self) -> None:
        self._epoch += 1
        self._known.clear()

    async def may_stay(self, caller: Caller) -> bool:
        """Whether an open stream's caller would still be the same."""
        try:
            assert isinstance(caller, Principal)
            return (await self._look_up(caller.digest)).principal == caller
        except Unauthenticated:
            return False

    async def _find(self, digest: str) -> _Known:
        at = self._clock.monotonic()
        known = self._known.get(digest)
        if known is not None and at - known.at < CACHE_S and not self._over(known.principal):
            return known
        epoch = self._epoch
        found = await self._look_up(digest)
        if epoch == self._epoch:  # else it may have been revoked while we looked
            self._known[digest] = found
            while len(self._known) > CACHE_SIZE:
                self._known.popitem(last=False)
        return found

    def _over(self, principal: Principal) -> bool:
        return principal.expires_at is not None and principal.expires_at <= micros(
            self._clock.now()
        )

    async def _look_up(self, digest: str) -> _Known:
        now = micros(self._clock.now())
        async with self._database.read() as tx:
            row = await token_store.find_token(tx, digest)
        if row is None or row.revoked_at is not None:
            self._known.pop(digest, None)
            raise Unauthenticated(_INVALID)
        if row.disabled_at is not None or row.domain_disabled_at is not None:
            self._known.pop(digest, None)
            raise Unauthenticated(f"the account {row.user!r} is disabled. Ask an administrator.")
        if row.expires_at is not None and row.expires_at <= now:
            self._known.pop(digest, None)
            raise Unauthenticated(f"the token {row.token!r} has expired.")
        used = row.last_used_at or row.created_at
        if row.kind == TokenKind.BROWSER and now - used > micros(self._settings.browser_idle_s):
            self._known.pop(digest, None)
            raise Unauthenticated("the browser session was not used for long: log in again.")
        if row.last_used_at is None or now - row.last_used_at > micros(USED_EVERY_S):
            async with self._database.begin() as tx:
                await token_store.mark_used(tx, row.token_id, now)
        role = Role(row.role)
        principal = Principal(
            user_id=row.user_id,
            user=row.user,
            role=role,
            token_id=row.token_id,
            token=row.token,
            project_id=row.project_id,
            domain_id=row.domain_id,
            scopes=effective(frozenset(from_json(list[str], row.scopes)), role),
            kind=row.kind,
            expires_at=row.expires_at,
            version=row.version,
            digest=digest,
        )
        return _Known(self._clock.monotonic(), principal, row.secret)
