"""Deserved shares: who holds more than theirs, and who may have it back.

An account with a share in a group may hold more while nobody else needs it. A session that fits
into what its account deserves may have sessions of others ended until these hold no more than
theirs: never below it, and nobody of higher priority.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from madang.manager.scheduling.planner.holdings import wanted
from madang.manager.scheduling.types import Amounts, Ask, Held


class Borrowing:
    """In one group as a pass begins; ``Loans`` of it follow what is given back."""

    def __init__(self, deserved: Mapping[str, Amounts], held: Sequence[Held]) -> None:
        self._deserved: Final = deserved
        self._holds: Final[dict[str, dict[str, int]]] = {account: {} for account in deserved}
        if deserved:
            for one in held:
                for account in one.payers:
                    _add(self._holds.get(account), amounts_of(one))

    def owed(self, ask: Ask) -> bool:
        """Whether all that *ask* takes lies within the share of an account of it."""
        needs = wanted(ask)
        return any(
            all(
                self._holds[account].get(s, 0) + needs.get(s, 0) <= most for s, most in mine.items()
            )
            for account in ask.payers
            if (mine := self._deserved.get(account))
        )

    def loans(self) -> Loans:
        return Loans(
            {
                account: {
                    slot: self._holds[account].get(slot, 0) - most for slot, most in mine.items()
                }
                for account, mine in self._deserved.items()
            }
        )


class Loans:
    """How much each account holds beyond its share, while some of it is taken back."""

    def __init__(self, beyond: dict[str, dict[str, int]]) -> None:
        self._beyond: Final = beyond

    def copy(self) -> Loans:
        return Loans({account: dict(mine) for account, mine in self._beyond.items()})

    def borrowed(self, one: Held) -> bool:
        """Whether an account of it would still have its share in some slot without it."""
        amounts = amounts_of(one)
        return any(
            any(amounts.get(slot, 0) and amount > 0 for slot, amount in mine.items())
            for account in one.payers
            if (mine := self._beyond.get(account)) is not None
        )

    def give_back_all(self, parts: Iterable[Held]) -> None:
        for one in parts:
            self.give_back(one)

    def give_back(self, one: Held) -> None:
        amounts = amounts_of(one)
        for account in one.payers:
            if (mine := self._beyond.get(account)) is not None:
                for slot in mine:
                    mine[slot] -= amounts.get(slot, 0)


def amounts_of(one: Held) -> dict[str, int]:
    """Devices among them."""
    return {**one.slots, "device_milli": sum(milli for _, milli in one.devices)}


def _add(mine: dict[str, int] | None, amounts: Mapping[str, int]) -> None:
    if mine is not None:
        for slot, amount in amounts.items():
            mine[slot] = mine.get(slot, 0) + amount
