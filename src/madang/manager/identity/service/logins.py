"""Logging in with a password, and out.

Whatever is slow (argon2) happens before the transaction; the transaction then looks again.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Final

from madang.kit.clock import Clock
from madang.kit.codec import to_json
from madang.kit.ids import new_id
from madang.manager.audit.service import Actor
from madang.manager.db import Database, Reader, Transaction, micros, seconds
from madang.manager.http import origin
from madang.manager.identity.rules import names, origins, throttle, totp
from madang.manager.identity.service.authentication import digest_of
from madang.manager.identity.service.journal import Journal
from madang.manager.identity.service.passwords import Passwords
from madang.manager.identity.service.throttling import Gate
from madang.manager.identity.service.tokens import Tokens
from madang.manager.identity.service.vault import Vault
from madang.manager.identity.store import logins as store
from madang.manager.identity.store import people, tokens
from madang.manager.identity.types import (
    COOKIE_PREFIX,
    TOKEN_PREFIX,
    IdentitySettings,
    Principal,
    TokenKind,
)
from madang.wire.errors import LoginFailed, OtpNeeded
from madang.wire.people import LoginReply, LoginRequest

WRONG: Final = "user, password or second factor is wrong."


@dataclass(frozen=True, slots=True)
class LoggedIn:
    reply: LoginReply
    cookie: str = ""


class Logins:
    def __init__(
        self,
        database: Database,
        clock: Clock,
        settings: IdentitySettings,
        held: Tokens,
        journal: Journal,
        vault: Vault,
    ) -> None:
        self._database: Final = database
        self._clock: Final = clock
        self._settings: Final = settings
        self._tokens: Final = held
        self._journal: Final = journal
        self._vault: Final = vault
        self.gate: Final = Gate(database, clock, journal.audit)
        self.passwords: Final = Passwords()

    async def login(self, request: LoginRequest) -> LoggedIn:
        """Raises LoginFailed, OtpNeeded, RateLimited; which of user and password, is not told."""
        counted = throttle.counters(request.user, origin.current().source)
        await self.gate.count(counted)
        try:
            user = await self._check_password(request.user, request.password)
            async with self._database.begin() as tx:
                if (row := await unchanged(tx, user)) is None:
                    raise LoginFailed(WRONG)
                await self._second_factor(tx, row, request.otp)
                done = await self.admit(tx, row, request.token)
                await self.gate.forgive(tx, counted)
        except (LoginFailed, OtpNeeded) as exc:
            await self.gate.note_failure(request.user, exc)
            raise
        return done

    async def _check_password(self, name: str, password: str) -> Any:
        row = None
        if names.valid(name):
            async with self._database.read() as tx:
                row = await people.find_whole_user(tx, name)
                home = None if row is None else await people.get_domain_by_id(tx, row.domain_id)
            if row is None or home is None or (row.disabled_at or home.disabled_at) is not None:
                row = None
        if len(password) > names.MAX_PASSWORD:
            password = ""
        right = await self.passwords.verify(None if row is None else row.password, password)
        if row is None or not right:
            raise LoginFailed(WRONG)
        return row

    async def _second_factor(self, tx: Transaction, row: Any, otp: str) -> None:
        if row.totp_since is None:
            return
        if not otp:
            raise OtpNeeded("the password is right; a code of the second factor is needed too.")
        if otp.isascii() and otp.isdecimal() and len(otp) == totp.DIGITS:
            secret = self._vault.open(row.totp, f"totp {row.id}")
            step = totp.find_step(secret, otp, self._clock.now(), used=row.totp_step)
            right = step is not None and await store.use_totp_step(tx, row.id, step)
        else:
            right = await store.use_recovery_code(tx, row.id, digest_of(otp.strip().lower()))
        if not right:
            raise LoginFailed(WRONG)

    async def admit(self, tx: Transaction, row: Any, token_name: str) -> LoggedIn:
        """A token for a machine, or a cookie for a browser."""
        now = micros(self._clock.now())
        where = origin.current().source
        if token_name:
            names.check_label(token_name, "token")
        kind = TokenKind.LOGIN if token_name else TokenKind.BROWSER
        life_s = self._settings.login_s if token_name else self._settings.browser_max_s
        secret = (TOKEN_PREFIX if token_name else COOKIE_PREFIX) + secrets.token_urlsafe(32)
        expires_at = now + micros(life_s)
        token_id = new_id()
        await self._tokens.check_count(tx, row.id, kind, now)
        await tokens.add_token(
            tx,
            token_id=token_id,
            user_id=row.id,
            name=token_name or "browser",
            digest=digest_of(secret),
            created_at=now,
            expires_at=expires_at,
            scopes=to_json(["*"]).decode(),
            kind=kind,
            source=where,
        )
        await self._journal.audit.record(
            tx,
            actor=_self(row, token_name or "browser"),
            action="login.succeeded",
            kind="user",
            id=row.id,
            name=row.name,
            after={"token": token_id},
        )
        if token_name:
            return LoggedIn(LoginReply(user=row.name, expires_at=seconds(expires_at), token=secret))
        reply = LoginReply(
            user=row.name, expires_at=seconds(expires_at), csrf=origins.csrf_of(secret)
        )
        return LoggedIn(reply, secret)

    async def logout(self, caller: Principal) -> None:
        """The token that this call came with is valid no longer."""
        await self._tokens.revoke(caller, caller.token_id)


async def unchanged(tx: Reader, seen: Any) -> Any | None:
    """The user's row now, unless password or account changed since *seen* was read."""
    row = await people.get_user_by_id(tx, seen.id)
    same = row.password == seen.password and row.disabled_at is None
    return row if same else None


def _self(row: Any, token: str) -> Actor:
    where = origin.current()
    return Actor(
        id=row.id,
        name=row.name,
        key=token,
        domain_id=row.domain_id,
        source=where.source,
        request_id=where.request_id,
    )
