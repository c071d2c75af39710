"""Domains, projects, memberships, users: who changes what is in ``rules.rights``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from madang.kit.clock import Clock
from madang.kit.ids import new_id
from madang.manager.audit.service import actor_of as actor_of_caller
from madang.manager.db import Database, Reader, Transaction, micros, seconds
from madang.manager.http import Caller
from madang.manager.identity.rules import names
from madang.manager.identity.rules.rights import Act, Actor, may_give
from madang.manager.identity.service.actors import (
    actor_of,
    find_domain,
    find_project,
    find_user,
    need,
    no_such,
    target_of_domain,
    target_of_project,
)
from madang.manager.identity.service.authentication import IdentityService
from madang.manager.identity.service.journal import Journal
from madang.manager.identity.store import logins
from madang.manager.identity.store import people as store
from madang.manager.identity.types import ProjectRole, Role
from madang.wire.errors import (
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
)
from madang.wire.people import Domain, Member, Project, User, UserChange


class People:
    def __init__(
        self, database: Database, clock: Clock, identity: IdentityService, journal: Journal
    ) -> None:
        self._database: Final = database
        self._clock: Final = clock
        self._identity: Final = identity
        self._journal: Final = journal

    def _now(self) -> int:
        return micros(self._clock.now())

    def _changed(self) -> None:
        self._identity.forget()
        self._journal.tell()

    # Domains

    async def list_domains(self, caller: Caller, *, after: str | None, limit: int) -> list[Domain]:
        async with self._database.read() as tx:
            rows = await store.list_domains(tx, caller, after=after, limit=limit)
        return [view_domain(row) for row in rows]

    async def get_domain(self, caller: Caller, name: str) -> Domain:
        async with self._database.read() as tx:
            return view_domain(await find_domain(tx, await actor_of(tx, caller), name))

    async def add_domain(self, caller: Caller, name: str) -> Domain:
        if not caller.administers:
            raise Forbidden(f"you ({caller.role}) may not {Act.CHANGE_DOMAIN}.")
        names.check(name, "name")
        async with self._database.begin() as tx:
            if await store.find_domain(tx, name) is not None:
                raise Conflict(f"a domain {name!r} exists.", name=name)
            await store.add_domain(tx, domain_id=(domain_id := new_id()), name=name, at=self._now())
            await self._journal.note(
                tx, actor_of_caller(caller), "domain.created", "domain", domain_id, name
            )
            row = await store.find_domain(tx, name)
        self._journal.tell()
        return view_domain(row)

    async def switch_domain(
        self, caller: Caller, name: str, version: int | None, *, disabled: bool
    ) -> Domain:
        """Disabled: nobody in it can do anything, from now on."""
        async with self._database.begin() as tx:
            actor = await actor_of(tx, caller)
            row = await find_domain(tx, actor, name)
            need(actor, Act.CHANGE_DOMAIN, target_of_domain(row))
            _same(row, version)
            if disabled and not await store.has_other_admin(tx, "", outside=row.id):
                raise Conflict("no administrator would be left outside of this domain.")
            if disabled != (row.disabled_at is not None):
                await store.change_domain(tx, row, disabled_at=self._now() if disabled else None)
                what = f"domain.{'disabled' if disabled else 'enabled'}"
                await self._journal.note(tx, actor_of_caller(caller), what, "domain", row.id, name)
            row = await store.get_domain_by_id(tx, row.id)
        self._changed()
        return view_domain(row)

    # Projects

    async def list_projects(
        self, caller: Caller, *, after: str | None, limit: int
    ) -> tuple[list[Project], str | None]:
        """With the id to go on after."""
        async with self._database.read() as tx:
            rows = await store.list_projects(tx, caller, after=after, limit=limit)
        following = rows[-1].id if len(rows) == limit else None
        return [view_project(row) for row in rows], following

    async def get_project(self, caller: Caller, ref: str) -> Project:
        async with self._database.read() as tx:
            actor = await actor_of(tx, caller)
            return view_project(await find_project(tx, caller, actor, ref))

    async def add_project(self, caller: Caller, name: str, domain: str) -> Project:
        names.check(name, "name")
        async with self._database.begin() as tx:
            actor = await actor_of(tx, caller)
            if domain:
                home = await find_domain(tx, actor, domain)
            else:
                home = await store.get_domain_by_id(tx, caller.domain_id)
            need(actor, Act.ADD_PROJECT, target_of_domain(home))
            if await store.find_project(tx, home.name, name) is not None:
                raise Conflict(f"a project {name!r} exists in domain {home.name}.", name=name)
            project_id = new_id()
            await store.add_project(
                tx, project_id=project_id, domain_id=home.id, name=name, at=self._now()
            )
            await self._journal.note(
                tx,
                actor_of_caller(caller),
                "project.created",
                "project",
                project_id,
                f"{home.name}/{name}",
            )
            row = await store.get_project_by_id(tx, project_id)
        self._journal.tell()
        return view_project(row)

    async def switch_project(
        self, caller: Caller, ref: str, version: int | None, *, disabled: bool
    ) -> Project:
        """Disabled: no new sessions and images in it."""
        async with self._database.begin() as tx:
            actor = await actor_of(tx, caller)
            row = await find_project(tx, caller, actor, ref)
            need(actor, Act.CHANGE_PROJECT, target_of_project(row))
            _same(row, version)
            if disabled != (row.disabled_at is not None):
                await store.change_project(tx, row, disabled_at=self._now() if disabled else None)
                what = f"project.{'disabled' if disabled else 'enabled'}"
                await self._journal.note(
                    tx, actor_of_caller(caller), what, "project", row.id, _path(row)
                )
            row = await store.get_project_by_id(tx, row.id)
        self._changed()
        return view_project(row)

    async def list_members(
        self, caller: Caller, ref: str, *, after: str | None, limit: int
    ) -> list[Member]:
        async with self._database.read() as tx:
            row = await find_project(tx, caller, await actor_of(tx, caller), ref)
            members = await store.list_members(tx, row.id, after=after, limit=limit)
        return [view_member(member) for member in members]

    async def set_member(self, caller: Caller, ref: str, user: str, role: str) -> Member:
        """Let somebody of the same domain in, or give them another role. Idempotent."""
        if role not in tuple(ProjectRole):
            raise InvalidRequest(f"role: {role[:40]!r} is neither member nor admin.", field="role")
        async with self._database.begin() as tx:
            actor = await actor_of(tx, caller)
            row = await find_project(tx, caller, actor, ref)
            need(actor, Act.CHANGE_MEMBERS, target_of_project(row))
            who = await store.find_whole_user(tx, user)
            if who is None or who.domain_id != row.domain_id:
                raise no_such("user", user)
            before = await store.join(
                tx,
                user_id=who.id,
                project_id=row.id,
                role=ProjectRole(role),
                at=self._now(),
            )
            if before != role:
                await store.change_user(tx, who)  # their rights did: streams are looked at anew
                await self._journal.note(
                    tx,
                    actor_of_caller(caller),
                    "project.joined",
                    "project",
                    row.id,
                    _path(row),
                    before=None if before is None else {"user": user, "role": before},
                    after={"user": user, "role": role},
                )
            members = await store.list_members(tx, row.id, after=None, limit=1_000_000)
        self._changed()
        return next(view_member(member) for member in members if member.user == user)

    async def remove_member(self, caller: Caller, ref: str, user: str) -> None:
        """Their sessions in it go on; whoever leaves by themselves needs nobody's leave."""
        async with self._database.begin() as tx:
            actor = await actor_of(tx, caller)
            row = await find_project(tx, caller, actor, ref)
            if user != caller.user:
                need(actor, Act.CHANGE_MEMBERS, target_of_project(row))
            who = await store.find_whole_user(tx, user)
            if who is None or not await store.leave(tx, who.id, row.id):
                raise no_such("member", user)
            await store.change_user(tx, who)
            await self._journal.note(
                tx,
                actor_of_caller(caller),
                "project.left",
                "project",
                row.id,
                _path(row),
                before={"user": user},
            )
        self._changed()

    # Users

    async def list_users(self, caller: Caller, *, after: str | None, limit: int) -> list[User]:
        async with self._database.read() as tx:
            rows = await store.list_users(tx, caller, after=after, limit=limit)
        return [view_user(row) for row in rows]

    async def get_user(self, caller: Caller, name: str) -> User:
        async with self._database.read() as tx:
            row, _ = await find_user(tx, await actor_of(tx, caller), name)
        return view_user(row)

    async def change_user(
        self, caller: Caller, name: str, change: UserChange, version: int | None
    ) -> User:
        async with self._database.begin() as tx:
            actor = await actor_of(tx, caller)
            row, target = await find_user(tx, actor, name)
            _same(row, version)
            columns: dict[str, Any] = {}
            if change.project is not None:
                need(actor, Act.CHOOSE_PROJECT, target)
                columns["project_id"] = await self._own_project(tx, row, change.project)
            if change.role is not None or change.disabled is not None or change.totp is not None:
                need(actor, Act.CHANGE_USER, target)
            if change.role is not None:
                columns["role"] = str(_new_role(actor, row, change.role))
            if change.disabled is not None and change.disabled != (row.disabled_at is not None):
                columns["disabled_at"] = self._now() if change.disabled else None
            if change.totp is not None:
                columns |= _without_totp(caller, row, on=change.totp)
            await self._keep_an_admin(tx, row, columns)
            if columns:
                await store.change_user(tx, row, **columns)
                await self._note_user(tx, caller, row, columns)
            row = await store.get_user_by_id(tx, row.id)
        self._changed()
        return view_user(row)

    async def _own_project(self, tx: Reader, row: Any, ref: str) -> str:
        for each in await store.list_memberships(tx, row.id):
            if ref in {each.project, f"{each.domain}/{each.project}"}:
                return str(each.project_id)
        raise NotFound(f"user {row.name} is in no project {ref[:80]!r}.", ref=ref[:80])

    async def _keep_an_admin(self, tx: Reader, row: Any, columns: dict[str, Any]) -> None:
        gone = columns.get("disabled_at") is not None or columns.get("role", row.role) != Role.ADMIN
        if row.role == Role.ADMIN and gone and not await store.has_other_admin(tx, row.id):
            text = f"{row.name} is the last administrator: make another first."
            raise Conflict(text, user=row.name)

    async def _note_user(
        self, tx: Transaction, caller: Caller, row: Any, columns: dict[str, Any]
    ) -> None:
        if columns.get("totp_since", 0) is None:
            await logins.set_recovery_codes(tx, row.id, [])
        await self._journal.note(
            tx,
            actor_of_caller(caller),
            "user.changed",
            "user",
            row.id,
            row.name,
            before=_shown({key: getattr(row, key) for key in columns}),
            after=_shown(columns),
            domain=row.domain_id,
        )

    # For the caller, and for other slices

    async def memberships(self, user_id: str) -> list[Any]:
        async with self._database.read() as tx:
            return await store.list_memberships(tx, user_id)

    async def domain_name(self, domain_id: str) -> str:
        async with self._database.read() as tx:
            row = await store.get_domain_by_id(tx, domain_id)
        return str(row.name)

    async def project_for(self, tx: Reader, caller: Caller, ref: str | None) -> str:
        """The id of the project that something new of the caller's belongs to.

        *ref* None or empty: the default one. Raises NotFound where they are no member, Forbidden
        where it is disabled.
        """
        rows = await store.list_memberships(tx, caller.user_id)
        for row in rows:
            wanted = {row.project, f"{row.domain}/{row.project}"}
            if ref in wanted or (not ref and row.project_id == caller.project_id):
                if row.disabled_at is not None or row.domain_disabled_at is not None:
                    text = f"project {row.project} is disabled: nothing new starts in it."
                    raise Forbidden(text, project=row.project)
                return str(row.project_id)
        if ref:
            raise no_such("project", ref)
        raise Forbidden(
            "you are no member of your default project any more: choose another with "
            "`madang user set YOU --project NAME`."
        )


