"""Invitations: the only way in. A code is shown once, stored as a hash, and used once."""

from __future__ import annotations

import secrets
from typing import Any, Final

from madang.kit.clock import Clock
from madang.kit.ids import new_id
from madang.manager.audit.service import Actor, actor_of, stranger
from madang.manager.db import Database, Reader, Transaction, micros, seconds
from madang.manager.http import Caller, origin
from madang.manager.identity.rules import names, throttle
from madang.manager.identity.rules.rights import Act, may_give
from madang.manager.identity.rules.rights import Actor as Acting
from madang.manager.identity.service import actors
from madang.manager.identity.service.authentication import IdentityService, digest_of
from madang.manager.identity.service.journal import Journal
from madang.manager.identity.service.logins import LoggedIn, Logins
from madang.manager.identity.store import logins as store
from madang.manager.identity.store import people, tokens
from madang.manager.identity.types import INVITATION_PREFIX, Role
from madang.wire.errors import Conflict, Forbidden, InvalidRequest, InvitationInvalid
from madang.wire.people import (
    Acceptance,
    Invitation,
    InvitationDraft,
    LoginReply,
    NewInvitation,
    UserDraft,
)

_ANY_ACCOUNT: Final = ""
"""These attempts name no account: they count by their source alone."""
_NO_INVITATION: Final = "the invitation is not valid, or was used. Ask for another."


