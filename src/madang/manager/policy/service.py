"""Reading policies and putting them in force."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from madang.kit import policy
from madang.kit.clock import Clock
from madang.manager.audit.service import AuditLog, actor_of
from madang.manager.db import Database, Reader, Transaction, micros, seconds
from madang.manager.fleet import store as fleet
from madang.manager.http import Caller
from madang.manager.policy import rules, store
from madang.manager.policy.types import NODE_PREFIX, CountRow, Followers, PolicyRow
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
from madang.wire.policy import BASE, IMAGE, LAYERS, SESSION, SITE, Layer, Sandbox, merge

HISTORY: Final = 100
"""Versions that are listed."""


class PolicyService:
    """Everybody may read; administrators change."""

    def __init__(
        self, database: Database, audit: AuditLog, clock: Clock, widen: Collection[str]
    ) -> None:
        """*widen*: rules of the base that a policy may widen on this server."""
        self._database: Final = database
        self._audit: Final = audit
        self._clock: Final = clock
        self._widen: Final = frozenset(widen)
        self._followers: Followers | None = None

    def bind(self, followers: Followers) -> None:
        """Who tells running sessions; before the first change."""
        self._followers = followers

    # --- for sessions

    async def rows_for(self, tx: Reader, node: str) -> list[PolicyRow]:
        """What is in force on a node, in the order of the layers."""
        target = rules.node_target(node)
        found = await store.find_two(tx, SITE, target)
        return [found[name] for name in (SITE, target) if name in found]

    async def sandboxes(self, tx: Reader, node: str) -> Sandboxes:
        return Sandboxes(await self.rows_for(tx, node))

    # --- for people

    async def list(self) -> tuple[Policy, ...]:
        """What is in force everywhere, the base first."""
        async with self._database.read() as tx:
            rows = await store.list_in_force(tx)
            counts = await store.list_counts(tx)
        found = [replace(_policy(row), refused=_refused(row, counts)) for row in rows]
        return (_base(), *sorted(found, key=lambda each: each.target != SITE))

    async def get(self, target: str) -> Policy:
        if rules.layer_of(target) == BASE:
            return _base()
        async with self._database.read() as tx:
            row = await self._find(tx, target)
            counts = await store.list_counts(tx)
        return replace(_policy(row), refused=_refused(row, counts)) if row else _empty(target)

    async def history(self, target: str) -> tuple[Policy, ...]:
        """Newest first."""
        if rules.layer_of(target) == BASE:
            return (_base(),)
        async with self._database.read() as tx:
            await self._find(tx, target)
            rows = await store.list_history(tx, target, HISTORY)
        return tuple(map(_policy, rows))

    async def log(self, target: str | None, limit: int) -> tuple[PolicyChange, ...]:
        """Every change of *target* or of all, those of sessions too, newest first."""
        async with self._database.read() as tx:
            rows = await store.list_log(tx, target, limit)
        return tuple(PolicyChange(policy=_policy(row), former=former) for row, former in rows)

    async def counts(self) -> Sequence[CountRow]:
        """What the rules in force have refused."""
        async with self._database.read() as tx:
            return await store.list_counts(tx)

    async def review(self, draft: PolicyDraft) -> PolicyReview:
        """Raises PolicyInvalid."""
        layer = self._parse(draft)
        async with self._database.read() as tx:
            row = await self._find(tx, draft.target)
        return rules.review(draft.target, row, layer)

    async def apply(self, caller: Caller, draft: PolicyDraft, version: int | None) -> Policy:
        """Put a text in force, if *version* still is; the one in force again changes nothing.

        The answer comes once running sessions have its live rules, or don't say so soon.
        """
        if not caller.administers:
            raise Forbidden("only an administrator puts a sandbox policy in force.")
        if rules.layer_of(draft.target) in {BASE, IMAGE, SESSION}:
            text = f"the {draft.target} layer can't be put in force; give site or node:NAME."
            raise InvalidRequest(text, field="target")
        layer = self._parse(draft)
        rules.check_note(draft.note)
        node = draft.target.removeprefix(NODE_PREFIX) if draft.target != SITE else None
        later: tuple[str, ...] = ()
        async with self._database.begin() as tx:
            row = await self._find(tx, draft.target)
            known = 0 if row is None else row.version
            if version is not None and version != known:
                text = f"policy {draft.target} is at version {known}, not {version}."
                raise PreconditionFailed(f"{text} Look at it again.", version=known)
            if row is None or row.text != draft.text:
                later = rules.later_than(row, layer)
                former, row = row, self._row(caller, draft, known + 1)
                await store.add(tx, row)
                await self._write(tx, caller, row, former, row.target)
                if self._followers is not None:
                    await self._followers.concern(tx, node)
        effect = None if self._followers is None else await self._followers.effect(node, later)
        return replace(_policy(row), effect=effect)

    async def ask(self, question: PolicyQuestion) -> PolicyVerdict:
        """What would happen to a system call."""
        ordered = await self._stack(question.draft, question.node)
        return rules.verdict(ordered, question.call, question.arguments)

    async def replay(self, question: ReplayQuestion) -> tuple[ReplayVerdict, ...]:
        """What would happen to what sessions did."""
        if len(question.refusals) > rules.MAX_REPLAYED:
            text = f"refusals: at most {rules.MAX_REPLAYED} at once."
            raise InvalidRequest(text, field="refusals")
        sandbox = merge(await self._stack(question.draft, question.node))
        return tuple(rules.replayed(sandbox, refusal) for refusal in question.refusals)

    async def _stack(self, draft: PolicyDraft | None, node: str) -> Sequence[Layer]:
        """The layers in force on *node*, the draft in place of its own."""
        layer = None if draft is None else self._parse(draft)
        async with self._database.read() as tx:
            rows = await self.rows_for(tx, node)
        layers = {rules.layer_of(r.target): policy.parse(r.text, rules.layer_of(r.target))
                  for r in rows}  # fmt: skip
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
        self, tx: Transaction, label: str, node: str, news: Mapping[tuple[str, int], int]
    ) -> None:
        """Add what rules have refused on *node*; *label*: of the sandbox with those rules."""
        versions = rules.versions_of(label)
        for (layer, line), more in news.items():
            if layer in versions:
                target = layer if layer == SITE else rules.node_target(node)
                await store.count(tx, target, versions[layer], line, more)

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

    async def _find(self, tx: Reader, target: str) -> PolicyRow | None:
        """What is in force; raises NotFound for a node that nobody has seen."""
        row = await store.find(tx, target)
        if row is None and target.startswith(NODE_PREFIX):
            name = target.removeprefix(NODE_PREFIX)
            if await fleet.find_node(tx, name) is None:
                raise NotFound(f"no node {name[:64]!r}.", node=name[:64])
        return row

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
    """What sessions get on one node, at one moment."""

    def __init__(self, rows: list[PolicyRow]) -> None:
        self._rows: Final = rows

    def of(self, image: str, session: str) -> Sandbox:
        """*image*, *session*: the texts of these layers; empty: none."""
        return rules.sandbox_of(self._rows, image, session)

    def live_of(self, image: str, session: str) -> str:
        """Names the live rules of that sandbox; none: empty."""
        return rules.live_digest(self.of(image, session))


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


def _policy(row: PolicyRow) -> Policy:
    return Policy(
        target=row.target,
        version=row.version,
        text=row.text,
        digest=row.digest,
        author=row.author,
        at=seconds(row.at),
        note=row.note,
    )
