"""Limits written, assigned, and looked at."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import Any, Final

from madang.kit.clock import Clock
from madang.manager.audit.service import AuditLog, actor_of
from madang.manager.db import Database, Reader, Transaction, micros, seconds
from madang.manager.http import Caller
from madang.manager.identity.types import Role
from madang.manager.limits import store
from madang.manager.limits.rules import counting
from madang.manager.limits.rules.counting import slot_name
from madang.manager.limits.rules.text import parse
from madang.manager.limits.service.keeping import LimitService
from madang.manager.limits.types import EVERY, KINDS, MONTH_SLOT, Counts, InForce, Ledger, LimitsRow
from madang.wire.errors import (
    Ambiguous,
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
)
from madang.wire.limits import AccountLimits, Limited, LimitsDraft, LimitsOf, LimitsText

HISTORY: Final = 100
MAX_NOTE: Final = 500
ME: Final = "me"
_NAME: Final = re.compile(r"[a-z][a-z0-9._-]{0,39}")
_REF: Final = re.compile(r"[^\s/:\x00-\x1f]{1,64}")
_SHARE: Final = {"cpu_milli": 1000.0}
"""By what a slot's amount is divided for showing."""


class LimitTexts:
    """Administrators change; administrators and monitors read all, others what counts for them."""

    def __init__(
        self, database: Database, audit: AuditLog, clock: Clock, service: LimitService
    ) -> None:
        self._database: Final = database
        self._audit: Final = audit
        self._clock: Final = clock
        self._service: Final = service
        self._ledger: Ledger | None = None

    def bind(self, ledger: Ledger) -> None:
        self._ledger = ledger

    # Texts

    async def page(
        self, caller: Caller, *, after: str | None, limit: int
    ) -> tuple[tuple[LimitsText, ...], str | None]:
        """Those in force, by name, and the cursor of the next page."""
        async with self._database.read() as tx:
            own = await self._own_names(tx, caller)
            rows = await store.list_page(tx, after=after, limit=limit)
            items = [await self._shown(tx, caller, row) for row in rows
                     if own is None or row.name in own]  # fmt: skip
        return tuple(items), rows[-1].name if len(rows) == limit else None

    async def get(self, caller: Caller, name: str) -> LimitsText:
        async with self._database.read() as tx:
            row = await self._get(tx, caller, name)
            return await self._shown(tx, caller, row)

    async def history(self, caller: Caller, name: str) -> tuple[LimitsText, ...]:
        """Newest first; of removed ones too, for those who see all."""
        async with self._database.read() as tx:
            if not caller.sees_all:
                await self._get(tx, caller, name)
            rows = await store.list_history(tx, name, HISTORY)
        if not rows:
            raise _no_limits(name)
        return tuple(map(_limits, rows))

    async def apply(
        self, caller: Caller, name: str, draft: LimitsDraft, version: int | None
    ) -> LimitsText:
        """Put a text in force, if *version* still is; the one in force again changes nothing."""
        _administers(caller)
        if not _NAME.fullmatch(name):
            text = f"{name[:60]!r} is no name of limits: up to 40 lower-case letters, digits, ._-"
            raise InvalidRequest(text, field="name")
        parse(draft.text)
        if len(draft.note) > MAX_NOTE or not (draft.note.isprintable() or not draft.note):
            text = f"note: at most {MAX_NOTE} printable characters on one line."
            raise InvalidRequest(text, field="note")
        async with self._database.begin() as tx:
            row = await store.find(tx, name)
            _match(name, row, version)
            if row is None or row.removed or row.text != draft.text:
                former = None if row is None or row.removed else row
                row = self._row(caller, name, draft, 1 + (row.version if row else 0))
                await store.add(tx, row)
                await self._record(tx, caller, "limits.applied", name, former, row)
            return await self._shown(tx, caller, row)

    async def remove(self, caller: Caller, name: str, version: int | None) -> None:
        """Raises Conflict while anybody has them."""
        _administers(caller)
        async with self._database.begin() as tx:
            row = await self._get(tx, caller, name)
            _match(name, row, version)
            if targets := await store.list_targets(tx, name):
                text = (
                    f"limits {name} are assigned to {len(targets)} (`madang limits show {name}`). "
                    "Give those others first: `madang limits assign`."
                )
                raise Conflict(text, targets=[each.target for each in targets[:20]])
            draft = LimitsDraft(text=row.text, note="removed")
            gone = replace(self._row(caller, name, draft, row.version + 1), removed=1)
            await store.add(tx, gone)
            await self._record(tx, caller, "limits.removed", name, row, None)

    # Assignments

    async def assign(self, caller: Caller, target: str, name: str | None) -> LimitsOf:
        """Give *target* other limits; None: none of its own."""
        _administers(caller)
        at = micros(self._clock.now())
        async with self._database.begin() as tx:
            account = await self.resolve(tx, caller, target)
            former = await store.find_target(tx, account)
            if name is None:
                if not await store.unassign(tx, account, author_id=caller.user_id, at=at):
                    raise NotFound(f"{target[:64]} has no limits of its own.")
            else:
                await self._get(tx, caller, name)
                await store.assign(
                    tx, account, name, author=caller.user, author_id=caller.user_id, at=at
                )
            await self._audit.record(
                tx,
                actor=actor_of(caller),
                action="limits.assigned",
                kind="limits",
                id=account,
                name=await self._service.shown(tx, account),
                before={"limits": None if former is None else former.name},
                after={"limits": name},
            )
            return await self._of(tx, target, (account,))

    async def of(self, caller: Caller, target: str) -> LimitsOf:
        """What counts for *target*, or for the caller's own sessions (``me``), and what is left."""
        async with self._database.read() as tx:
            if target == ME:
                accounts = await self._service.accounts(
                    tx, user=caller.user_id, project=caller.project_id, token=caller.token_id
                )
                return await self._of(tx, target, accounts)
            account = await self.resolve(tx, caller, target)
            return await self._of(tx, target, (account,))

    async def resolve(self, tx: Reader, caller: Caller, target: str) -> str:
        """``project:lab``, ``project:DOMAIN/lab``, ``token:ann/laptop``, ``user:*`` → an account.

        What the caller may not know of is not found.
        """
        kind, _, ref = target.partition(":")
        if kind not in KINDS or not ref:
            kinds = ", ".join(f"{each}:NAME" for each in KINDS)
            raise InvalidRequest(f"target: {target[:64]!r} is none of {kinds}.", field="target")
        within, slash, name = ref.rpartition("/")
        missing = NotFound(f"no {kind} {ref[:64]!r}.", target=target[:100])
        if ref == EVERY:
            if not caller.sees_all:
                raise missing
            return f"{kind}:{EVERY}"
        if not _REF.fullmatch(name) or (slash and not _REF.fullmatch(within)):
            raise missing
        ids = await store.list_ids(tx, kind, name, within if slash else None)
        accounts = [f"{kind}:{id_}" for id_ in ids]
        if not caller.sees_all:
            own = await self._own_accounts(tx, caller)
            accounts = [
                each for each in accounts if each in own or await _governs(tx, caller, each)
            ]
        if len(accounts) > 1:
            text = f"several are meant by {target[:64]!r}; write {kind}:DOMAIN/NAME or its id."
            raise Ambiguous(text, target=target[:100])
        if not accounts:
            raise missing
        return accounts[0]

    # inside

    async def _record(
        self,
        tx: Transaction,
        caller: Caller,
        action: str,
        name: str,
        before: LimitsRow | None,
        after: LimitsRow | None,
    ) -> None:
        await self._audit.record(
            tx,
            actor=actor_of(caller),
            action=action,
            kind="limits",
            id=name,
            name=name,
            before=None if before is None else _told(before),
            after=None if after is None else _told(after),
        )

    async def _of(self, tx: Reader, target: str, accounts: tuple[str, ...]) -> LimitsOf:
        assigned = await self._service.assigned(tx)
        found = []
        for by in assigned.of(accounts):
            shown = await self._service.shown(tx, by.account)
            found.append(
                AccountLimits(
                    account=by.account,
                    shown=shown,
                    name=by.name,
                    version=by.version,
                    default=by.target != by.account,
                    text=by.text,
                    counted=await self._counted(tx, by),
                )
            )
        return LimitsOf(target=target, accounts=tuple(found))

    async def _counted(self, tx: Reader, by: InForce) -> tuple[Limited, ...]:
        assert self._ledger is not None
        if by.account.endswith(f":{EVERY}"):
            return ()
        held = await self._ledger.slots(tx, by.account)
        limits = by.limits
        found = [
            _limited(slot_name(slot), limit / share, held.get(slot, 0) / share)
            for slot, limit in limits.at_once.items()
            for share in (_SHARE.get(slot, 1.0),)
        ]
        found += [
            _limited(what, limit, count)
            for what, limit, count in _counts(by, await self._ledger.count(tx, by.account))
            if limit is not None
        ]
        if limits.cpu_hours is not None:
            now = self._clock.now()
            since = micros(counting.month_of(now))
            used = await self._ledger.cpu_seconds(tx, by.account, since, micros(now))
            found.append(_limited(MONTH_SLOT, limits.cpu_hours, used / 3600))
        return tuple(found)

    async def _own_accounts(self, tx: Reader, caller: Caller) -> set[str]:
        """What is the caller's own."""
        own = await store.list_own_accounts(tx, caller.user_id)
        domain = await store.find_domain(tx, caller.project_id)
        mine = {f"user:{caller.user_id}", f"project:{caller.project_id}", f"domain:{domain}"}
        return mine.union(own)

    async def _own_names(self, tx: Reader, caller: Caller) -> set[str] | None:
        """Names of limits that count for the caller; None: it may see all."""
        if caller.sees_all:
            return None
        assigned = await self._service.assigned(tx)
        return {by.name for by in assigned.of(await self._own_accounts(tx, caller))}

    async def _get(self, tx: Reader, caller: Caller, name: str) -> LimitsRow:
        row = await store.find(tx, name)
        own = await self._own_names(tx, caller)
        if row is None or row.removed or (own is not None and name not in own):
            raise _no_limits(name)
        return row

    async def _shown(self, tx: Reader | Transaction, caller: Caller, row: LimitsRow) -> LimitsText:
        own = None if caller.sees_all else await self._own_accounts(tx, caller)
        targets = []
        for each in await store.list_targets(tx, row.name):
            kind, _, id_ = each.target.partition(":")
            if own is None or each.target in own:
                name = None if id_ == EVERY else await store.find_name(tx, each.target)
                targets.append(f"{kind}:{name or id_}")
        return replace(_limits(row), targets=tuple(targets))

    def _row(self, caller: Caller, name: str, draft: LimitsDraft, version: int) -> LimitsRow:
        return LimitsRow(
            id=0,
            name=name,
            version=version,
            text=draft.text,
            digest=hashlib.sha256(draft.text.encode()).hexdigest(),
            author_id=caller.user_id,
            author=caller.user,
            at=micros(self._clock.now()),
            note=draft.note,
            removed=0,
        )


