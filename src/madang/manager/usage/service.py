"""Reading the ledger, correcting it, and what things cost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final

from madang.kit.clock import Clock
from madang.manager.audit.service import AuditLog, actor_of
from madang.manager.db import Database, Reader, Transaction, micros, seconds
from madang.manager.http import Caller
from madang.manager.usage import rules, store
from madang.manager.usage.types import ADMIN, AGENT, MANAGER, PriceRow, Slot, UsageRow
from madang.wire.errors import Ambiguous, Conflict, Forbidden, InvalidRequest, NotFound
from madang.wire.kernel import KernelReport, KernelState
from madang.wire.session import Reason
from madang.wire.usage import Bill, Correction, Interval, IntervalPage, Price, UsageReport

KEYS: Final = ("user", "project", "domain", "group", "month", "session", "node")
"""What a report may be broken down by."""
MAX_REASON: Final = 500
_UNSEEN: Final = frozenset({Reason.LOST, Reason.NODE_LOST})


class UsageService:
    """Everybody reads their own, and what ``identity.store.visible`` adds to it."""

    def __init__(self, database: Database, audit: AuditLog, clock: Clock) -> None:
        self._database: Final = database
        self._audit: Final = audit
        self._clock: Final = clock

    # For limits

    async def used(self, tx: Reader, account: str, slot: str, since_us: int, now_us: int) -> float:
        """Seconds × what ``user:ID``, ``project:ID``, ``domain:ID`` or ``token:ID`` had of *slot*.

        In cores, bytes or processes; what goes on is counted until *now_us*.
        """
        kind, _, ref = account.partition(":")
        which = Slot(slot)
        found = await store.used(tx, kind, ref, which, since=since_us, now=now_us)
        return found / 1_000_000 / (which.unit if which is Slot.CPU else 1)

    async def cpu_seconds(self, tx: Reader, account: str, since_us: int, now_us: int) -> float:
        """Core-seconds allocated."""
        return await self.used(tx, account, Slot.CPU, since_us, now_us)

    # Reading

    async def report(
        self,
        caller: Caller,
        *,
        by: Sequence[str],
        since: float | None = None,
        until: float | None = None,
        project: str | None = None,
        **where: str | None,
    ) -> UsageReport:
        """Sums by *by*; *where*: ``user``, ``group``, ``node``, ``session``."""
        if unknown := [key for key in by if key not in KEYS]:
            text = f"by: {unknown[0][:40]!r} is none of {', '.join(KEYS)}."
            raise InvalidRequest(text, field="by")
        now = micros(self._clock.now())
        end = now if until is None else micros(until)
        start = None if since is None else micros(since)
        async with self._database.read() as tx:
            prices = rules.Prices(await store.list_prices(tx))
            projects, domains = await store.project_names(tx), await store.domain_names(tx)
            project_id = await _project_id(tx, project)
        named = [_namer(key, projects, domains) for key in by]
        summing = rules.Summing(by, since=start, until=end, now=now, prices=prices)
        which = store.Filter(until=end, project_id=project_id, **where)
        async for row in self._rows(caller, which, start):
            summing.add(row, [name(row) for name in named])
        return UsageReport(
            since=since,
            until=seconds(end),
            by=tuple(by),
            lines=summing.lines(),
            total=summing.total.line({}),
        )

    async def bill(self, caller: Caller, project: str, month: str) -> Bill:
        """Of what the caller may see of a project."""
        start, end = rules.month_bounds(month)
        now = micros(self._clock.now())
        async with self._database.read() as tx:
            prices = rules.Prices(await store.list_prices(tx))
            project_id = await _project_id(tx, project)
        billing = rules.Billing(start, end, now, prices)
        which = store.Filter(until=end, project_id=project_id)
        async for row in self._rows(caller, which, start):
            billing.add(row)
        return billing.bill(project, month)

    async def _rows(
        self, caller: Caller, which: store.Filter, since: int | None
    ) -> AsyncIterator[Any]:
        """Those in force that reach beyond *since*; others have their turn between the pages."""
        opened: set[str] = set()
        async with self._database.read() as tx:
            at = ""
            while page := await store.list_open(tx, caller, which, after=at):
                for row in page:
                    opened.add(row.id)
                    yield row
                at = page[-1].id
                await asyncio.sleep(0)
            after = (0 if since is None else since, "\uffff")
            while page := await store.list_closed(tx, caller, which, after=after):
                for row in page:
                    if row.id not in opened:  # it has ended meanwhile
                        yield row
                after = (page[-1].ended_at, page[-1].id)
                await asyncio.sleep(0)

    async def page(
        self,
        caller: Caller,
        *,
        since: float | None = None,
        until: float | None = None,
        project: str | None = None,
        corrected: bool = False,
        after: str | None = None,
        limit: int = 100,
        **where: str | None,
    ) -> IntervalPage:
        """Rows of the ledger, newest sessions first."""
        async with self._database.read() as tx:
            project_id = await _project_id(tx, project)
            end = micros(self._clock.now() if until is None else until)
            rows = await store.list_page(
                tx,
                caller,
                store.Filter(until=end + 1, project_id=project_id, **where),
                since=None if since is None else micros(since),
                corrected=corrected,
                after=after,
                limit=limit,
            )
            projects = await store.project_names(tx)
        items = tuple(_interval(row, projects) for row in rows)
        return IntervalPage(items=items, next=items[-1].id if len(items) == limit else None)

    # Correcting

    async def correct(self, caller: Caller, interval_id: str, correction: Correction) -> Interval:
        """A new row in the place of one that is closed and in force; administrators only.

        Raises Forbidden, NotFound, Conflict.
        """
        if not caller.administers:
            raise Forbidden("only an administrator corrects the usage ledger.")
        reason = correction.reason.strip()
        if not reason or len(reason) > MAX_REASON or not reason.isprintable():
            text = f"reason: say why, in at most {MAX_REASON} printable characters."
            raise InvalidRequest(text, field="reason")
        at = micros(self._clock.now())
        async with self._database.begin() as tx:
            row = await self._correctable(tx, interval_id)
            given = correction.ended_at
            end = row.started_at if given is None else rules.time_of(given, "ended_at")
            if not row.started_at <= end <= at:
                text = "ended_at: not before the interval began, and not in the future."
                raise InvalidRequest(text, field="ended_at")
            was = rules.iso(row.ended_at or row.started_at)
            fresh = await store.correct(tx, row, ended_at=end, by=ADMIN, reason=reason, at=at)
            await self._audit.record(
                tx,
                actor=actor_of(caller),
                action="usage.corrected",
                kind="usage",
                id=fresh.id,
                name=row.session,
                before={"ended_at": was},
                after={"ended_at": rules.iso(end), "corrects": row.id, "reason": reason},
                domain=row.domain_id,
            )
            projects = await store.project_names(tx)
        return _interval(fresh, projects)

    async def _correctable(self, tx: Reader, interval_id: str) -> UsageRow:
        row = await store.find(tx, interval_id)
        if row is None:
            text = f"no interval {interval_id[:60]!r}. `madang usage ls` lists them."
            raise NotFound(text, ref=interval_id[:60])
        if row.ended_at is None:
            text = f"interval {row.id} goes on; it can be corrected once its session has ended."
            raise Conflict(text, interval=row.id)
        now = await store.find_run(tx, row.session_id, row.attempt)
        assert now is not None, "one of a run's rows is in force"
        if now.id != row.id:
            text = f"interval {row.id} was corrected already; correct {now.id}."
            raise Conflict(text, interval=now.id)
        return row

    async def hear(self, tx: Transaction, node: str, report: KernelReport) -> None:
        """A machine says how a run ended that the manager had closed for it."""
        ended = report.ended
        if report.state is not KernelState.ENDED or ended is None or ended.reason in _UNSEEN:
            return
        row = await store.find_run(tx, report.kernel.session, report.kernel.attempt)
        if row is None or (row.node, row.nonce) != (node, report.nonce) or row.ended_at is None:
            return
        if row.closed_by != MANAGER or ended.duration_s <= 0:
            return
        at = micros(self._clock.now())
        end = min(row.started_at + micros(ended.duration_s), at)
        text = f"{node} came back and said when it ended"
        await store.correct(
            tx, row, ended_at=end, by=AGENT, reason=text, at=at, measured=rules.measured_of(ended)
        )

    # Prices

    async def prices(self) -> tuple[Price, ...]:
        """All that were ever set, in the order in which they were."""
        async with self._database.read() as tx:
            return tuple(map(_price, await store.list_prices(tx)))

    async def set_price(self, caller: Caller, price: Price) -> Price:
        """From a time on; administrators only. Raises Forbidden, InvalidRequest."""
        if not caller.administers:
            raise Forbidden("only an administrator sets prices.")
        rules.check_price(price.price, price.currency)
        if price.slot not in tuple(Slot):
            text = f"slot: {price.slot[:40]!r} is none of {', '.join(Slot)}."
            raise InvalidRequest(text, field="slot")
        if not 1 <= len(price.group) <= 64 or not price.group.isprintable():
            raise InvalidRequest("group: 1 to 64 printable characters, or *.", field="group")
        at = micros(self._clock.now())
        row = PriceRow(
            id=0,
            group_name=price.group,
            slot=price.slot,
            price=price.price,
            currency=price.currency,
            valid_from=rules.time_of(price.valid_from, "valid_from") or at,
            author=caller.user,
            at=at,
        )
        async with self._database.begin() as tx:
            await store.add_price(tx, row)
            await self._audit.record(
                tx,
                actor=actor_of(caller),
                action="price.set",
                kind="price",
                id=f"{price.group}/{price.slot}",
                name=f"{price.group} {price.slot}",
                after={
                    "price": price.price,
                    "currency": price.currency,
                    "valid_from": rules.iso(row.valid_from),
                },
            )
        return _price(row)


def _namer(
    key: str, projects: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[[Any], str]:
    """What a row has for *key*; of a month, which cuts it, nothing."""
    match key:
        case "project":
            return lambda row: projects.get(row.project_id, row.project_id) or "-"
        case "domain":
            return lambda row: domains.get(row.domain_id, row.domain_id) or "-"
        case "month":
            return lambda _row: ""
        case "group":
            return lambda row: str(row.group_name)
        case _:
            return attrgetter(key)


async def _project_id(tx: Reader, ref: str | None) -> str | None:
    """Raises Ambiguous. One that nobody knows is looked for as it is: there is nothing of it."""
    if ref is None:
        return None
    found = await store.find_projects(tx, ref)
    if len(found) > 1:
        ids = ", ".join(each.id for each in found)
        raise Ambiguous(
            f"several projects are named {ref[:60]!r}; give an id: {ids}.", ref=ref[:60]
        )
    return str(found[0].id) if found else ref


def _price(row: PriceRow) -> Price:
    return Price(
        group=row.group_name,
        slot=row.slot,
        price=row.price,
        currency=row.currency,
        valid_from=seconds(row.valid_from),
        author=row.author,
    )


def _interval(row: UsageRow, projects: dict[str, str]) -> Interval:
    return Interval(
        id=row.id,
        session_id=row.session_id,
        session=row.session,
        kind=row.kind,
        attempt=row.attempt,
        node=row.node,
        user=row.user,
        project=projects.get(row.project_id, row.project_id),
        group=row.group_name,
        cpu=row.cpu_milli / 1000,
        mem_bytes=row.mem_bytes,
        disk_bytes=row.disk_bytes,
        pids=row.pids,
        started_at=seconds(row.started_at),
        ended_at=None if row.ended_at is None else seconds(row.ended_at),
        closed_by=row.closed_by,
        cpu_s=None if row.cpu_us is None else seconds(row.cpu_us),
        mem_peak_bytes=row.mem_peak_bytes,
        disk_used_bytes=row.disk_used_bytes,
        received_bytes=row.received_bytes,
        sent_bytes=row.sent_bytes,
        corrects=row.corrects,
        reason=row.reason,
    )
