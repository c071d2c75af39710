"""Policies and sessions that run: who is told of a change, what it did, a session's own layer.

A change and the order to tell everybody are one transaction: the revision of each session that it
concerns grows, so the next desired state of its node has the new sandbox, whoever restarts
meanwhile. The agent gives a running kernel the live rules and reports their digest; the answer to
the change waits for these reports, a little. What is told late is told all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from madang.kit import policy
from madang.kit.clock import Clock
from madang.kit.codec import from_json, to_json
from madang.manager.db import Database, Reader, Transaction, micros
from madang.manager.db.events import EventFeed
from madang.manager.fleet import store as ledger
from madang.manager.fleet.service import FleetService
from madang.manager.http import Caller
from madang.manager.policy.rules import check_note, check_stricter, check_total, later
from madang.manager.policy.service import PolicyService, Sandboxes
from madang.manager.policy.types import Scope, Seat
from madang.manager.scheduling.types import wishes_of
from madang.manager.session import store
from madang.manager.session.service.agents import AgentService
from madang.manager.session.service.keeping import own_kinds
from madang.manager.session.service.kernels import not_running
from madang.manager.session.service.users import SessionService
from madang.manager.session.types import SessionRow
from madang.wire.errors import NotFound, PreconditionFailed
from madang.wire.kernel import Guarded
from madang.wire.policies import Policy, PolicyDraft, PolicyEffect
from madang.wire.policy import SESSION
from madang.wire.session import SessionSpec, SessionStatus

S = SessionStatus
CONFIRM_S: Final = 2.0
"""How long a change waits to hear that it is in force; it will be all the same."""
_NOTHING: Final = f"version = {policy.VERSION}\n"
_OVER: Final = frozenset({S.TERMINATING, S.TERMINATED})


@dataclass(frozen=True, slots=True)
class _Concerned:
    """A running session that has other live rules than it shall have."""

    row: SessionRow
    wanted: str
    """``Assignment.live``"""


class SessionPolicies:
    """``policy.types.Followers``, and the own layers of sessions."""

    def __init__(
        self,
        database: Database,
        feed: EventFeed,
        fleet: FleetService,
        agents: AgentService,
        sessions: SessionService,
        policies: PolicyService,
        clock: Clock,
    ) -> None:
        self._database: Final = database
        self._feed: Final = feed
        self._fleet: Final = fleet
        self._agents: Final = agents
        self._sessions: Final = sessions
        self._policies: Final = policies
        self._clock: Final = clock

    # --- the administrator's layers

    async def concern(self, tx: Transaction, scope: Scope) -> None:
        for name in await self._nodes(tx, scope.node):
            revision = await ledger.next_revision(tx, name)
            await store.retell(tx, name, revision, group=scope.group, project=scope.project)

    async def _nodes(self, tx: Reader, node: str | None) -> list[str]:
        if node is not None:
            return [node]
        return [each.name for each in await ledger.list_nodes(tx)]

    async def effect(self, scope: Scope, later: Sequence[str]) -> PolicyEffect:
        before = {session: report.guarded for session, report in self._agents.live.items()}
        self._feed.wake()
        for name in self._fleet.online() if scope.node is None else (scope.node,):
            self._fleet.wake(name)
        count = 0
        concerned: list[_Concerned] = []
        async with self._database.read() as tx:
            for name in await self._nodes(tx, scope.node):
                held = await store.list_placed_on(tx, name)
                running = [row for row in held if row.status == S.RUNNING and _is_in(row, scope)]
                count += len(running)
                if running:
                    sandboxes = await self._policies.sandboxes(tx, {row.seat for row in running})
                    concerned += _concerned(running, before, sandboxes)
        return await self._outcome(count, concerned, later if count else ())

    def _guarded(self, row: SessionRow) -> Guarded | None:
        """What its machine said last; None: nothing yet."""
        report = self._agents.live.get(row.id)
        return None if report is None else report.guarded

    async def _outcome(
        self, running: int, concerned: Sequence[_Concerned], later: Sequence[str]
    ) -> PolicyEffect:
        """Once all have said so, or some don't."""
        until = self._clock.monotonic() + CONFIRM_S
        while any(self._awaited(each) for each in concerned) and not self._feed.closing:
            left = until - self._clock.monotonic()
            if left <= 0:
                break
            await self._clock.wait(self._agents.heard.next(), left)
        waiting, failed, done, places = [], {}, 0, dict.fromkeys(later)
        for each in concerned:
            guarded = self._guarded(each.row)
            if guarded is None and each.row.held_by in self._fleet.online():
                continue  # it has ended
            if guarded is None or guarded.live != each.wanted:
                waiting.append(each.row.name)
            elif guarded.error:
                failed[each.row.name] = guarded.error
            else:
                done += 1
                places |= dict.fromkeys(guarded.later)
        return PolicyEffect(
            running=running,
            changed=done,
            waiting=tuple(waiting),
            failed=failed,
            later=tuple(places),
        )

    def _awaited(self, each: _Concerned) -> bool:
        """Whether its machine is there and has yet to say that it did it; what ended does not."""
        if each.row.held_by not in self._fleet.online():
            return False
        guarded = self._guarded(each.row)
        return guarded is not None and guarded.live != each.wanted

    # --- a session's own

    async def get(self, caller: Caller, ref: str) -> Policy:
        """The session's own layer in force; version 0: it has none."""
        row = await self._sessions.get(caller, ref)
        async with self._database.read() as tx:
            return await self._policies.of_session(tx, row.id, row.name, _own(row))

    async def set(
        self, caller: Caller, ref: str, draft: PolicyDraft, version: int | None
    ) -> Policy:
        """Put another own layer in force, live rules at once; only with more rules than before.

        Raises Forbidden for fewer, except for administrators; SessionNotRunning when it ends.
        """
        layer = policy.parse(draft.text, SESSION)
        check_note(draft.note)
        found = await self._sessions.get(caller, ref)
        async with self._database.begin() as tx:
            row = await store.find(tx, found.id)
            if row is None:
                raise NotFound(f"session {found.name} was removed.", ref=found.name)
            if row.status in _OVER:
                raise not_running(row)
            known = await self._policies.of_session(tx, row.id, row.name, _own(row))
            if version is not None and version != known.version:
                text = f"the policy of {row.name} is at version {known.version}, not {version}."
                raise PreconditionFailed(f"{text} Look at it again.", version=known.version)
            before = policy.parse(known.text or _NOTHING, SESSION)
            if not caller.administers:
                check_stricter(before, layer)
            if row.held_by is not None:
                sandboxes = await self._policies.sandboxes(tx, [row.seat])
                check_total(sandboxes.of(row.seat, row.image_policy, draft.text))
            if known.text != draft.text:
                row, known = await self._replace(tx, caller, row, draft)
        return replace(known, effect=await self._effect_on(row, later(before, layer)))

    async def _replace(
        self, tx: Transaction, caller: Caller, row: SessionRow, draft: PolicyDraft
    ) -> tuple[SessionRow, Policy]:
        spec = from_json(SessionSpec, row.spec)
        recorded = await self._policies.record(
            tx, caller, row.id, row.name, former=spec.policy, draft=draft
        )
        kept = replace(wishes_of(row.wishes), keeps=own_kinds(row.image_policy, draft.text))
        columns: dict[str, object] = {
            "spec": to_json(replace(spec, policy=draft.text)).decode(),
            "wishes": to_json(kept).decode(),
        }
        if row.held_by is not None:
            columns["revision"] = await ledger.next_revision(tx, row.held_by)
        at = micros(self._clock.now())
        changed = await store.change(tx, row, at=at, what="policy", **columns)
        assert changed is not None, "it was read in this transaction"
        return changed, recorded

    async def _effect_on(self, row: SessionRow, places: Sequence[str]) -> PolicyEffect:
        report = self._agents.live.get(row.id)
        before = {} if report is None else {row.id: report.guarded}
        self._feed.wake()
        if row.held_by is None or row.status != S.RUNNING:
            return PolicyEffect(running=0, changed=0)
        self._fleet.wake(row.held_by)
        async with self._database.read() as tx:
            sandboxes = await self._policies.sandboxes(tx, [row.seat])
        return await self._outcome(1, _concerned([row], before, sandboxes), places)


def _concerned(
    rows: Iterable[SessionRow], before: Mapping[str, Guarded], sandboxes: Sandboxes
) -> list[_Concerned]:
    """Those that had other live rules *before*, or could not have these."""
    known: dict[tuple[Seat, str, str], str] = {}
    found = []
    for row in rows:
        own = row.seat, row.image_policy, _own(row)
        if own not in known:
            known[own] = sandboxes.live_of(*own)
        guarded = before.get(row.id)
        if guarded is None or guarded.error or guarded.live != known[own]:
            found.append(_Concerned(row, known[own]))
    return found


def _is_in(row: SessionRow, scope: Scope) -> bool:
    """Of those on its node."""
    return scope.group in {None, row.group_name} and scope.project in {None, row.project_id}


def _own(row: SessionRow) -> str:
    return from_json(SessionSpec, row.spec).policy
