"""Values of the policy slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from madang.manager.db import Transaction
from madang.wire.policies import PolicyEffect
from madang.wire.policy import SITE

GROUP_PREFIX: Final = "group:"
NODE_PREFIX: Final = "node:"
PROJECT_PREFIX: Final = "project:"
"""In the database with the project's id, for people with its name, after its domain's if that is
not their own: ``project:physics/lab``."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectRow:
    """A project, and what a caller is in it."""

    id: str
    name: str
    domain_id: str
    domain: str
    role: str | None
    """Of the caller's membership; None: no member."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a session is: which layers above its image's concern it."""

    node: str
    group: str
    project: str
    """Its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Which sessions a layer concerns; all None: every one."""

    node: str | None = None
    group: str | None = None
    project: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a text stands, for one caller."""

    layer: str
    key: str
    """The target as stored."""
    shown: str
    """The target as the caller names it."""
    scope: Scope
    changeable: bool
    """By the caller."""


@dataclass(frozen=True, slots=True)
class Demands:
    """What machines must keep of the layers in force."""

    kinds: Mapping[str, Mapping[str, str]]
    """Target as stored → kinds of rules (``policy_kept``) → place of the first; none: missing."""

    def shared(self, group: str, project: str) -> list[Mapping[str, str]]:
        """Of the layers that all sessions of a group and a project (its id) have, in order."""
        return [self._of(SITE), self._of(GROUP_PREFIX + group), self._of(PROJECT_PREFIX + project)]

    def of_node(self, name: str) -> Mapping[str, str]:
        return self._of(NODE_PREFIX + name)

    @property
    def of_nodes(self) -> bool:
        """Whether any machine has a layer of its own."""
        return any(target.startswith(NODE_PREFIX) for target in self.kinds)

    def _of(self, target: str) -> Mapping[str, str]:
        return self.kinds.get(target, {})


class Followers(Protocol):
    """What the session slice, which lies above this one, does when a policy changes."""

    async def concern(self, tx: Transaction, scope: Scope) -> None:
        """Its sessions are to be told anew; with the change itself."""
        ...

    async def effect(self, scope: Scope, later: Sequence[str]) -> PolicyEffect:
        """Tell them, and wait a little until they have it. *later*: places of static rules."""
        ...
