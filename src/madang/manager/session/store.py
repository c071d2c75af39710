"""All SQL of the session slice. Only ``move`` changes a status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any, Final

import sqlalchemy as sa

from madang.manager.db import Reader, Transaction, one_of, seconds
from madang.manager.db.events import (
    add_event,
    add_events,
    event_row,
    events,
    events_after,
    list_events,
)
from madang.manager.fleet.tables import SLOTS
from madang.manager.identity.store import Viewer, viewer, visible
from madang.manager.identity.tables import projects
from madang.manager.session.tables import history, idempotency, sessions
from madang.manager.session.types import LIFE, PLACED, SessionRow
from madang.wire.api import Event
from madang.wire.session import HistoryEntry, SessionStatus

S = SessionStatus
_B = sa.bindparam


def _text(name: str) -> sa.BindParameter[str]:
    return sa.bindparam(name, type_=sa.Text)


_VISIBLE: Final = visible(sessions.c.owner_id, sessions.c.project_id)

_ADD: Final = sa.insert(sessions)
_BY_ID: Final = sa.select(sessions).where(sessions.c.id == _B("b_id"))
_OF_OWNER: Final = sa.or_(_text("b_owner").is_(None), sessions.c.owner == _text("b_owner"))
_OWN_FIRST: Final = sa.case((sessions.c.owner_id == _text("b_viewer"), 0), else_=1)
_BY_REF: Final = (
    sa.select(sessions)
    .where(
        sa.or_(sessions.c.id == _text("b_ref"), sessions.c.name == _text("b_ref")),
        _OF_OWNER,
        _VISIBLE,
    )
    .order_by(_OWN_FIRST, sessions.c.owner)
    .limit(2)
)
_BY_PREFIX: Final = (
    sa.select(sessions)
    .where(sessions.c.name.like(_text("b_like")), _OF_OWNER, _VISIBLE)
    .order_by(_OWN_FIRST, sessions.c.name, sessions.c.owner)
    .limit(2)
)
_NAME_TAKEN: Final = sa.select(sessions.c.id).where(
    sessions.c.owner_id == _B("b_owner_id"), sessions.c.name == _B("b_name")
)
_EVENTS: Final = events_after(visible(events.c.owner_id, events.c.project_id))
_MOVE: Final = (
    sa.update(sessions)
    .where(
        sessions.c.id == _B("b_id"),
        sessions.c.status == _B("b_source"),
        sessions.c.attempt == _B("b_attempt"),
    )
    .values(version=sessions.c.version + 1)
    .returning(*sessions.c)
)
_CHANGE: Final = (
    sa.update(sessions)
    .where(sessions.c.id == _B("b_id"), sessions.c.version == _B("b_version"))
    .values(version=sessions.c.version + 1)
    .returning(*sessions.c)
)
_RETELL: Final = sa.update(sessions).where(
    sessions.c.held_by == _B("b_node"),
    one_of(sessions.c.status, PLACED),
    sa.or_(_B("b_group", type_=sa.Text).is_(None), sessions.c.group_name == _B("b_group")),
    sa.or_(_B("b_project", type_=sa.Text).is_(None), sessions.c.project_id == _B("b_project")),
)
_COUNT_REFUSED: Final = sa.update(sessions).where(sessions.c.id == _B("b_id"))
_EXPLAIN: Final = (
    sa.update(sessions)
    .where(sessions.c.id == _B("b_id"), sessions.c.version == _B("b_version"))
    .values(version=sessions.c.version + 1)
)
_REMOVE: Final = sa.delete(sessions).where(
    sessions.c.id == _B("b_id"), sessions.c.status == str(S.TERMINATED)
)
_PAGE: Final = (
    sa.select(sessions)
    .where(
        _VISIBLE,
        sa.or_(_text("b_status").is_(None), sessions.c.status == _text("b_status")),
        sa.or_(
            sa.bindparam("b_all", type_=sa.Integer) == 1, sessions.c.status != str(S.TERMINATED)
        ),
        sa.or_(
            _text("b_after").is_(None),
            sessions.c.id < _text("b_after"),
        ),
    )
    .order_by(sessions.c.id.desc())
    .limit(sa.bindparam("b_limit", type_=sa.Integer))
)
_PENDING: Final = (
    sa.select(
        sessions.c.id,
        sessions.c.name,
        sessions.c.owner_id,
        sessions.c.owner,
        sessions.c.project_id,
        sessions.c.group_name,
        sessions.c.priority,
        sessions.c.created_at,
        *(sessions.c[slot] for slot in SLOTS),
        sessions.c.time_us,
        sessions.c.wishes,
        sessions.c.told,
        sessions.c.pending,
        sessions.c.version,
    )
    .where(sessions.c.status == str(S.PENDING))
    .order_by(sessions.c.priority.desc(), sessions.c.created_at, sessions.c.id)
    .limit(sa.bindparam("b_limit", type_=sa.Integer))
)
_OF_ACCOUNT: Final = {
    "token": sessions.c.token_id == _B("b_id"),
    "user": sessions.c.owner_id == _B("b_id"),
    "project": sessions.c.project_id == _B("b_id"),
    "domain": sessions.c.project_id.in_(
        sa.select(projects.c.id).where(projects.c.domain_id == _B("b_id"))
    ),
}
_COUNTS_OF: Final = {
    kind: sa.select(sessions.c.status, sa.func.count().label("count"))
    .where(mine, sessions.c.status != str(S.TERMINATED))
    .group_by(sessions.c.status)
    for kind, mine in _OF_ACCOUNT.items()
}
_SLOTS_OF: Final = {
    kind: sa.select(*(sa.func.sum(sessions.c[slot]).label(slot) for slot in SLOTS)).where(
        mine, one_of(sessions.c.status, PLACED)
    )
    for kind, mine in _OF_ACCOUNT.items()
}
_RUNNING: Final = sa.select(sessions).where(sessions.c.status == str(S.RUNNING))
_PLACED: Final = sa.select(
    sessions.c.id,
    sessions.c.name,
    sessions.c.owner_id,
    sessions.c.owner,
    sessions.c.project_id,
    sessions.c.node,
    sessions.c.status,
    sessions.c.status_since,
    sessions.c.started_at,
    sessions.c.priority,
    *(sessions.c[slot] for slot in SLOTS),
    sessions.c.time_us,
    sessions.c.wishes,
).where(one_of(sessions.c.status, PLACED))
_RESULT: Final = sa.select(sessions.c.status, sessions.c.result).where(sessions.c.id == _B("b_id"))
_SEEN_PENDING: Final = sa.select(sessions.c.id).where(sessions.c.status == str(S.PENDING), _VISIBLE)
_COUNTS: Final = sa.select(sessions.c.status, sa.func.count().label("count")).group_by(
    sessions.c.status
)
_ON_NODES: Final = (
    sa.select(sessions.c.node, sa.func.count().label("count"))
    .where(one_of(sessions.c.status, PLACED))
    .group_by(sessions.c.node)
)
_OVERDUE: Final = sa.select(sessions).where(
    one_of(sessions.c.status, (s for s in S if s is not S.TERMINATED)),
    sessions.c.deadline < _B("b_now"),
)
_SHIFT: Final = (
    sa.update(sessions)
    .where(sessions.c.deadline.is_not(None))
    .values(deadline=sessions.c.deadline + sa.bindparam("b_by", type_=sa.BigInteger))
)
_SHIFT_IDLE: Final = (
    sa.update(sessions)
    .where(sessions.c.idle_stop_at.is_not(None))
    .values(idle_stop_at=sessions.c.idle_stop_at + sa.bindparam("b_by", type_=sa.BigInteger))
)
_SHIFT_PROTECTED: Final = (
    sa.update(sessions)
    .where(sessions.c.protected_until.is_not(None))
    .values(protected_until=sessions.c.protected_until + sa.bindparam("b_by", type_=sa.BigInteger))
)
_HELD: Final = sa.select(sessions).where(
    sessions.c.held_by == _B("b_node"), sessions.c.revision > _B("b_since")
)
_PLACED_ON: Final = sa.select(sessions).where(
    sessions.c.held_by == _B("b_node"), one_of(sessions.c.status, PLACED)
)
_OLD: Final = (
    sa.select(sessions)
    .where(sessions.c.status == str(S.TERMINATED), sessions.c.ended_at < _B("b_before"))
    .limit(100)
)
_SURPLUS: Final = (
    sa.select(sessions)
    .where(sessions.c.status == str(S.TERMINATED))
    .order_by(sessions.c.ended_at.desc(), sessions.c.id)
    .limit(100)
    .offset(sa.bindparam("b_keep", type_=sa.Integer))
)
_IMAGE_USERS: Final = sa.select(sessions.c.image_mount).where(
    sessions.c.status != str(S.TERMINATED)
)
_NOTE: Final = sa.insert(history)
_HISTORY: Final = (
    sa.select(history).where(history.c.session_id == _B("b_id")).order_by(history.c.id)
)
_KEY: Final = sa.select(idempotency).where(
    idempotency.c.owner_id == _B("b_owner"), idempotency.c.key == _B("b_key")
)
_ADD_KEY: Final = sa.insert(idempotency)
_PRUNE_KEYS: Final = sa.delete(idempotency).where(idempotency.c.created_at < _B("b_before"))


_VALUES: Final = attrgetter(*SessionRow.__slots__)


async def add(tx: Transaction, row: SessionRow, *, actor: str) -> None:
    """A new session, with the first line of its history."""
    await tx.execute(_ADD, **dict(zip(SessionRow.__slots__, _VALUES(row), strict=True)))
    await _note(tx, row, None, actor, "created")


async def move(
    tx: Transaction,
    row: SessionRow,
    target: SessionStatus,
    *,
    at: int,
    actor: str,
    cause: str,
    **columns: Any,
) -> SessionRow | None:
    """Change the status that *row* was read with; None if LIFE forbids or another was faster."""
    if target not in LIFE[S(row.status)].next:
        return None
    found = await tx.one(
        _MOVE,
        b_id=row.id,
        b_source=row.status,
        b_attempt=row.attempt,
        status=str(target),
        status_since=at,
        **columns,
    )
    if found is None:
        return None
    moved = SessionRow(*found)
    await _note(tx, moved, row.status, actor, cause)
    return moved


async def _note(
    tx: Transaction, row: SessionRow, source: str | None, actor: str, cause: str
) -> None:
    await tx.execute(
        _NOTE,
        session_id=row.id,
        at=row.status_since,
        source=source,
        target=row.status,
        actor=actor,
        cause=cause,
    )
    payload = {
        "name": row.name,
        "source": source,
        "target": row.status,
        "cause": cause,
        "node": row.held_by,
        "result": row.result,
        "version": row.version,
    }
    await add_event(
        tx,
        at=row.status_since,
        kind="session.moved",
        subject=row.id,
        owner_id=row.owner_id,
        project_id=row.project_id,
        payload=payload,
    )


async def change(
    tx: Transaction, row: SessionRow, *, at: int, what: str, **columns: Any
) -> SessionRow | None:
    """Change anything but the status; None if *row* is out of date."""
    assert "status" not in columns
    found = await tx.one(_CHANGE, b_id=row.id, b_version=row.version, **columns)
    if found is None:
        return None
    changed = SessionRow(*found)
    await add_event(
        tx,
        at=at,
        kind="session.changed",
        subject=row.id,
        owner_id=row.owner_id,
        project_id=row.project_id,
        payload={
            "name": row.name,
            "what": what,
            "node": row.held_by,
            "version": changed.version,
        },
    )
    return changed


async def retell(
    tx: Transaction, node: str, revision: int, *, group: str | None, project: str | None
) -> None:
    """What *node* runs, of that group or project, is to be told to it again as of *revision*."""
    await tx.execute(_RETELL, b_node=node, b_group=group, b_project=project, revision=revision)


async def count_refused(tx: Transaction, row: SessionRow, refused: str) -> SessionRow:
    """What its policy has refused by now (place → number, JSON). No new version of the session."""
    await tx.execute(_COUNT_REFUSED, b_id=row.id, refused=refused)
    return replace(row, refused=refused)


async def explain(
    tx: Transaction,
    rows: Mapping[str, Any],
    reasons: Mapping[str, str],
    told: Mapping[str, str],
    *,
    at: int,
) -> None:
    """Write down why sessions wait (by id); what changed since *rows* were read stays as it is.

    *rows* are of ``list_pending``, reasons are ``Pending`` as JSON; *told*: first estimates.
    """
    found = []
    for session, reason in reasons.items():
        row = rows[session]
        where = {"b_id": row.id, "b_version": row.version}
        estimate = told.get(session, row.told)
        if await tx.execute(_EXPLAIN, **where, pending=reason, told=estimate):
            payload = {"name": row.name, "what": "pending", "node": None}
            found.append(
                event_row(
                    at=at,
                    kind="session.changed",
                    subject=row.id,
                    owner_id=row.owner_id,
                    project_id=row.project_id,
                    payload={**payload, "version": row.version + 1},
                )
            )
    await add_events(tx, found)


async def remove(tx: Transaction, row: SessionRow, *, at: int, actor: str) -> bool:
    """Delete an ended session with its history; False if it has not ended or is gone."""
    if await tx.execute(_REMOVE, b_id=row.id) == 0:
        return False
    await add_event(
        tx,
        at=at,
        kind="session.removed",
        subject=row.id,
        owner_id=row.owner_id,
        project_id=row.project_id,
        payload={"name": row.name, "actor": actor, "node": row.held_by},
    )
    return True


async def find(tx: Reader, session_id: str) -> SessionRow | None:
    row = await tx.one(_BY_ID, b_id=session_id)
    return None if row is None else SessionRow(*row)


async def list_ref(
    tx: Reader, ref: str, caller: Viewer, *, owner: str | None = None
) -> list[SessionRow]:
    """By id or whole name, of those that *caller* may see: two at most, their own first."""
    rows = await tx.all(_BY_REF, b_ref=ref, b_owner=owner, **viewer(caller))
    return [SessionRow(*row) for row in rows]


async def list_prefix(
    tx: Reader, prefix: str, caller: Viewer, *, owner: str | None = None
) -> list[SessionRow]:
    """As ``list_ref``, by how names begin; *prefix* holds letters, digits and dashes only."""
    rows = await tx.all(_BY_PREFIX, b_like=f"{prefix}%", b_owner=owner, **viewer(caller))
    return [SessionRow(*row) for row in rows]


async def name_taken(tx: Reader, owner_id: str, name: str) -> bool:
    """Names are each owner's own: nobody learns from a refusal what others run."""
    return await tx.one(_NAME_TAKEN, b_owner_id=owner_id, b_name=name) is not None


