"""What limits mean for sessions: when they are made, placed, and left alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from madang.manager.db import Reader, micros, seconds
from madang.manager.limits import store
from madang.manager.limits.rules import counting
from madang.manager.limits.rules.counting import Over
from madang.manager.limits.rules.text import parse
from madang.manager.limits.types import EVERY, KINDS, Amounts, Asked, Counts, InForce, Ledger


class LimitService:
    """Reads alone; all of it inside the caller's transaction."""

    def __init__(self) -> None:
        self._ledger: Ledger | None = None

    def bind(self, ledger: Ledger) -> None:
        """Who knows what accounts hold; before the first session."""
        self._ledger = ledger

    async def accounts(self, tx: Reader, *, user: str, project: str, token: str) -> tuple[str, ...]:
        """To which a session of theirs goes, the narrowest first; its domain is the project's."""
        domain = await store.find_domain(tx, project)
        ids = zip(KINDS, (token, user, project, domain), strict=True)
        return tuple(f"{kind}:{id_}" for kind, id_ in ids if id_)

    async def in_force(self, tx: Reader, accounts: Sequence[str]) -> list[InForce]:
        """What counts for a session of these accounts."""
        assigned = await store.list_assigned(tx, accounts)
        if not assigned:
            return []
        found = Assigned(assigned).of(accounts)
        return [replace(by, shown=await self.shown(tx, by.account)) for by in found]

    async def shown(self, tx: Reader, account: str) -> str:
        """``project lab`` for ``project:01jd…``"""
        kind, _, id_ = account.partition(":")
        return f"{kind} {await store.find_name(tx, account) or id_}"

    # Sessions that are to be made

    async def check_create(
        self, tx: Reader, accounts: Sequence[str], asked: Asked, *, at: int
    ) -> float | None:
        """The time limit that the session gets. Raises LimitRefused, LimitExceeded.

        In the transaction that makes it, or somebody else takes what is left meanwhile.
        """
        in_force = await self.in_force(tx, accounts)
        if not in_force:
            return asked.time_s
        counts = await self._counts(tx, in_force)
        hours = await self._hours(tx, in_force, at)
        if (error := counting.refusal(asked, in_force, counts, hours)) is not None:
            raise error
        return counting.time_limit(asked, in_force)

    async def _counts(self, tx: Reader, in_force: Iterable[InForce]) -> dict[str, Counts]:
        """Of accounts where it matters."""
        assert self._ledger is not None
        return {
            by.account: await self._ledger.count(tx, by.account)
            for by in in_force
            if (by.limits.sessions, by.limits.pending) != (None, None)
        }

    async def _hours(self, tx: Reader, in_force: Iterable[InForce], at: int) -> dict[str, float]:
        assert self._ledger is not None
        since = micros(counting.month_of(seconds(at)))
        return {
            by.account: await self._ledger.cpu_seconds(tx, by.account, since, at) / 3600
            for by in in_force
            if by.limits.cpu_hours is not None
        }

    # Sessions that are to be placed

    async def find_over(self, tx: Reader, accounts: Sequence[str], slots: Amounts) -> Over | None:
        """The limit that is in the way of holding *slots* more."""
        in_force = [by for by in await self.in_force(tx, accounts) if by.limits.at_once]
        if not in_force:
            return None
        assert self._ledger is not None
        held = {by.account: await self._ledger.slots(tx, by.account) for by in in_force}
        return counting.over(slots, in_force, held)

    # Sessions that are left alone

    async def protection(
        self, tx: Reader, accounts: Sequence[str], session: str, for_s: float | None
    ) -> float:
        """For how long a session may be protected. Raises LimitRefused, Conflict."""
        return counting.protection(await self.in_force(tx, accounts), session, for_s)

    async def assigned(self, tx: Reader) -> Assigned:
        """All that is in force, to look up many accounts."""
        return Assigned(await store.list_assigned(tx))


class Assigned:
    """Limits by target, as they were read."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows: Final = {row.target: row for row in rows}

    @property
    def idle_span_s(self) -> float:
        """The longest time that anybody's idle check asks about; 0: there is none."""
        return max((check.after_s for row in self._rows.values() for check in parse(row.text).idle),
                   default=0.0)  # fmt: skip

    def of(self, accounts: Iterable[str]) -> list[InForce]:
        """An account's own, or else those of its kind; ``shown`` has ids."""
        found = []
        for account in accounts:
            kind, _, id_ = account.partition(":")
            row = self._rows.get(account) or self._rows.get(f"{kind}:{EVERY}")
            if row is not None:
                found.append(_in_force(row, account, f"{kind} {id_}"))
        return found

    def slots_at_once(self, accounts: Iterable[str]) -> Mapping[str, Amounts]:
        """Account → slots that it may hold; those without such limits are missing."""
        return {by.account: by.limits.at_once for by in self.of(accounts) if by.limits.at_once}

    def deserved(self, group: str) -> Mapping[str, Amounts]:
        """Account (projects, mostly) → its share of a group; what it has beyond is borrowed."""
        return {
            by.account: amounts for by in self.own() if (amounts := by.limits.deserved.get(group))
        }

    def own(self) -> list[InForce]:
        """Of all accounts that have limits of their own."""
        return [
            _in_force(row, target, target.replace(":", " "))
            for target, row in self._rows.items()
            if not target.endswith(f":{EVERY}")
        ]


def _in_force(row: Any, account: str, shown: str) -> InForce:
    return InForce(
        account=account,
        shown=shown,
        name=row.name,
        version=row.version,
        target=row.target,
        text=row.text,
        limits=parse(row.text),
    )
