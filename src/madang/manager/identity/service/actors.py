"""Callers and targets as the rules see them, read in the transaction that acts on them."""

from __future__ import annotations

from typing import Any

from madang.manager.db import Reader
from madang.manager.http import Caller
from madang.manager.identity.rules.rights import Act, Actor, Target, may
from madang.manager.identity.store import people as store
from madang.manager.identity.types import ProjectRole, Role
from madang.wire.errors import Forbidden, NotFound


async def actor_of(tx: Reader, caller: Caller) -> Actor:
    rows = await store.list_memberships(tx, caller.user_id)
    return Actor(
        user_id=caller.user_id,
        role=Role(caller.role),
        domain_id=caller.domain_id,
        projects={row.project_id: ProjectRole(row.role) for row in rows},
    )


async def target_of_user(tx: Reader, row: Any) -> Target:
    rows = await store.list_memberships(tx, row.id)
    return Target(
        domain_id=row.domain_id,
        project_ids=frozenset(each.project_id for each in rows),
        user_id=row.id,
        role=Role(row.role),
    )


def target_of_project(row: Any) -> Target:
    return Target(domain_id=row.domain_id, project_ids=frozenset({row.id}))


def target_of_domain(row: Any) -> Target:
    return Target(domain_id=row.id)


async def find_user(tx: Reader, actor: Actor, name: str) -> tuple[Any, Target]:
    """One whom the actor may see. Raises NotFound."""
    row = await store.find_whole_user(tx, name)
    if row is not None:
        target = await target_of_user(tx, row)
        if may(actor, Act.SEE_USER, target):
            return row, target
    raise no_such("user", name)


async def find_project(tx: Reader, caller: Caller, actor: Actor, ref: str) -> Any:
    """By ``NAME`` in the caller's domain or by ``DOMAIN/NAME``. Raises NotFound."""
    domain, separator, name = ref.rpartition("/")
    if not separator:
        own = await store.get_domain_by_id(tx, caller.domain_id)
        domain = own.name
    row = await store.find_project(tx, domain, name)
    if row is not None and may(actor, Act.SEE_PROJECT, target_of_project(row)):
        return row
    raise no_such("project", ref)


async def find_domain(tx: Reader, actor: Actor, name: str) -> Any:
    row = await store.find_domain(tx, name)
    if row is not None and may(actor, Act.SEE_DOMAIN, target_of_domain(row)):
        return row
    raise no_such("domain", name)


def no_such(kind: str, name: str) -> NotFound:
    return NotFound(f"no {kind} {name[:80]!r} that you may see.", ref=name[:80])


def need(actor: Actor, act: Act, target: Target) -> None:
    """Of a target that the actor sees. Raises Forbidden."""
    if not may(actor, act, target):
        raise Forbidden(f"you ({actor.role}) may not {act}.", act=act.name.lower())