async def list_events_for(tx: Reader, caller: Viewer, *, after: int) -> list[Event]:
    """The next events of what *caller* may see."""
    return await list_events(tx, after=after, statement=_EVENTS, **viewer(caller))


async def list_page(
    tx: Reader, *, caller: Viewer, status: str | None, ended: bool, after: str | None, limit: int
) -> list[SessionRow]:
    """Newest first, below the id *after*."""
    rows = await tx.all(
        _PAGE,
        **viewer(caller),
        b_status=status,
        b_all=int(ended or status is not None),
        b_after=after,
        b_limit=limit,
    )
    return [SessionRow(*row) for row in rows]


async def list_pending(tx: Reader, limit: int) -> list[Any]:
    """What the scheduler looks at, in scheduling order; there may be very many."""
    return await tx.all(_PENDING, b_limit=limit)


async def list_placed(tx: Reader) -> list[Any]:
    """What the scheduler looks at of all that hold a place."""
    return await tx.all(_PLACED)


async def list_running(tx: Reader) -> list[SessionRow]:
    return [SessionRow(*row) for row in await tx.all(_RUNNING)]


async def count_of(tx: Reader, account: str) -> dict[str, int]:
    """What has not ended of an account: status → how many."""
    kind, _, id_ = account.partition(":")
    return {row.status: row.count for row in await tx.all(_COUNTS_OF[kind], b_id=id_)}


