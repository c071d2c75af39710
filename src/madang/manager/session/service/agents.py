"""What agents are told, and what they say. A report counts only if it is about the row's kernel."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

from madang.kit.broadcast import Broadcast
from madang.kit.clock import Clock
from madang.kit.codec import from_json, to_json
from madang.manager.db import Database, Transaction, micros
from madang.manager.db.events import EventFeed
from madang.manager.fleet import store as ledger
from madang.manager.policy.rules import news_of
from madang.manager.session import store
from madang.manager.session.rules import assignment_of, frost_news
from madang.manager.session.service import moves
from madang.manager.session.types import Images, Policies, SessionRow, SessionSettings
from madang.manager.usage.service import UsageService
from madang.manager.usage.types import AGENT, MANAGER
from madang.wire.kernel import Desired, Hello, KernelReport, KernelState
from madang.wire.session import Reason, SessionStatus

log = logging.getLogger(__name__)
S = SessionStatus

_BEFORE_RUNNING: Final = frozenset({S.SCHEDULED, S.PREPARING})


class AgentService:
    """``fleet.Duties``."""

    def __init__(
        self,
        database: Database,
        feed: EventFeed,
        images: Images,
        policies: Policies,
        usage: UsageService,
        clock: Clock,
        settings: SessionSettings,
    ) -> None:
        self._database: Final = database
        self._usage: Final = usage
        self._feed: Final = feed
        self._images: Final = images
        self._policies: Final = policies
        self._clock: Final = clock
        self._settings: Final = settings
        self.live: Final[dict[str, KernelReport]] = {}
        """Newest report of each unfinished session: usage is shown, not stored."""
        self.heard: Final = Broadcast()
        """Some agent has reported."""

    async def desired(self, node: str, since: int | None) -> Desired | None:
        """Read the revision first: what is newer comes again with the next delta."""
        keep = None if since is not None else await self._images.wanted_layers()
        async with self._database.read() as tx:
            known = await ledger.find_node(tx, node)
            if known is None or known.revision == since:
                return None
            rows = await store.list_held(tx, node, -1 if since is None else since)
            sandboxes = await self._policies.sandboxes(tx, {row.seat for row in rows})
            forget = () if since is None else await ledger.list_forgotten(tx, node, since)
        return Desired(
            revision=known.revision,
            full=since is None,
            set=tuple(assignment_of(row, self._settings, sandboxes) for row in rows),
            forget=tuple(forget),
            keep_layers=keep,
        )

    async def prune(self, node: str, upto: int) -> None:
        """Forgotten kernels; one that is reported all the same is forgotten, and told, anew."""
        async with self._database.begin() as tx:
            await ledger.prune_forgotten(tx, node, upto)

    async def adopt(self, hello: Hello) -> None:
        """Take the inventory as truth: what began there and is no longer there is lost."""
        await self.observe(hello.node, hello.inventory)
        there = {report.kernel for report in hello.inventory}
        async with self._database.read() as tx:
            rows = await store.list_placed_on(tx, hello.node)
        gone = [row for row in rows if row.kernel not in there and row.status != S.SCHEDULED]
        for row in gone:
            ended = moves.lost(f"{hello.node} came back and knows nothing of it.")
            async with self._database.begin() as tx:
                if (current := await store.find(tx, row.id)) and current.kernel == row.kernel:
                    at = micros(self._clock.now())
                    await moves.end(tx, current, ended, at=at, actor="agent", keep=False)
        self._feed.wake()

    async def observe(self, node: str, reports: Sequence[KernelReport]) -> None:
        for report in reports:
            await self._take(node, report)
        self.heard.notify()

    async def _take(self, node: str, report: KernelReport) -> None:
        async with self._database.read() as tx:
            row = await store.find(tx, report.kernel.session)
        if row is not None and _same(row, node, report) and not _news(row, report):
            self._remember(row, report)
            return
        async with self._database.begin() as tx:
            row = await store.find(tx, report.kernel.session)
            if row is None or not _same(row, node, report):
                await self._disown(tx, row, node, report)
                row = None
            else:
                row = await self._count(tx, row, report)
                row = await self._apply(tx, row, report) or row
        if row is not None:
            self._remember(row, report)
        self._feed.wake()

    def _remember(self, row: SessionRow, report: KernelReport) -> None:
        if row.status == S.TERMINATED:
            self.live.pop(row.id, None)
        else:
            self.live[row.id] = report

    def forget(self, session_id: str) -> None:
        self.live.pop(session_id, None)

    async def _disown(
        self, tx: Transaction, row: SessionRow | None, node: str, report: KernelReport
    ) -> None:
        """Not this row's kernel: the node shall remove it."""
        if row is not None and row.held_by == node and row.kernel == report.kernel:
            log.warning("report with a wrong nonce", extra={"kernel": report.kernel, "node": node})
            return
        await self._usage.hear(tx, node, report)
        await ledger.forget(tx, node, report.kernel, micros(self._clock.now()))

    async def _apply(
        self, tx: Transaction, row: SessionRow, report: KernelReport
    ) -> SessionRow | None:
        at = micros(self._clock.now())
        match report.state:
            case KernelState.PREPARING if row.status == S.SCHEDULED:
                return await moves.advance(tx, row, S.PREPARING, at=at, cause="being prepared")
            case KernelState.RUNNING if row.status in _BEFORE_RUNNING:
                began = at if report.started_at is None else micros(report.started_at)
                return await moves.advance(
                    tx, row, S.RUNNING, at=at, cause="started", started_at=began, **_facts(report)
                )
            case KernelState.RUNNING if row.status == S.RUNNING:
                return await self._follow_frost(tx, row, report, at)
            case KernelState.ENDED:
                ended = report.ended or moves.lost("nobody saw how it ended.")
                columns = _facts(report)
                if row.started_at is None and ended.reason is not Reason.START_FAILED:
                    columns["started_at"] = moves.to_stored(report.started_at)
                by = MANAGER if report.ended is None else AGENT
                return await moves.end(
                    tx, row, ended, at=at, actor="agent", by=by, log_end=report.log_end, **columns
                )
            case _:
                return None

    async def _count(self, tx: Transaction, row: SessionRow, report: KernelReport) -> SessionRow:
        """What its policy has refused since the last report, by rule."""
        if not _refused_more(row, report):
            return row
        label = report.guarded.label or report.enforced.get("policy", "")
        news = news_of(from_json(dict[str, int], row.refused), report.refused)
        await self._policies.count_refusals(tx, label, row.seat, news)
        return await store.count_refused(tx, row, to_json(report.refused).decode())

    async def _follow_frost(
        self, tx: Transaction, row: SessionRow, report: KernelReport, at: int
    ) -> SessionRow | None:
        """The agent knows: no new revision for it."""
        news = frost_news(row.frozen_at, row.freeze_revision, report)
        if news is None:
            return None
        what = "thawed" if news[0] is None else "frozen"
        return await store.change(
            tx, row, at=at, what=what, frozen_at=news[0], freeze_revision=news[1]
        )


def _same(row: SessionRow, node: str, report: KernelReport) -> bool:
    return row.held_by == node and row.kernel == report.kernel and row.nonce == report.nonce


def _news(row: SessionRow, report: KernelReport) -> bool:
    """Whether the report asks for a move, or counts refusals."""
    if _refused_more(row, report):
        return True
    match report.state:
        case KernelState.PREPARING:
            return row.status == S.SCHEDULED
        case KernelState.RUNNING:
            known = row.status == S.RUNNING
            frost = known and frost_news(row.frozen_at, row.freeze_revision, report) is not None
            return frost or row.status in _BEFORE_RUNNING
        case KernelState.ENDED:
            return row.status != S.TERMINATED


def _refused_more(row: SessionRow, report: KernelReport) -> bool:
    return bool(report.refused) and to_json(report.refused).decode() != row.refused


def _facts(report: KernelReport) -> dict[str, Any]:
    return {
        "enforced": to_json(report.enforced).decode(),
        "warnings": to_json(report.warnings).decode(),
    }
