"""Reading policies and putting them in force."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from madang.kit import policy
from madang.kit.clock import Clock
from madang.manager.audit.service import AuditLog, actor_of
from madang.manager.db import Database, Reader, Transaction, micros, seconds
from madang.manager.fleet import store as fleet
from madang.manager.http import Caller
from madang.manager.policy import rules, store
from madang.manager.policy.types import (
    GROUP_PREFIX,
    NODE_PREFIX,
    PROJECT_PREFIX,
    CountRow,
    Demands,
    Followers,
    Place,
    PolicyRow,
    Seat,
)
from madang.wire.errors import Forbidden, InvalidRequest, NotFound, PreconditionFailed
from madang.wire.policies import (
    Policy,
    PolicyChange,
    PolicyDraft,
    PolicyQuestion,
    PolicyReview,
    PolicyVerdict,
    ReplayQuestion,
    ReplayVerdict,
)
from madang.wire.policy import (
    BASE,
    GROUP,
    IMAGE,
    LAYERS,
    NODE,
    PROJECT,
    SESSION,
    SITE,
    Layer,
    Refusal,
    Sandbox,
    merge,
)

HISTORY: Final = 100
"""Versions that are listed."""
FRESH_S: Final = 5.0
"""How long what was read is believed; another server's change takes as long."""


