"""What accounts with a limit hold, while a plan is made: in all groups together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from madang.manager.scheduling.types import Amounts, Ask, Held, Policy


class Holdings:
    """Only accounts that some policy limits are counted."""

    def __init__(self, held: Sequence[Held], policies: Iterable[Policy]) -> None:
        self._of: Final[dict[str, dict[str, int]]] = {
            account: {} for policy in policies for account in policy.limits
        }
        if self._of:
            for one in held:
                milli = sum(milli for _, milli in one.devices)
                self._add(one.payers, {**one.slots, "device_milli": milli})

    def of(self, account: str) -> Mapping[str, int]:
        return self._of[account]

    def take(self, ask: Ask) -> None:
        """It was placed."""
        if self._of:
            self._add(ask.payers, wanted(ask))

    def _add(self, accounts: Iterable[str], amounts: Amounts) -> None:
        for account in accounts:
            if (mine := self._of.get(account)) is not None:
                for slot, amount in amounts.items():
                    mine[slot] = mine.get(slot, 0) + amount


def wanted(ask: Ask) -> dict[str, int]:
    """What all members take, devices among it."""
    found = {slot: amount * ask.members for slot, amount in ask.slots.items()}
    if ask.devices:
        found["device_milli"] = ask.devices * ask.device_milli * ask.members
    return found
