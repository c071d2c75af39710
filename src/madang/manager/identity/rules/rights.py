"""Who may do what to which person, project or domain: one table.

How an actor stands to a target gives *standings*; an act is allowed to the standings in its line.
Whoever may not even see a target is told the same as if it did not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from madang.manager.identity.types import ProjectRole, Role


class Standing(StrEnum):
    """How the actor stands to the target."""

    SELF = "self"
    FELLOW = "fellow"
    """They share a project; of a project: a member."""
    PROJECT_ADMIN = "project_admin"
    """Of the target, or of a project that the target is in."""
    OF_DOMAIN = "of_domain"
    """They belong to the same domain."""
    DOMAIN_ADMIN = "domain_admin"
    MONITOR = "monitor"
    ADMIN = "admin"


class Act(StrEnum):
    SEE_DOMAIN = "see a domain"
    CHANGE_DOMAIN = "add, disable or enable a domain"
    ADD_PROJECT = "add a project to a domain"
    SEE_PROJECT = "see a project and its members"
    CHANGE_PROJECT = "disable or enable a project"
    CHANGE_MEMBERS = "let people into a project, or out of it"
    SEE_USER = "see a user"
    INVITE = "invite people into a project, or add users to it"
    CHANGE_USER = "change a user's role, disable or enable them, let them set a new password"
    CHOOSE_PROJECT = "choose a user's default project"
    SEE_TOKENS = "list and revoke a user's tokens"


S = Standing
MAY: Final[Mapping[Act, frozenset[Standing]]] = {
    Act.SEE_DOMAIN: frozenset({S.OF_DOMAIN, S.DOMAIN_ADMIN, S.MONITOR, S.ADMIN}),
    Act.CHANGE_DOMAIN: frozenset({S.ADMIN}),
    Act.ADD_PROJECT: frozenset({S.DOMAIN_ADMIN, S.ADMIN}),
    Act.SEE_PROJECT: frozenset({S.FELLOW, S.PROJECT_ADMIN, S.DOMAIN_ADMIN, S.MONITOR, S.ADMIN}),
    Act.CHANGE_PROJECT: frozenset({S.DOMAIN_ADMIN, S.ADMIN}),
    Act.CHANGE_MEMBERS: frozenset({S.PROJECT_ADMIN, S.DOMAIN_ADMIN, S.ADMIN}),
    Act.SEE_USER: frozenset(
        {S.SELF, S.FELLOW, S.PROJECT_ADMIN, S.DOMAIN_ADMIN, S.MONITOR, S.ADMIN}
    ),
    Act.INVITE: frozenset({S.DOMAIN_ADMIN, S.ADMIN}),
    Act.CHANGE_USER: frozenset({S.DOMAIN_ADMIN, S.ADMIN}),
    Act.CHOOSE_PROJECT: frozenset({S.SELF, S.DOMAIN_ADMIN, S.ADMIN}),
    Act.SEE_TOKENS: frozenset({S.SELF, S.DOMAIN_ADMIN, S.ADMIN}),
}
GIVES: Final[Mapping[Role, frozenset[Role]]] = {
    Role.ADMIN: frozenset(Role),
    Role.DOMAIN_ADMIN: frozenset({Role.USER, Role.DOMAIN_ADMIN}),
    Role.MONITOR: frozenset(),
    Role.USER: frozenset(),
}
"""Which roles each role may give to others, or take from who has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    user_id: str
    role: Role
    domain_id: str
    projects: Mapping[str, ProjectRole] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A domain; a project (*project_ids* has it alone); or a user with their projects."""

    domain_id: str
    project_ids: frozenset[str] = frozenset()
    user_id: str | None = None
    role: Role | None = None
    """Of a user."""


def standings(actor: Actor, target: Target) -> frozenset[Standing]:
    found = set()
    if target.user_id == actor.user_id:
        found.add(S.SELF)
    if actor.domain_id == target.domain_id:
        found.add(S.OF_DOMAIN)
    shared = {role for project, role in actor.projects.items() if project in target.project_ids}
    if shared:
        found.add(S.FELLOW)
    if ProjectRole.ADMIN in shared:
        found.add(S.PROJECT_ADMIN)
    if actor.role is Role.ADMIN:
        found.add(S.ADMIN)
    if actor.role is Role.MONITOR:
        found.add(S.MONITOR)
    reachable = target.role is None or target.role in GIVES[Role.DOMAIN_ADMIN]
    if actor.role is Role.DOMAIN_ADMIN and S.OF_DOMAIN in found and reachable:
        found.add(S.DOMAIN_ADMIN)
    return frozenset(found)


def may(actor: Actor, act: Act, target: Target) -> bool:
    if actor.role is Role.MONITOR and act not in _READING and target.user_id != actor.user_id:
        return False
    return not standings(actor, target).isdisjoint(MAY[act])


_READING: Final = frozenset({Act.SEE_DOMAIN, Act.SEE_PROJECT, Act.SEE_USER, Act.SEE_TOKENS})


def may_give(actor: Actor, role: Role) -> bool:
    """Whether the actor may make somebody a *role*."""
    return role in GIVES[actor.role]