class PolicyService:
    """Everybody may read, of projects those who are in it; who administers it changes it."""

    def __init__(
        self, database: Database, audit: AuditLog, clock: Clock, widen: Collection[str]
    ) -> None:
        """*widen*: rules of the base that a policy may widen on this server."""
        self._database: Final = database
        self._audit: Final = audit
        self._clock: Final = clock
        self._widen: Final = frozenset(widen)
        self._followers: Followers | None = None
        self._demands: Demands | None = None
        self._read_at = 0.0

    def bind(self, followers: Followers) -> None:
        """Who tells running sessions; before the first change."""
        self._followers = followers

    # --- for sessions

    async def sandboxes(self, tx: Reader, seats: Iterable[Seat]) -> Sandboxes:
        """For sessions at *seats*."""
        asked = set(seats)
        targets = {target for seat in asked for target in rules.targets_of(seat).values()}
        found = [await store.find(tx, target) for target in sorted(targets)]
        groups = sorted({seat.group for seat in asked})
        texts = {name: await store.find_group_text(tx, name) for name in groups}
        accepts = {name: rules.accepted(text) for name, text in texts.items()}
        return Sandboxes({row.target: row for row in found if row is not None}, accepts)

    async def demands(self, tx: Reader) -> Demands:
        """As of a few seconds ago at most."""
        now = self._clock.monotonic()
        if self._demands is None or now - self._read_at > FRESH_S:
            found = {
                row.target: rules.kinds_in(row.text, rules.layer_of(row.target))
                for row in await store.list_in_force(tx)
            }
            self._demands = Demands({target: kinds for target, kinds in found.items() if kinds})
            self._read_at = now
        return self._demands

    # --- for people

    async def list_all(self, caller: Caller) -> tuple[Policy, ...]:
        """What is in force everywhere, of projects those that the caller sees; the base first."""
        async with self._database.read() as tx:
            rows = await store.list_in_force(tx)
            counts = await store.list_counts(tx)
            names = await self._names(tx, caller)
        found = [
            replace(_policy(row, names.get(row.target)), refused=_refused(row, counts))
            for row in rows
            if row.target in names or not row.target.startswith(PROJECT_PREFIX)
        ]
        return (_base(), *sorted(found, key=lambda each: _rank(each.target)))

    async def get(self, caller: Caller, target: str) -> Policy:
        if rules.layer_of(target) == BASE:
            return _base()
        async with self._database.read() as tx:
            place = await self._place(tx, caller, target)
            row = await store.find(tx, place.key)
            counts = await store.list_counts(tx)
        if row is None:
            return _empty(place.shown)
        return replace(_policy(row, place.shown), refused=_refused(row, counts))

    async def history(self, caller: Caller, target: str) -> tuple[Policy, ...]:
        """Newest first."""
        if rules.layer_of(target) == BASE:
            return (_base(),)
        async with self._database.read() as tx:
            place = await self._place(tx, caller, target)
            rows = await store.list_history(tx, place.key, HISTORY)
        return tuple(_policy(row, place.shown) for row in rows)

    async def log(self, caller: Caller, target: str | None, limit: int) -> tuple[PolicyChange, ...]:
        """Every change of *target* or of all, those of sessions too, newest first."""
        async with self._database.read() as tx:
            key = target
            if target is not None and target.startswith(PROJECT_PREFIX):
                place = await self._place(tx, caller, target)
                key = place.key
                allowed = place.changeable
            else:
                allowed = False
            if not (caller.sees_all or allowed):
                raise Forbidden("only an administrator reads the log of all policies.")
            rows = await store.list_log(tx, key, limit)
            names = await self._names(tx, caller)
        return tuple(
            PolicyChange(policy=_policy(row, names.get(row.target)), former=former)
            for row, former in rows
        )

    async def counts(self) -> Sequence[CountRow]:
        """What the rules in force have refused."""
        async with self._database.read() as tx:
            return await store.list_counts(tx)

    async def review(self, caller: Caller, draft: PolicyDraft) -> PolicyReview:
        """Raises PolicyInvalid."""
        layer = self._parse(draft)
        async with self._database.read() as tx:
            place = await self._place(tx, caller, draft.target)
            row = await store.find(tx, place.key)
        return rules.review(place.shown, row, layer)

    async def apply(self, caller: Caller, draft: PolicyDraft, version: int | None) -> Policy:
        """Put a text in force, if *version* still is; the one in force again changes nothing.

        The answer comes once running sessions have its live rules, or don't say so soon.
        """
        kind = rules.layer_of(draft.target)
        if not caller.administers and kind != PROJECT:
            raise Forbidden("only an administrator puts a sandbox policy in force.")
        if kind in {BASE, IMAGE, SESSION}:
            text = f"the {draft.target} layer can't be put in force"
            known_ones = "site, group:NAME, node:NAME or project:NAME"
            raise InvalidRequest(f"{text}; give {known_ones}.", field="target")
        later: tuple[str, ...] = ()
        async with self._database.begin() as tx:
            place = await self._place(tx, caller, draft.target)
            if not place.changeable:
                text = f"only who administers {place.shown} changes its sandbox policy."
                raise Forbidden(text)
            layer = self._parse(draft)
            rules.check_note(draft.note)
            row = await store.find(tx, place.key)
            known = 0 if row is None else row.version
            if version is not None and version != known:
                text = f"policy {place.shown} is at version {known}, not {version}."
                raise PreconditionFailed(f"{text} Look at it again.", version=known)
            if row is None or row.text != draft.text:
                later = rules.later_than(row, layer)
                written = replace(draft, target=place.key)
                former, row = row, self._row(caller, written, known + 1)
                await store.add(tx, row)
                await self._write(tx, caller, row, former, row.target)
                if self._followers is not None:
                    await self._followers.concern(tx, place.scope)
        effect, self._demands = None, None
        if self._followers is not None:
            effect = await self._followers.effect(place.scope, later)
        return replace(_policy(row, place.shown), effect=effect)

    async def ask(self, caller: Caller, question: PolicyQuestion) -> PolicyVerdict:
        """What would happen to a system call."""
        ordered = await self._stack(caller, question)
        return rules.verdict(ordered, question.call, question.arguments)

    async def replay(self, caller: Caller, question: ReplayQuestion) -> tuple[ReplayVerdict, ...]:
        """What would happen to what sessions did."""
        if len(question.refusals) > rules.MAX_REPLAYED:
            text = f"refusals: at most {rules.MAX_REPLAYED} at once."
            raise InvalidRequest(text, field="refusals")
        sandbox = merge(await self._stack(caller, question))
        return tuple(rules.replayed(sandbox, refusal) for refusal in question.refusals)

    async def _stack(
        self, caller: Caller, question: PolicyQuestion | ReplayQuestion
    ) -> Sequence[Layer]:
        """The layers in force where it asks about, the draft in place of its own."""
        layer = None if question.draft is None else self._parse(question.draft)
        asked = {
            SITE: SITE,
            GROUP: f"{GROUP_PREFIX}{question.group}" if question.group else "",
            NODE: f"{NODE_PREFIX}{question.node}" if question.node else "",
            PROJECT: f"{PROJECT_PREFIX}{question.project}" if question.project else "",
        }
        layers = {}
        async with self._database.read() as tx:
            for name, target in asked.items():
                place = await self._place(tx, caller, target) if target else None
                row = None if place is None else await store.find(tx, place.key)
                if row is not None:
                    layers[name] = policy.parse(row.text, name)
        if layer is not None:
            layers[layer.layer] = layer
        return [layers[name] for name in LAYERS if name in layers]

    # --- for the session slice

    async def of_session(self, tx: Reader, session: str, name: str, text: str) -> Policy:
        """The own layer *text* of a session, with who changed it last."""
        target = f"session:{name}"
        row = await store.find(tx, rules.session_target(session))
        if row is not None:
            return replace(_policy(row), target=target)
        return replace(_empty(target), version=int(bool(text)), text=text, digest=_digest(text))

    async def record(
        self,
        tx: Transaction,
        caller: Caller,
        session: str,
        name: str,
        *,
        former: str,
        draft: PolicyDraft,
    ) -> Policy:
        """Write down that a session's own layer, until now *former*, becomes another."""
        target = rules.session_target(session)
        row = await store.find(tx, target)
        if row is None and former:
            first = PolicyDraft(text=former, target=target, note="as it was started")
            row = self._row(caller, first, 1)
            await store.add(tx, row)
        before = row
        row = self._row(caller, replace(draft, target=target), 1 + (row.version if row else 0))
        await store.add(tx, row)
        await self._write(tx, caller, row, before, f"session:{name}")
        return replace(_policy(row), target=f"session:{name}")

    async def count_refusals(
        self, tx: Transaction, label: str, seat: Seat, news: Mapping[tuple[str, int], int]
    ) -> None:
        """Add what rules have refused at *seat*; *label*: of the sandbox with those rules."""
        versions, targets = rules.versions_of(label), rules.targets_of(seat)
        for (layer, line), more in news.items():
            if layer in versions:
                await store.count(tx, targets[layer], versions[layer], line, more)

    async def teller(self, seat: Seat) -> Callable[[Refusal], Refusal]:
        """What adds whose policy it was, and who can change it."""
        async with self._database.read() as tx:
            project = await store.find_project_by_id(tx, seat.project)
            admins = await store.list_project_admins(tx, seat.project)
        name = seat.project if project is None else project.name
        return partial(rules.told, seat=seat, project=name, admins=tuple(admins))

    # --- inside

    async def _write(
        self, tx: Transaction, caller: Caller, row: PolicyRow, former: PolicyRow | None, name: str
    ) -> None:
        """To the audit log; the texts themselves are kept with the versions."""
        await self._audit.record(
            tx,
            actor=actor_of(caller),
            action="policy.applied",
            kind="policy",
            id=row.target,
            name=name,
            before=None if former is None else _summary(former),
            after={**_summary(row), "note": row.note},
        )

    def _parse(self, draft: PolicyDraft) -> Layer:
        layer = rules.layer_of(draft.target)
        if layer == BASE:
            raise InvalidRequest("the base layer is part of Madang itself.", field="target")
        return rules.check_widen(policy.parse(draft.text, layer), self._widen)

    async def _place(self, tx: Reader, caller: Caller, target: str) -> Place:
        """Raises NotFound for what nobody has seen, and what the caller doesn't see."""
        if rules.layer_of(target) == PROJECT:
            return await self._project(tx, caller, target.removeprefix(PROJECT_PREFIX))
        place = rules.plain_place(target, administers=caller.administers)
        node, group = place.scope.node, place.scope.group
        if node is not None and await fleet.find_node(tx, node) is None:
            raise NotFound(f"no node {node[:64]!r}.", node=node[:64])
        if group is not None and not await store.has_group(tx, group):
            raise NotFound(f"no group {group[:64]!r}.", group=group[:64])
        return place

    async def _project(self, tx: Reader, caller: Caller, named: str) -> Place:
        domain, _, name = named.rpartition("/")
        where = {"domain": domain} if domain else {"domain_id": caller.domain_id}
        row = await store.find_project(tx, caller.user_id, name, **where)
        if row is None or not rules.sees_project(caller, row):
            raise NotFound(f"no project {named[:64]!r}.", project=named[:64])
        return rules.project_place(caller, row)

    async def _names(self, tx: Reader, caller: Caller) -> dict[str, str]:
        """Stored target → as the caller names it, of projects that they see."""
        places = [
            rules.project_place(caller, row)
            for row in await store.list_projects(tx, caller.user_id)
            if rules.sees_project(caller, row)
        ]
        return {place.key: place.shown for place in places}

    def _row(self, caller: Caller, draft: PolicyDraft, version: int) -> PolicyRow:
        return PolicyRow(
            id=0,
            target=draft.target,
            version=version,
            text=draft.text,
            digest=_digest(draft.text),
            author_id=caller.user_id,
            author=caller.user,
            at=micros(self._clock.now()),
            note=draft.note,
        )


