"""All SQL of the scheduling slice."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa

from madang.kit.codec import from_json
from madang.manager.db import Reader, Transaction, seconds
from madang.manager.identity.tables import domains, projects
from madang.manager.scheduling.tables import decisions, reservations, runs
from madang.manager.scheduling.types import Reservation, Run

_B = sa.bindparam
RUNS_KEPT: Final = 1_000_000
DECISIONS_KEPT: Final = 200_000


_ADD_RUN: Final = sa.insert(runs)
_RUNS_AFTER: Final = (
    sa.select(runs)
    .where(runs.c.id > _B("b_after"), runs.c.ended_at >= _B("b_since"))
    .order_by(runs.c.id)
    .limit(sa.bindparam("b_limit", type_=sa.Integer))
)
_RUNS_BETWEEN: Final = (
    sa.select(runs)
    .where(
        runs.c.group_name == _B("b_group"),
        runs.c.ended_at > _B("b_since"),
        runs.c.created_at < _B("b_until"),
    )
    .order_by(runs.c.created_at, runs.c.id)
    .limit(sa.bindparam("b_limit", type_=sa.Integer))
)
_RUN_OF: Final = (
    sa.select(runs.c.result)
    .where(runs.c.session_id == _B("b_session"))
    .order_by(runs.c.id.desc())
    .limit(1)
)
_NEWEST_RUN: Final = sa.select(sa.func.max(runs.c.id).label("id"))
_PRUNE_RUNS: Final = sa.delete(runs).where(
    sa.or_(runs.c.ended_at < _B("b_before"), runs.c.id <= _B("b_upto"))
)
_NEWEST_DECISION: Final = sa.select(sa.func.max(decisions.c.id).label("id"))
_LAST_WHOLE: Final = sa.select(sa.func.max(decisions.c.id).label("id")).where(
    decisions.c.whole == 1,
    sa.or_(decisions.c.at <= _B("b_at"), decisions.c.id <= _B("b_upto")),
)
_ADD_DECISION: Final = sa.insert(decisions)
_DECISIONS: Final = (
    sa.select(decisions)
    .where(decisions.c.id >= _B("b_from"), decisions.c.at <= _B("b_until"))
    .order_by(decisions.c.id)
    .limit(sa.bindparam("b_limit", type_=sa.Integer))
)
_WHOLE_BEFORE: Final = sa.select(sa.func.max(decisions.c.id).label("id")).where(
    decisions.c.whole == 1, decisions.c.at <= _B("b_at")
)
_FIRST_WHOLE: Final = sa.select(sa.func.min(decisions.c.id).label("id")).where(
    decisions.c.whole == 1
)
_PRUNE_DECISIONS: Final = sa.delete(decisions).where(decisions.c.id < _B("b_id"))


_RESERVATIONS: Final = sa.select(reservations).order_by(
    reservations.c.starts_at, reservations.c.name
)
_ADD_RESERVATION: Final = sa.insert(reservations)
_REMOVE_RESERVATION: Final = sa.delete(reservations).where(reservations.c.name == _B("b_name"))
_END_RESERVATIONS: Final = sa.delete(reservations).where(reservations.c.ends_at < _B("b_before"))
_PROJECTS: Final = sa.select(projects.c.id, projects.c.name)
_DOMAINS: Final = sa.select(domains.c.id, domains.c.name)


async def names(tx: Reader) -> tuple[dict[str, str], dict[str, str]]:
    """Of projects and domains, by id."""
    found = [await tx.all(_PROJECTS), await tx.all(_DOMAINS)]
    of_projects, of_domains = ({row.id: row.name for row in rows} for rows in found)
    return of_projects, of_domains


async def add_run(tx: Transaction, run: Run) -> None:
    await tx.execute(_ADD_RUN, **{name: getattr(run, name) for name in Run.__slots__})


async def list_runs(tx: Reader, *, after: int, since: int, limit: int) -> list[Any]:
    """Those with a greater id that ended since then, oldest first."""
    return await tx.all(_RUNS_AFTER, b_after=after, b_since=since, b_limit=limit)


async def list_runs_between(
    tx: Reader, *, group: str, since: int, until: int, limit: int
) -> list[Any]:
    """Of sessions that waited or ran in that time and have ended."""
    where = {"b_group": group, "b_since": since, "b_until": until, "b_limit": limit}
    return await tx.all(_RUNS_BETWEEN, **where)


async def newest_run(tx: Reader) -> int:
    row = await tx.one(_NEWEST_RUN)
    return 0 if row is None or row.id is None else int(row.id)


async def find_result(tx: Reader, session_id: str) -> str | None:
    """How a session ended that may have been removed since."""
    row = await tx.one(_RUN_OF, b_session=session_id)
    return None if row is None else str(row.result)


async def add_decision(
    tx: Transaction, *, at: int, whole: bool, inputs: bytes, digest: str
) -> None:
    await tx.execute(_ADD_DECISION, at=at, whole=int(whole), inputs=inputs, digest=digest)


async def list_decisions(tx: Reader, *, start: int, until: int, limit: int) -> list[Any]:
    """From the id *start* on, oldest first."""
    return await tx.all(_DECISIONS, b_from=start, b_until=until, b_limit=limit)


async def whole_before(tx: Reader, at: int) -> int | None:
    """Id of the newest decision with all its inputs that was made by then; else of the first."""
    row = await tx.one(_WHOLE_BEFORE, b_at=at)
    if row is None or row.id is None:
        row = await tx.one(_FIRST_WHOLE)
    return None if row is None or row.id is None else int(row.id)


async def prune(
    tx: Transaction, *, before: int, runs_kept: int = RUNS_KEPT, kept: int = DECISIONS_KEPT
) -> None:
    """What is older or too many; decisions from a whole one on, so that the rest can be read."""
    await tx.execute(_PRUNE_RUNS, b_before=before, b_upto=await newest_run(tx) - runs_kept)
    await tx.execute(_END_RESERVATIONS, b_before=before)
    newest = await tx.one(_NEWEST_DECISION)
    if newest is None or newest.id is None:
        return
    row = await tx.one(_LAST_WHOLE, b_at=before, b_upto=newest.id - kept)
    if row is not None and row.id is not None:
        await tx.execute(_PRUNE_DECISIONS, b_id=row.id)


async def list_booked(tx: Reader) -> list[Any]:
    """All that have not been removed, by their beginning."""
    return await tx.all(_RESERVATIONS)


async def add_reservation(tx: Transaction, **columns: Any) -> None:
    await tx.execute(_ADD_RESERVATION, **columns)


async def remove_reservation(tx: Transaction, name: str) -> bool:
    return await tx.execute(_REMOVE_RESERVATION, b_name=name) > 0


async def list_reservations(tx: Reader) -> list[Reservation]:
    return [
        Reservation(
            name=row.name,
            nodes=frozenset(from_json(list[str], row.nodes)),
            starts_at=seconds(row.starts_at),
            ends_at=seconds(row.ends_at),
            no_show_s=seconds(row.no_show_us),
        )
        for row in await tx.all(_RESERVATIONS)
    ]