def _new_role(actor: Actor, row: Any, wanted: str) -> Role:
    if wanted not in tuple(Role):
        known = ", ".join(Role)
        raise InvalidRequest(f"role: {wanted[:40]!r} is none of {known}.", field="role")
    role = Role(wanted)
    if not (may_give(actor, role) and may_give(actor, Role(row.role))):
        raise Forbidden(f"you ({actor.role}) may not make a {row.role} a {role}.", role=wanted)
    return role


def _without_totp(caller: Caller, row: Any, *, on: bool) -> dict[str, Any]:
    if on:
        raise InvalidRequest("totp: only they themselves can set it up.", field="totp")
    if row.id == caller.user_id:
        raise Forbidden("your own second factor goes with your password: `madang totp off`.")
    return {"totp": None, "totp_since": None, "totp_step": 0}


def _shown(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a user as the audit log has them."""
    found: dict[str, Any] = {}
    if "role" in columns:
        found["role"] = columns["role"]
    if "project_id" in columns:
        found["project"] = columns["project_id"]
    if "disabled_at" in columns:
        found["disabled"] = columns["disabled_at"] is not None
    if "totp_since" in columns:
        found["totp"] = columns["totp_since"] is not None
    return found


def _same(row: Any, version: int | None) -> None:
    if version is not None and row.version != version:
        text = f"{row.name} is at version {row.version}, not {version}."
        raise PreconditionFailed(text, version=row.version)


def _path(row: Any) -> str:
    return f"{row.domain}/{row.name}"


def _when(stored: int | None) -> float | None:
    return None if stored is None else seconds(stored)


def view_domain(row: Any) -> Domain:
    return Domain(
        name=row.name,
        created_at=seconds(row.created_at),
        disabled_at=_when(row.disabled_at),
        version=row.version,
    )


def view_project(row: Any) -> Project:
    return Project(
        name=row.name,
        domain=row.domain,
        created_at=seconds(row.created_at),
        disabled_at=_when(row.disabled_at),
        version=row.version,
    )


def view_member(row: Any) -> Member:
    return Member(user=row.user, role=row.role, since=seconds(row.created_at))


def view_user(row: Any) -> User:
    return User(
        name=row.name,
        domain=row.domain,
        role=row.role,
        project=row.project,
        created_at=seconds(row.created_at),
        disabled_at=_when(row.disabled_at),
        has_password=row.password is not None,
        has_totp=row.totp_since is not None,
        version=row.version,
    )
