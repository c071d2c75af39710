"""Writing audit records, reading them, and cutting off the oldest."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from madang.kit.clock import Clock
from madang.manager.audit import rules, store
from madang.manager.audit.types import HOST, Actor, AuditSettings, actor_of, madang, stranger
from madang.manager.db import Database, Transaction, micros
from madang.manager.http import Caller
from madang.wire.audit import (
    CUT,
    AuditHead,
    AuditRecord,
    digest_of,
    first_line,
    last_line,
    record_line,
)
from madang.wire.errors import Forbidden

__all__ = ["HOST", "Actor", "AuditLog", "AuditSettings", "actor_of", "madang", "stranger"]

DOMAIN_ADMIN: Final = "domain_admin"
_FOREVER: Final = 2**62


class AuditLog:
    """See the package."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database: Final = database
        self._clock: Final = clock
        self._head: AuditHead | None = None
        """As last seen; after a rollback, or with another server, it may be out of date."""

    async def record(
        self,
        tx: Transaction,
        *,
        actor: Actor,
        action: str,
        kind: str,
        id: str,  # noqa: A002 - the word of the record
        name: str,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
        domain: str | None = None,
    ) -> None:
        """In the transaction of the change itself. Fields that ``rules.FIELDS`` lacks are hidden.

        *domain*: of the object, where it is not the actor's.
        """
        values: dict[str, Any] = {
            "at_us": micros(self._clock.now()),
            "actor_id": actor.id,
            "actor": rules.label(actor.name),
            "key": rules.label(actor.key),
            "domain": actor.domain_id if domain is None else domain,
            "action": action,
            "kind": kind,
            "id": rules.label(id),
            "name": rules.label(name),
            "before": rules.shown(kind, before),
            "after": rules.shown(kind, after),
            "source": rules.label(actor.source),
            "request_id": actor.request_id,
        }
        fresh = _put_behind(self._head or await store.read_head(tx), values)
        if not await store.advance(tx, values, fresh):
            fresh = _put_behind(await store.read_head(tx), values)
            moved = await store.advance(tx, values, fresh)
            assert moved, "writers take turns"
        await store.add(tx, values, fresh)
        self._head = AuditHead(count=values["seq"], digest=fresh)

    # Reading

    async def head(self, caller: Caller) -> AuditHead:
        """Raises Forbidden."""
        _check_sees_all(caller)
        async with self._database.read() as tx:
            return await store.read_head(tx)

    async def list(
        self,
        caller: Caller,
        *,
        actor: str | None = None,
        action: str | None = None,
        kind: str | None = None,
        subject: str | None = None,
        since: float | None = None,
        until: float | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> list[AuditRecord]:
        """Newest first; to administrators of a domain, what concerns it. Raises Forbidden."""
        if not caller.sees_all and caller.role != DOMAIN_ADMIN:
            raise Forbidden("the audit log is for administrators and monitors.")
        async with self._database.read() as tx:
            return await store.list_newest(
                tx,
                domain=None if caller.sees_all else caller.domain_id,
                actor=actor,
                action=action,
                kind=kind,
                subject=subject,
                since=0 if since is None else micros(since),
                until=_FOREVER if until is None else micros(until),
                before=_FOREVER if before is None else before,
                limit=limit,
            )

    async def export(self, caller: Caller) -> AsyncIterator[bytes]:
        """The lines of ``wire.audit``, some at a time, up to the head of this moment."""
        head = await self.head(caller)
        yield first_line(head)
        at = head.cut
        while at < head.count:
            async with self._database.read() as tx:
                page = await store.list_from(tx, after=at, upto=head.count)
            if not page:
                break  # records are missing; who verifies sees it
            yield b"".join(map(record_line, page))
            at = page[-1].seq
        yield last_line(head)

    # Retention

    async def cut(self, keep_s: float) -> int:
        """Remove records older than *keep_s*, and write down that; how many went."""
        before = micros(self._clock.now() - keep_s)
        async with self._database.read() as tx:
            if await store.last_old(tx, before) is None:
                return 0
        async with self._database.begin() as tx:
            found = await store.last_old(tx, before)
            if found is None:
                return 0
            upto, digest = found
            removed = {"count": upto, "digest": digest}
            actor = madang("retention")
            await self.record(
                tx, actor=actor, action=CUT, kind="audit", id="audit", name="audit", after=removed
            )
            return await store.cut(tx, upto, digest)

    async def newest(self) -> AuditHead:
        """For the server's own log."""
        async with self._database.read() as tx:
            return await store.read_head(tx)


def _put_behind(head: AuditHead, values: dict[str, Any]) -> str:
    """Make *values* those of the record after *head*; its digest."""
    values |= {"seq": head.count + 1, "previous": head.digest}
    return digest_of(values)


def _check_sees_all(caller: Caller) -> None:
    if not caller.sees_all:
        raise Forbidden("the whole audit log is for administrators and monitors.")
