"""All SQL of the usage slice. A closed row is never changed; another may take its place."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Final

import sqlalchemy as sa

from madang.manager.db import Reader, Transaction
from madang.manager.identity.store import Viewer, viewer, visible
from madang.manager.identity.tables import domains, projects
from madang.manager.usage.tables import usage, usage_prices
from madang.manager.usage.types import Holding, Measured, PriceRow, Slot, UsageRow

PAGE: Final = 500
_NEVER: Final = -1
_B = sa.bindparam


def _text(name: str) -> sa.BindParameter[str]:
    return sa.bindparam(name, type_=sa.Text)


def _number(name: str) -> sa.BindParameter[int]:
    return sa.bindparam(name, type_=sa.BigInteger)


_better = usage.alias()
_IN_FORCE: Final = sa.not_(sa.exists().where(_better.c.corrects == usage.c.id))
_VISIBLE: Final = visible(usage.c.user_id, usage.c.project_id)

_ADD: Final = sa.insert(usage)
_CLOSE: Final = sa.update(usage).where(usage.c.id == _B("b_id"), usage.c.ended_at.is_(None))
_BY_ID: Final = sa.select(usage).where(usage.c.id == _B("b_id"))
_OF_RUN: Final = sa.select(usage).where(
    usage.c.session_id == _B("b_session"), usage.c.attempt == _B("b_attempt"), _IN_FORCE
)
_CORRECTIONS: Final = sa.select(sa.func.count().label("count")).where(
    usage.c.session_id == _B("b_session"),
    usage.c.attempt == _B("b_attempt"),
    usage.c.corrects.is_not(None),
)
_DOMAIN: Final = sa.select(projects.c.domain_id).where(projects.c.id == _B("b_id"))
_PROJECT: Final = sa.select(projects.c.id, projects.c.name).where(
    sa.or_(projects.c.id == _text("b_ref"), projects.c.name == _text("b_ref"))
)
_PROJECTS: Final = sa.select(projects.c.id, projects.c.name)
_DOMAINS: Final = sa.select(domains.c.id, domains.c.name)


def _if_given(column: sa.ColumnElement[str], name: str) -> sa.ColumnElement[bool]:
    return sa.or_(_text(name).is_(None), column == _text(name))


_MATCHES: Final = (
    _VISIBLE,
    _if_given(usage.c.user, "b_user"),
    _if_given(usage.c.project_id, "b_project"),
    _if_given(usage.c.group_name, "b_group"),
    _if_given(usage.c.node, "b_node"),
    sa.or_(
        _text("b_session").is_(None),
        usage.c.session_id == _text("b_session"),
        usage.c.session == _text("b_session"),
    ),
    usage.c.started_at < _number("b_until"),
)
_SUMMED: Final = (
    usage.c.id, usage.c.session, usage.c.node, usage.c.user, usage.c.project_id,
    usage.c.domain_id, usage.c.group_name, usage.c.cpu_milli, usage.c.mem_bytes,
    usage.c.disk_bytes, usage.c.pids, usage.c.started_at, usage.c.ended_at, usage.c.cpu_us,
    usage.c.mem_peak_bytes, usage.c.received_bytes, usage.c.sent_bytes,
)  # fmt: skip
_CLOSED: Final = (
    sa.select(*_SUMMED)
    .where(
        usage.c.ended_at >= _number("b_at"),  # a range of the index
        sa.or_(usage.c.ended_at > _number("b_at"), usage.c.id > _text("b_id")),
        *_MATCHES,
        _IN_FORCE,
    )
    .order_by(usage.c.ended_at, usage.c.id)
    .limit(PAGE)
)
_OPEN: Final = (
    sa.select(*_SUMMED)
    .where(usage.c.ended_at.is_(None), usage.c.id > _text("b_id"), *_MATCHES)
    .order_by(usage.c.id)
    .limit(PAGE)
)
_PAGE: Final = (
    sa.select(usage)
    .where(
        *_MATCHES,
        sa.or_(usage.c.ended_at.is_(None), usage.c.ended_at > _number("b_since")),
        sa.or_(_number("b_all") == 1, _IN_FORCE),
        sa.or_(_text("b_after").is_(None), usage.c.id < _text("b_after")),
    )
    .order_by(usage.c.id.desc())
    .limit(_number("b_limit"))
)


def _used(slot: Slot, account: sa.ColumnElement[str]) -> sa.Select[Any]:
    """Amount × microseconds since then, up to now; in floats, as integers would be too small."""
    over = sa.func.coalesce(usage.c.ended_at, _number("b_now"))
    end = sa.case((over > _number("b_now"), _number("b_now")), else_=over)
    begin = sa.case(
        (usage.c.started_at < _number("b_since"), _number("b_since")), else_=usage.c.started_at
    )
    amount = sa.cast(usage.c[slot.column], sa.Float) * sa.cast(end - begin, sa.Float)
    return sa.select(sa.func.sum(amount).label("sum")).where(
        account == _text("b_account"),
        sa.or_(usage.c.ended_at.is_(None), usage.c.ended_at > _number("b_since")),
        usage.c.started_at < _number("b_now"),
        _IN_FORCE,
    )


_ACCOUNTS: Final = {
    "user": usage.c.user_id,
    "project": usage.c.project_id,
    "domain": usage.c.domain_id,
    "token": usage.c.token_id,
}
_USED: Final = {
    (kind, slot): _used(slot, column) for kind, column in _ACCOUNTS.items() for slot in Slot
}
_PRICES: Final = sa.select(usage_prices).order_by(usage_prices.c.id)
_ADD_PRICE: Final = sa.insert(usage_prices)


# Writing, in the transactions of the session slice


async def open_interval(tx: Transaction, holding: Holding, at: int) -> None:
    await tx.execute(_ADD, **await _columns(tx, holding), closed_by="", recorded_at=at)


async def close_interval(
    tx: Transaction, holding: Holding, measured: Measured, *, ended_at: int, by: str, at: int
) -> None:
    """The one that was opened; one that nobody saw begin is written down as a whole."""
    end = {"ended_at": max(ended_at, holding.started_at), "closed_by": by, **asdict(measured)}
    if await tx.execute(_CLOSE, b_id=holding.id, recorded_at=at, **end) == 0:
        await tx.execute(_ADD, **await _columns(tx, holding), **end, recorded_at=at)


async def _columns(tx: Reader, holding: Holding) -> dict[str, Any]:
    domain = await tx.one(_DOMAIN, b_id=holding.project_id)
    columns = asdict(holding)
    return {
        "id": holding.id,
        **columns,
        "domain_id": "" if domain is None else domain.domain_id,
        "reason": "",
    }


async def find_run(tx: Reader, session_id: str, attempt: int) -> UsageRow | None:
    """The row in force of a run of a session."""
    row = await tx.one(_OF_RUN, b_session=session_id, b_attempt=attempt)
    return None if row is None else UsageRow(*row)


async def correct(
    tx: Transaction,
    row: UsageRow,
    *,
    ended_at: int,
    by: str,
    reason: str,
    at: int,
    measured: Measured | None = None,
) -> UsageRow:
    """A new row in the place of *row*, which is closed and in force."""
    assert row.ended_at is not None
    count = await tx.one(_CORRECTIONS, b_session=row.session_id, b_attempt=row.attempt)
    assert count is not None
    fresh = replace(
        row,
        id=f"{row.session_id}.{row.attempt}.{count.count + 1}",
        ended_at=max(ended_at, row.started_at),
        closed_by=by,
        corrects=row.id,
        reason=reason,
        recorded_at=at,
        **({} if measured is None else asdict(measured)),
    )
    await tx.execute(_ADD, **{name: getattr(fresh, name) for name in UsageRow.__slots__})
    return fresh


async def find(tx: Reader, interval_id: str) -> UsageRow | None:
    row = await tx.one(_BY_ID, b_id=interval_id)
    return None if row is None else UsageRow(*row)


# Reading


class Filter:
    """Which rows; None: all of them."""

    __slots__ = ("_values",)

    def __init__(
        self,
        *,
        until: int,
        user: str | None = None,
        project_id: str | None = None,
        group: str | None = None,
        node: str | None = None,
        session: str | None = None,
    ) -> None:
        self._values: Final[dict[str, Any]] = {
            "b_user": user,
            "b_project": project_id,
            "b_group": group,
            "b_node": node,
            "b_session": session,
            "b_until": until,
        }

    def values(self, caller: Viewer) -> dict[str, Any]:
        return {**self._values, **viewer(caller)}


async def list_closed(
    tx: Reader, caller: Viewer, which: Filter, *, after: tuple[int, str]
) -> list[Any]:
    """The next ``PAGE`` in force, by (ended_at, id)."""
    return await tx.all(_CLOSED, **which.values(caller), b_at=after[0], b_id=after[1])


async def list_open(tx: Reader, caller: Viewer, which: Filter, *, after: str) -> list[Any]:
    """The next ``PAGE`` that go on, by id."""
    return await tx.all(_OPEN, **which.values(caller), b_id=after)


async def list_page(
    tx: Reader,
    caller: Viewer,
    which: Filter,
    *,
    since: int | None,
    corrected: bool,
    after: str | None,
    limit: int,
) -> list[UsageRow]:
    """Newest sessions first; *corrected*: with those that were replaced."""
    rows = await tx.all(
        _PAGE,
        **which.values(caller),
        b_since=_NEVER if since is None else since,
        b_all=int(corrected),
        b_after=after,
        b_limit=limit,
    )
    return [UsageRow(*row) for row in rows]


async def used(tx: Reader, kind: str, account: str, slot: Slot, *, since: int, now: int) -> float:
    """Column × microseconds."""
    row = await tx.one(_USED[kind, slot], b_account=account, b_since=since, b_now=now)
    return 0.0 if row is None or row.sum is None else float(row.sum)


async def project_names(tx: Reader) -> dict[str, str]:
    return {row.id: row.name for row in await tx.all(_PROJECTS)}


async def domain_names(tx: Reader) -> dict[str, str]:
    return {row.id: row.name for row in await tx.all(_DOMAINS)}


async def find_projects(tx: Reader, ref: str) -> list[Any]:
    """By id or name; names are unique in a domain only."""
    return await tx.all(_PROJECT, b_ref=ref)


async def list_prices(tx: Reader) -> list[PriceRow]:
    return [PriceRow(*row) for row in await tx.all(_PRICES)]


async def add_price(tx: Transaction, row: PriceRow) -> None:
    columns = {name: getattr(row, name) for name in PriceRow.__slots__ if name != "id"}
    await tx.execute(_ADD_PRICE, **columns)