def _told(row: LimitsRow) -> dict[str, Any]:
    return {"version": row.version, "digest": row.digest, "note": row.note}


async def _governs(tx: Reader, caller: Caller, account: str) -> bool:
    """Whether *caller* administers the domain of *account*."""
    if caller.role != Role.DOMAIN_ADMIN:
        return False
    return await store.find_domain_of(tx, account) == caller.domain_id


def _counts(by: InForce, counts: Counts) -> tuple[tuple[str, int | None, int], ...]:
    return (
        ("sessions", by.limits.sessions, counts.sessions),
        ("pending", by.limits.pending, counts.pending),
    )


def _limited(what: str, limit: float, used: float) -> Limited:
    return Limited(what=what, limit=limit, used=used, left=max(0.0, limit - used))


def _administers(caller: Caller) -> None:
    if not caller.administers:
        raise Forbidden("only an administrator changes limits.")


def _match(name: str, row: LimitsRow | None, version: int | None) -> None:
    known = 0 if row is None or row.removed else row.version
    if version is not None and version != known:
        text = f"limits {name} are at version {known}, not {version}. Look at them again."
        raise PreconditionFailed(text, version=known)


def _no_limits(name: str) -> NotFound:
    return NotFound(f"no limits {name[:40]!r}. `madang limits ls` lists them.", name=name[:40])


def _limits(row: LimitsRow) -> LimitsText:
    return LimitsText(
        name=row.name,
        version=row.version,
        text=row.text,
        digest=row.digest,
        author=row.author,
        at=seconds(row.at),
        note=row.note,
        removed=bool(row.removed),
    )
