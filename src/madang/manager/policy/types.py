"""Values of the policy slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from madang.manager.db import Transaction
from madang.wire.policies import PolicyEffect

NODE_PREFIX: Final = "node:"
SESSION_PREFIX: Final = "session:"
"""A session's own layer, by the session's id; kept for the log, in force is the session's spec."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRow:
    """A row as stored; times in microseconds."""

    id: int
    target: str
    version: int
    text: str
    digest: str
    author_id: str
    author: str
    at: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CountRow:
    """How often a rule of a version has refused something."""

    target: str
    version: int
    line: int
    refused: int


class Followers(Protocol):
    """What the session slice, which lies above this one, does when a policy changes."""

    async def concern(self, tx: Transaction, node: str | None) -> None:
        """All sessions on *node*, or everywhere, are to be told anew; with the change itself."""
        ...

    async def effect(self, node: str | None, later: Sequence[str]) -> PolicyEffect:
        """Tell them, and wait a little until they have it. *later*: places of static rules."""
        ...