async def sum_of(tx: Reader, account: str) -> dict[str, int]:
    """What an account's placed sessions hold together."""
    kind, _, id_ = account.partition(":")
    row = await tx.one(_SLOTS_OF[kind], b_id=id_)
    return {slot: int(getattr(row, slot) or 0) for slot in SLOTS}


async def find_result(tx: Reader, session_id: str) -> tuple[str, str | None] | None:
    """Status and result; None: there is no such session any more."""
    row = await tx.one(_RESULT, b_id=session_id)
    return None if row is None else (row.status, row.result)


async def list_visible_pending(tx: Reader, caller: Viewer) -> set[str]:
    """Ids of waiting sessions that *caller* may know of."""
    return {row.id for row in await tx.all(_SEEN_PENDING, **viewer(caller))}


async def count_by_status(tx: Reader) -> dict[str, int]:
    return {row.status: row.count for row in await tx.all(_COUNTS)}


async def count_by_node(tx: Reader) -> dict[str, int]:
    return {row.node: row.count for row in await tx.all(_ON_NODES)}


async def list_overdue(tx: Reader, now: int) -> list[SessionRow]:
    return [SessionRow(*row) for row in await tx.all(_OVERDUE, b_now=now)]


async def shift_deadlines(tx: Transaction, by: int) -> None:
    """The clock was set: deadlines, and what was said about idle sessions, go with it."""
    for statement in (_SHIFT, _SHIFT_IDLE, _SHIFT_PROTECTED):
        await tx.execute(statement, b_by=by)