class Invitations:
    def __init__(
        self,
        database: Database,
        clock: Clock,
        max_s: float,
        identity: IdentityService,
        logins: Logins,
        journal: Journal,
    ) -> None:
        """*max_s*: how long one may be valid at most."""
        self._database: Final = database
        self._clock: Final = clock
        self._max_s: Final = max_s
        self._identity: Final = identity
        self._logins: Final = logins
        self._journal: Final = journal

    def _now(self) -> int:
        return micros(self._clock.now())

    async def list(self, caller: Caller, *, after: str | None, limit: int) -> list[Invitation]:
        """Open ones, newest first: of the caller's domain, of all for administrators."""
        if caller.role not in {Role.ADMIN, Role.MONITOR, Role.DOMAIN_ADMIN}:
            raise Forbidden(f"you ({caller.role}) may not {Act.INVITE}.")
        domain = None if caller.sees_all else caller.domain_id
        async with self._database.read() as tx:
            rows = await store.list_invitations(
                tx, domain_id=domain, now=self._now(), after=after, limit=limit
            )
        return [_view(row) for row in rows]

    async def invite(self, caller: Caller, draft: InvitationDraft) -> NewInvitation:
        """Someone new, or a user who shall set a new password."""
        async with self._database.begin() as tx:
            actor = await actors.actor_of(tx, caller)
            if draft.user:
                row, target = await actors.find_user(tx, actor, draft.user)
                actors.need(actor, Act.CHANGE_USER, target)
                made = await self._invite(
                    tx, caller, row.project_id, row.role, draft.expires_s, row.id
                )
            else:
                project, role = await self._place(tx, caller, actor, draft.project, draft.role)
                made = await self._invite(tx, caller, project.id, role, draft.expires_s, None)
        self._journal.tell()
        return made

    async def add_user(self, caller: Caller, draft: UserDraft) -> NewInvitation:
        """At once, without a password; the code lets them set it."""
        names.check(draft.name, "name")
        async with self._database.begin() as tx:
            actor = await actors.actor_of(tx, caller)
            project, role = await self._place(tx, caller, actor, draft.project, draft.role)
            if await people.find_user(tx, draft.name) is not None:
                raise Conflict(f"the name {draft.name!r} is taken.", name=draft.name)
            user_id = new_id()
            await self._add_user(tx, actor_of(caller), user_id, draft.name, role, project, None)
            made = await self._invite(tx, caller, project.id, role, draft.expires_s, user_id)
        self._journal.tell()
        return made

    async def _place(
        self, tx: Reader, caller: Caller, actor: Acting, ref: str, role: str
    ) -> tuple[Any, Role]:
        """Project and role of someone new, if the caller may give both."""
        if role not in tuple(Role):
            raise InvalidRequest(f"role: {role[:40]!r} is none of {', '.join(Role)}.", field="role")
        if ref:
            project = await actors.find_project(tx, caller, actor, ref)
        else:
            project = await people.get_project_by_id(tx, caller.project_id)
        actors.need(actor, Act.INVITE, actors.target_of_project(project))
        if not may_give(actor, Role(role)):
            raise Forbidden(f"you ({actor.role}) may not make anybody a {role}.", role=role)
        return project, Role(role)

    async def _invite(
        self,
        tx: Transaction,
        caller: Caller,
        project_id: str,
        role: str,
        expires_s: float,
        user_id: str | None,
    ) -> NewInvitation:
        most = self._max_s
        if not 60 <= expires_s <= most:
            raise InvalidRequest(
                f"expires_s: between 60 and {most:.0f} seconds.", field="expires_s"
            )
        now = self._now()
        code = INVITATION_PREFIX + secrets.token_urlsafe(32)
        invitation_id = new_id()
        if user_id is not None:
            await store.withdraw_invitations(tx, user_id, now)
        await store.add_invitation(
            tx,
            id=invitation_id,
            digest=digest_of(code),
            project_id=project_id,
            role=str(role),
            user_id=user_id,
            made_by=caller.user_id,
            created_at=now,
            expires_at=now + micros(expires_s),
        )
        row = await store.find_invitation_by_id(tx, invitation_id, now)
        assert row is not None
        await self._journal.note(
            tx,
            actor_of(caller),
            "invitation.created",
            "invitation",
            invitation_id,
            row.for_user or row.project,
            after={"project": row.project, "role": str(role), "user": row.for_user},
            domain=row.domain_id,
        )
        return NewInvitation(invitation=_view(row), code=code)

    async def withdraw(self, caller: Caller, invitation_id: str) -> None:
        now = self._now()
        async with self._database.begin() as tx:
            actor = await actors.actor_of(tx, caller)
            row = await store.find_invitation_by_id(tx, invitation_id, now)
            sees = row is not None and (
                caller.sees_all
                or (caller.role == Role.DOMAIN_ADMIN and row.domain_id == caller.domain_id)
            )
            if row is None or not sees:
                raise actors.no_such("invitation", invitation_id)
            project = await people.get_project_by_id(tx, row.project_id)
            actors.need(actor, Act.INVITE, actors.target_of_project(project))
            if await store.use_invitation(tx, invitation_id, now):
                await self._journal.note(
                    tx,
                    actor_of(caller),
                    "invitation.withdrawn",
                    "invitation",
                    invitation_id,
                    row.for_user or row.project,
                    domain=row.domain_id,
                )
        self._journal.tell()

    async def accept(self, use: Acceptance) -> LoggedIn:
        """Once: a new user, or a new password; with a login where that needs no second factor."""
        counted = throttle.counters(_ANY_ACCOUNT, origin.current().source)[1:2]
        await self._logins.gate.count(counted)
        digest = digest_of(use.code)
        async with self._database.read() as tx:
            found = await self._open_invitation(tx, digest)
        name = found.for_user or names.check(use.user, "user")
        names.check_password(use.password, name)
        hashed = await self._logins.passwords.hash(use.password)
        async with self._database.begin() as tx:
            row = await self._open_invitation(tx, digest)
            if not await store.use_invitation(tx, row.id, self._now()):
                raise InvitationInvalid(_NO_INVITATION)
            if row.user_id is None:
                user_id = await self._welcome(tx, row, name, hashed)
            else:
                user_id = await self._reset(tx, row, hashed)
            user = await people.get_user_by_id(tx, user_id)
            if user.totp_since is None:
                done = await self._logins.admit(tx, user, use.token)
            else:
                done = LoggedIn(LoginReply(user=user.name, expires_at=None))
            await self._logins.gate.forgive(tx, counted)
        self._identity.forget()
        self._journal.tell()
        return done

    async def _open_invitation(self, tx: Reader, digest: str) -> Any:
        """It, its project and whoever made it are still good. Raises InvitationInvalid."""
        row = await store.find_invitation(tx, digest, self._now())
        if (
            row is None
            or row.by_disabled_at is not None
            or row.project_disabled_at is not None
            or row.domain_disabled_at is not None
            or not may_give(_maker(row), Role(row.role))
        ):
            raise InvitationInvalid(_NO_INVITATION)
        return row

    async def _welcome(self, tx: Transaction, row: Any, name: str, hashed: str) -> str:
        if await people.find_user(tx, name) is not None:
            raise Conflict(f"the name {name!r} is taken: choose another.", name=name)
        project = await people.get_project_by_id(tx, row.project_id)
        user_id = new_id()
        guest = stranger(name)
        await self._add_user(tx, guest, user_id, name, Role(row.role), project, hashed)
        return user_id

    async def _add_user(
        self,
        tx: Transaction,
        actor: Actor,
        user_id: str,
        name: str,
        role: Role,
        project: Any,
        hashed: str | None,
    ) -> None:
        await people.add_user(
            tx,
            user_id=user_id,
            name=name,
            role=role,
            project_id=project.id,
            created_at=self._now(),
            domain_id=project.domain_id,
            password=hashed,
        )
        await self._journal.note(
            tx,
            actor,
            "user.created",
            "user",
            user_id,
            name,
            after={"role": str(role), "domain": project.domain, "project": project.name},
            domain=project.domain_id,
        )

    async def _reset(self, tx: Transaction, row: Any, hashed: str) -> str:
        user = await people.get_user_by_id(tx, row.user_id)
        if user.disabled_at is not None:
            raise InvitationInvalid(_NO_INVITATION)
        now = self._now()
        await people.change_user(tx, user, password=hashed)
        await tokens.revoke_logins(tx, user.id, now)
        await self._journal.note(
            tx,
            stranger(user.name),
            "user.password_reset",
            "user",
            user.id,
            user.name,
            domain=user.domain_id,
        )
        return str(user.id)


def _maker(row: Any) -> Acting:
    return Acting(user_id=row.made_by, role=Role(row.by_role), domain_id=row.domain_id)


def _view(row: Any) -> Invitation:
    return Invitation(
        id=row.id,
        project=row.project,
        domain=row.domain,
        role=row.role,
        user=row.for_user,
        made_by=row.by_user,
        created_at=seconds(row.created_at),
        expires_at=seconds(row.expires_at),
    )
