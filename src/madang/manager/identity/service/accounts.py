"""The own password and second factor."""

from __future__ import annotations

from typing import Any, Final

from madang.kit.clock import Clock
from madang.manager.audit.service import actor_of
from madang.manager.db import Database, Transaction, micros
from madang.manager.http import Caller, origin
from madang.manager.identity.rules import names, throttle, totp
from madang.manager.identity.service.authentication import IdentityService, digest_of
from madang.manager.identity.service.journal import Journal
from madang.manager.identity.service.logins import WRONG, Logins, unchanged
from madang.manager.identity.service.vault import Vault
from madang.manager.identity.store import logins as store
from madang.manager.identity.store import people, tokens
from madang.manager.identity.types import Principal
from madang.wire.errors import Conflict, LoginFailed
from madang.wire.people import PasswordChange, RecoveryCodes, TotpDraft


class Accounts:
    def __init__(
        self,
        database: Database,
        clock: Clock,
        identity: IdentityService,
        logins: Logins,
        journal: Journal,
        vault: Vault,
    ) -> None:
        self._database: Final = database
        self._clock: Final = clock
        self._identity: Final = identity
        self._journal: Final = journal
        self._vault: Final = vault
        self._gate: Final = logins.gate
        self._passwords: Final = logins.passwords

    def _now(self) -> int:
        return micros(self._clock.now())

    async def change_password(self, caller: Principal, change: PasswordChange) -> None:
        """Ends all other logins. Raises LoginFailed if the old one is wrong."""
        names.check_password(change.new, caller.user)
        row = await self._prove(caller, change.old)
        hashed = await self._passwords.hash(change.new)
        async with self._database.begin() as tx:
            if await unchanged(tx, row) is None:
                raise Conflict("the account changed meanwhile: try again.")
            await people.change_user(tx, row, password=hashed)
            await tokens.revoke_logins(tx, row.id, self._now(), but=caller.token_id)
            await self._note(tx, caller, "user.password_changed", row)
        self._identity.forget()
        self._journal.tell()

    async def _prove(self, caller: Principal, password: str) -> Any:
        """The caller's row, once their password was right; who has none needs none."""
        async with self._database.read() as tx:
            row = await people.get_user_by_id(tx, caller.user_id)
        if row.password is None:
            return row
        counted = throttle.counters(caller.user, origin.current().source)
        await self._gate.count(counted)
        if not await self._passwords.verify(row.password, password[: names.MAX_PASSWORD]):
            await self._gate.note_failure(caller.user, LoginFailed(WRONG))
            raise LoginFailed("the present password is wrong.")
        async with self._database.begin() as tx:
            await self._gate.forgive(tx, counted)
        return row

    async def _note(self, tx: Transaction, caller: Caller, action: str, row: Any) -> None:
        await self._journal.note(tx, actor_of(caller), action, "user", row.id, row.name)

    # The second factor

    async def start_totp(self, caller: Principal, password: str) -> TotpDraft:
        """Not in force until ``confirm_totp``."""
        await self._prove(caller, password)
        secret = totp.new_secret()
        async with self._database.begin() as tx:
            row = await people.get_user_by_id(tx, caller.user_id)
            if row.totp_since is not None:
                raise Conflict("a second factor is in force: `madang totp off` first.")
            await people.change_user(
                tx, row, totp=self._vault.seal(secret, f"totp {row.id}"), totp_step=0
            )
            await self._note(tx, caller, "user.totp_started", row)
        return TotpDraft(secret=totp.show_secret(secret), uri=totp.uri(secret, caller.user))

    async def confirm_totp(self, caller: Principal, otp: str) -> RecoveryCodes:
        """The authenticator shows the right code: from now on it is needed."""
        counted = throttle.counters(caller.user, origin.current().source)
        await self._gate.count(counted)
        codes = totp.new_recovery_codes()
        async with self._database.begin() as tx:
            row = await people.get_user_by_id(tx, caller.user_id)
            if row.totp is None or row.totp_since is not None:
                raise Conflict("no second factor waits for its first code.")
            secret = self._vault.open(row.totp, f"totp {row.id}")
            step = totp.find_step(secret, otp, self._clock.now(), used=row.totp_step)
            if step is None:
                raise LoginFailed("the code is wrong; is this machine's clock right?")
            await people.change_user(tx, row, totp_since=self._now(), totp_step=step)
            await store.set_recovery_codes(tx, row.id, [digest_of(code) for code in codes])
            await self._gate.forgive(tx, counted)
            await self._note(tx, caller, "user.totp_on", row)
        self._journal.tell()
        return RecoveryCodes(codes=codes)

    async def stop_totp(self, caller: Principal, password: str) -> None:
        await self._prove(caller, password)
        async with self._database.begin() as tx:
            row = await people.get_user_by_id(tx, caller.user_id)
            await people.change_user(tx, row, totp=None, totp_since=None, totp_step=0)
            await store.set_recovery_codes(tx, row.id, [])
            await self._note(tx, caller, "user.totp_off", row)
        self._journal.tell()