async def list_held(tx: Reader, node: str, since: int) -> list[SessionRow]:
    """What *node* shall have a kernel of and that changed after revision *since*."""
    return [SessionRow(*row) for row in await tx.all(_HELD, b_node=node, b_since=since)]


async def list_placed_on(tx: Reader, node: str) -> list[SessionRow]:
    return [SessionRow(*row) for row in await tx.all(_PLACED_ON, b_node=node)]


async def list_old(tx: Reader, before: int) -> list[SessionRow]:
    """Ended before that time; a batch."""
    return [SessionRow(*row) for row in await tx.all(_OLD, b_before=before)]


async def list_surplus(tx: Reader, keep: int) -> list[SessionRow]:
    """Ended sessions beyond the newest *keep*; a batch."""
    return [SessionRow(*row) for row in await tx.all(_SURPLUS, b_keep=keep)]


async def list_history(tx: Reader, session_id: str) -> list[HistoryEntry]:
    return [
        HistoryEntry(
            at=seconds(row.at),
            source=None if row.source is None else S(row.source),
            target=S(row.target),
            actor=row.actor,
            cause=row.cause,
        )
        for row in await tx.all(_HISTORY, b_id=session_id)
    ]


async def list_live_mounts(tx: Reader) -> list[str]:
    """Image mounts (JSON) of all sessions that have not ended."""
    return [row.image_mount for row in await tx.all(_IMAGE_USERS)]


async def find_key(tx: Reader, owner_id: str, key: str) -> Any | None:
    return await tx.one(_KEY, b_owner=owner_id, b_key=key)


async def add_key(
    tx: Transaction, *, owner_id: str, key: str, digest: str, session_id: str, at: int
) -> None:
    await tx.execute(
        _ADD_KEY, owner_id=owner_id, key=key, digest=digest, session_id=session_id, created_at=at
    )


async def prune_keys(tx: Transaction, before: int) -> None:
    await tx.execute(_PRUNE_KEYS, b_before=before)
