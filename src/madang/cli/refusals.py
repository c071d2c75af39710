"""What a session's sandbox policy refused, told where people look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from madang.cli.printable import printable
from madang.wire.errors import LogGone, NodeUnavailable

if TYPE_CHECKING:
    from madang.client.sync import Client
    from madang.wire.policy import Refusal
    from madang.wire.session import Session

MOST_SHOWN: Final = 10


def refusals_of(client: Client, session: Session) -> list[Refusal]:
    """Without asking where the session says that there are none, and none where nobody knows."""
    if not session.refusals:
        return []
    try:
        return client.list_refusals(session.id)
    except (LogGone, NodeUnavailable):
        return []


def describe(refusal: Refusal) -> str:
    """``connect to 10.0.0.5:5432 refused by site policy, line 12 (why) · EPERM · 3 times``"""
    times = f" · {refusal.count:,} times" if refusal.count > 1 else ""
    return printable(f"{refusal.text} · {refusal.answer}{times}")


def print_refusals(refusals: Sequence[Refusal], session: Session) -> None:
    """The newest ones, below a session's facts."""
    if not session.refusals:
        return
    print(f"refused   {session.refusals:,} times by its sandbox policy")
    for refusal in refusals[-MOST_SHOWN:]:
        print(f"  {describe(refusal)}")
    if len(refusals) > MOST_SHOWN:
        print(f"  {len(refusals) - MOST_SHOWN:,} more: madang policy refusals {session.name}")
