"""Moves with all that belongs to them: ledger, revision, deadline, phases. Inside a transaction."""

from __future__ import annotations

from typing import Any

from madang.kit.codec import to_json
from madang.kit.ids import new_nonce
from madang.manager.db import Transaction, micros, seconds
from madang.manager.fleet import store as ledger
from madang.manager.scheduling.store import add_run
from madang.manager.session import store
from madang.manager.session.rules import dated, deadline_of, next_phases, result_of, run_of
from madang.manager.session.types import SessionRow
from madang.manager.usage import store as usage
from madang.manager.usage.rules import measured_of
from madang.manager.usage.types import MANAGER, Holding
from madang.wire.session import Ended, Reason, SessionStatus

S = SessionStatus


async def assign(tx: Transaction, row: SessionRow, node: str, *, at: int) -> SessionRow | None:
    """PENDING → SCHEDULED on *node*; None if it has no room or another was faster."""
    if row.status != S.PENDING:
        return None
    revision = await ledger.allocate(tx, node, row.slots)
    if revision is None:
        return None
    return await store.move(
        tx,
        row,
        S.SCHEDULED,
        at=at,
        actor="scheduler",
        cause=f"placed on {node}",
        node=node,
        held_by=node,
        attempt=row.attempt + 1,
        nonce=new_nonce(),
        revision=revision,
        deadline=deadline_of(S.SCHEDULED, at),
        phases=next_phases(row.phases, S.SCHEDULED, at),
        pending=None,
    )


async def advance(
    tx: Transaction, row: SessionRow, target: SessionStatus, *, at: int, cause: str, **columns: Any
) -> SessionRow | None:
    """To PREPARING or RUNNING, as the agent reports."""
    moved = await store.move(
        tx,
        row,
        target,
        at=at,
        actor="agent",
        cause=cause,
        deadline=deadline_of(target, at),
        phases=next_phases(row.phases, target, at),
        **columns,
    )
    if moved is not None and moved.started_at is not None:
        await usage.open_interval(tx, holding_of(moved), at)
    return moved


async def stop(
    tx: Transaction,
    row: SessionRow,
    *,
    at: int,
    actor: str,
    reason: Reason,
    text: str,
    grace_us: int | None = None,
) -> SessionRow:
    """Have it end; returns the row as it is then. Stopping twice can only shorten the grace."""
    if row.status == S.PENDING:
        ended = Ended(reason=reason, text=text, at=seconds(at))
        return await end(tx, row, ended, at=at, actor=actor) or row
    grace = row.grace_us if grace_us is None else grace_us
    if row.status == S.TERMINATING:
        return await _hasten(tx, row, grace, at=at)
    if row.status == S.TERMINATED:
        return row
    assert row.held_by is not None
    moved = await store.move(
        tx,
        row,
        S.TERMINATING,
        at=at,
        actor=actor,
        cause=text,
        revision=await ledger.next_revision(tx, row.held_by),
        stop_reason=str(reason),
        stop_text=text,
        grace_us=grace,
        deadline=deadline_of(S.TERMINATING, at, grace),
        phases=next_phases(row.phases, S.TERMINATING, at),
    )
    return moved or row


async def set_frozen(
    tx: Transaction, row: SessionRow, *, at: int, frozen: bool
) -> SessionRow | None:
    """An order to freeze or to thaw a RUNNING session; None: *row* is out of date.

    Always a new one: the agent may have woken it meanwhile.
    """
    assert row.held_by is not None
    revision = await ledger.next_revision(tx, row.held_by)
    since = at if row.frozen_at is None else row.frozen_at
    return await store.change(
        tx,
        row,
        at=at,
        what="frozen" if frozen else "thawed",
        revision=revision,
        frozen_at=since if frozen else None,
        freeze_revision=revision,
    )


async def _hasten(tx: Transaction, row: SessionRow, grace: int, *, at: int) -> SessionRow:
    if grace >= row.grace_us or row.held_by is None:
        return row
    changed = await store.change(
        tx,
        row,
        at=at,
        what="grace",
        grace_us=grace,
        deadline=deadline_of(S.TERMINATING, at, grace),
        revision=await ledger.next_revision(tx, row.held_by),
    )
    return changed or row


async def end(
    tx: Transaction,
    row: SessionRow,
    ended: Ended,
    *,
    at: int,
    actor: str,
    keep: bool = True,
    by: str = MANAGER,
    **columns: Any,
) -> SessionRow | None:
    """To TERMINATED, by way of TERMINATING if it was placed; None if it has ended already.

    *by*: who saw it end, for the usage ledger. *keep*: the node keeps its files and output.
    Otherwise the kernel is to be removed, now or whenever the node comes back.
    """
    if row.status in {S.SCHEDULED, S.PREPARING, S.RUNNING}:
        between = await store.move(
            tx,
            row,
            S.TERMINATING,
            at=at,
            actor=actor,
            cause=ended.text or str(ended.reason),
            phases=next_phases(row.phases, S.TERMINATING, at),
        )
        if between is None:
            return None
        row = between
    if row.held_by is not None and row.status == S.TERMINATING:
        columns["revision"] = await ledger.release(tx, row.held_by, row.slots)
    ended = dated(ended, columns.get("started_at", row.started_at), at)
    moved = await store.move(
        tx,
        row,
        S.TERMINATED,
        at=at,
        actor=actor,
        cause=ended.text or str(ended.reason),
        result=str(result_of(ended)),
        ended=to_json(ended).decode(),
        ended_at=at,
        deadline=None,
        pending=None,
        phases=next_phases(row.phases, S.TERMINATED, at),
        **columns,
    )
    if moved is None:
        return None
    await add_run(tx, run_of(moved, ended))
    if moved.started_at is not None and moved.node is not None:
        over = moved.started_at + micros(ended.duration_s)
        await usage.close_interval(
            tx, holding_of(moved), measured_of(ended), ended_at=over, by=by, at=at
        )
    if keep or moved.held_by is None:
        return moved
    return await let_go(tx, moved, at=at)


async def let_go(tx: Transaction, row: SessionRow, *, at: int) -> SessionRow | None:
    """The node shall remove the kernel with all its files."""
    assert row.held_by is not None
    await ledger.forget(tx, row.held_by, row.kernel, at)
    return await store.change(tx, row, at=at, what="forgotten", held_by=None)


async def remove(tx: Transaction, row: SessionRow, *, at: int, actor: str) -> bool:
    """An ended session, with its output and files; False if it has not ended or is gone."""
    if row.status != S.TERMINATED:
        return False
    if row.held_by is not None:
        await ledger.forget(tx, row.held_by, row.kernel, at)
    return await store.remove(tx, row, at=at, actor=actor)


def holding_of(row: SessionRow) -> Holding:
    """What it holds of its node, for the usage ledger."""
    assert row.node is not None
    assert row.started_at is not None
    return Holding(
        session_id=row.id,
        session=row.name,
        kind=row.kind,
        attempt=row.attempt,
        nonce=row.nonce,
        node=row.node,
        user_id=row.owner_id,
        user=row.owner,
        project_id=row.project_id,
        group_name=row.group_name,
        token_id=row.token_id,
        cpu_milli=row.cpu_milli,
        mem_bytes=row.mem_bytes,
        disk_bytes=row.disk_bytes,
        pids=row.pids,
        started_at=row.started_at,
    )


def lost(text: str, *, reason: Reason = Reason.LOST) -> Ended:
    return Ended(reason=reason, text=text)


def to_stored(value: float | None) -> int | None:
    return None if value is None else micros(value)