class Sandboxes:
    """What sessions get, at one moment."""

    def __init__(
        self, rows: Mapping[str, PolicyRow], accepts: Mapping[str, tuple[str, ...]]
    ) -> None:
        """*rows*: by target, *accepts*: by group, of all seats that it is asked about."""
        self._rows: Final = rows
        self._accepts: Final = accepts

    def of(self, seat: Seat, image: str, session: str) -> Sandbox:
        """*image*, *session*: the texts of these layers; empty: none."""
        targets = rules.targets_of(seat).values()
        found = [self._rows[target] for target in targets if target in self._rows]
        return rules.sandbox_of(found, image, session, self._accepts.get(seat.group, ()))

    def live_of(self, seat: Seat, image: str, session: str) -> str:
        """Names the live rules of that sandbox; none: empty."""
        return rules.live_digest(self.of(seat, image, session))


def _refused(row: PolicyRow, counts: Sequence[CountRow]) -> dict[str, int]:
    return {str(each.line): each.refused for each in counts if each.target == row.target}


def _summary(row: PolicyRow) -> dict[str, Any]:
    return {"version": row.version, "digest": row.digest}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _base() -> Policy:
    text = policy.BASE_TEXT
    return Policy(target=BASE, version=policy.VERSION, text=text, digest=_digest(text))


def _empty(target: str) -> Policy:
    return Policy(target=target, version=0, text="", digest=_digest(""))


def _rank(target: str) -> tuple[int, str]:
    return LAYERS.index(rules.layer_of(target)), target


def _policy(row: PolicyRow, shown: str | None = None) -> Policy:
    return Policy(
        target=shown or row.target,
        version=row.version,
        text=row.text,
        digest=row.digest,
        author=row.author,
        at=seconds(row.at),
        note=row.note,
    )
