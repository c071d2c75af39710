"""Domains, projects with their members, users, invitations."""

from __future__ import annotations

from typing import Any, Final

from madang.manager.http import Call, Reply, endpoint
from madang.manager.http.versions import version_of
from madang.manager.identity.api.login import NO_STORE
from madang.manager.identity.api.pages import PageQuery
from madang.manager.identity.service import Invitations, People
from madang.wire.people import (
    Domain,
    DomainPage,
    InvitationDraft,
    InvitationPage,
    Member,
    MemberDraft,
    MemberPage,
    NameDraft,
    NewInvitation,
    Project,
    ProjectDraft,
    ProjectPage,
    Switch,
    User,
    UserChange,
    UserDraft,
    UserPage,
)


class PeopleApi:
    def __init__(self, people: People, invitations: Invitations) -> None:
        self._people: Final = people
        self._invitations: Final = invitations

    # Domains

    @endpoint("GET", "/v1/domains", query=PageQuery, returns=DomainPage)
    async def list_domains(self, call: Call[PageQuery, None]) -> DomainPage:
        """Domains that the caller may see, by name."""
        query = call.query
        found = await self._people.list_domains(call.caller, after=query.cursor, limit=query.limit)
        following = found[-1].name if len(found) == query.limit else None
        return DomainPage(items=tuple(found), next=following)

    @endpoint("POST", "/v1/domains", body=NameDraft, returns=Domain, status=201)
    async def add_domain(self, call: Call[None, NameDraft]) -> Reply:
        """Add a domain; administrators only."""
        return _tagged(await self._people.add_domain(call.caller, call.body.name))

    @endpoint("GET", "/v1/domains/{domain}", returns=Domain)
    async def get_domain(self, call: Call[None, None]) -> Reply:
        """One domain."""
        return _tagged(await self._people.get_domain(call.caller, call.path("domain")))

    @endpoint("PATCH", "/v1/domains/{domain}", body=Switch, returns=Domain, headers=("If-Match",))
    async def switch_domain(self, call: Call[None, Switch]) -> Reply:
        """Disable or enable a domain; administrators only."""
        version = version_of(call.header("If-Match"))
        changed = await self._people.switch_domain(
            call.caller, call.path("domain"), version, disabled=call.body.disabled
        )
        return _tagged(changed)

    # Projects

    @endpoint("GET", "/v1/projects", query=PageQuery, returns=ProjectPage)
    async def list_projects(self, call: Call[PageQuery, None]) -> ProjectPage:
        """Projects that the caller may see, oldest first."""
        query = call.query
        found, following = await self._people.list_projects(
            call.caller, after=query.cursor, limit=query.limit
        )
        return ProjectPage(items=tuple(found), next=following)

    @endpoint("POST", "/v1/projects", body=ProjectDraft, returns=Project, status=201)
    async def add_project(self, call: Call[None, ProjectDraft]) -> Reply:
        """Add a project to a domain; who administers the domain."""
        body = call.body
        return _tagged(await self._people.add_project(call.caller, body.name, body.domain))

    @endpoint("GET", "/v1/projects/{project}", returns=Project)
    async def get_project(self, call: Call[None, None]) -> Reply:
        """One project: NAME in the caller's domain, or DOMAIN/NAME (the slash as %2F)."""
        return _tagged(await self._people.get_project(call.caller, call.path("project")))

    @endpoint(
        "PATCH", "/v1/projects/{project}", body=Switch, returns=Project, headers=("If-Match",)
    )
    async def switch_project(self, call: Call[None, Switch]) -> Reply:
        """Disable or enable a project; who administers its domain."""
        version = version_of(call.header("If-Match"))
        changed = await self._people.switch_project(
            call.caller, call.path("project"), version, disabled=call.body.disabled
        )
        return _tagged(changed)

    @endpoint("GET", "/v1/projects/{project}/members", query=PageQuery, returns=MemberPage)
    async def list_members(self, call: Call[PageQuery, None]) -> MemberPage:
        """Who is in a project, by name."""
        query = call.query
        found = await self._people.list_members(
            call.caller, call.path("project"), after=query.cursor, limit=query.limit
        )
        following = found[-1].user if len(found) == query.limit else None
        return MemberPage(items=tuple(found), next=following)

    @endpoint("PUT", "/v1/projects/{project}/members/{user}", body=MemberDraft, returns=Member)
    async def set_member(self, call: Call[None, MemberDraft]) -> Member:
        """Let a user of the domain into a project, or change their role in it. Idempotent."""
        return await self._people.set_member(
            call.caller, call.path("project"), call.path("user"), call.body.role
        )

    @endpoint("DELETE", "/v1/projects/{project}/members/{user}", status=204)
    async def remove_member(self, call: Call[None, None]) -> None:
        """Take a user out of a project; anybody may leave by themselves."""
        await self._people.remove_member(call.caller, call.path("project"), call.path("user"))

    # Users

    @endpoint("GET", "/v1/users", query=PageQuery, returns=UserPage)
    async def list_users(self, call: Call[PageQuery, None]) -> UserPage:
        """Users that the caller may see, by name."""
        query = call.query
        found = await self._people.list_users(call.caller, after=query.cursor, limit=query.limit)
        following = found[-1].name if len(found) == query.limit else None
        return UserPage(items=tuple(found), next=following)

    @endpoint("POST", "/v1/users", body=UserDraft, returns=NewInvitation, status=201)
    async def add_user(self, call: Call[None, UserDraft]) -> Reply:
        """Add a user; the answer has the code by which they set their password."""
        return Reply(await self._invitations.add_user(call.caller, call.body), NO_STORE)

    @endpoint("GET", "/v1/users/{user}", returns=User)
    async def get_user(self, call: Call[None, None]) -> Reply:
        """One user."""
        return _tagged(await self._people.get_user(call.caller, call.path("user")))

    @endpoint("PATCH", "/v1/users/{user}", body=UserChange, returns=User, headers=("If-Match",))
    async def change_user(self, call: Call[None, UserChange]) -> Reply:
        """Change a user's role or default project, disable or enable them."""
        version = version_of(call.header("If-Match"))
        changed = await self._people.change_user(call.caller, call.path("user"), call.body, version)
        return _tagged(changed)

    # Invitations

    @endpoint("GET", "/v1/invitations", query=PageQuery, returns=InvitationPage)
    async def list_invitations(self, call: Call[PageQuery, None]) -> InvitationPage:
        """Invitations that can still be used, newest first; never their codes."""
        query = call.query
        found = await self._invitations.list(call.caller, after=query.cursor, limit=query.limit)
        following = found[-1].id if len(found) == query.limit else None
        return InvitationPage(items=tuple(found), next=following)

    @endpoint("POST", "/v1/invitations", body=InvitationDraft, returns=NewInvitation, status=201)
    async def invite(self, call: Call[None, InvitationDraft]) -> Reply:
        """Invite somebody into a project, or a user to set a new password; the code, once."""
        return Reply(await self._invitations.invite(call.caller, call.body), NO_STORE)

    @endpoint("DELETE", "/v1/invitations/{invitation}", status=204)
    async def withdraw_invitation(self, call: Call[None, None]) -> None:
        """Take an invitation back."""
        await self._invitations.withdraw(call.caller, call.path("invitation"))


def _tagged(value: Any) -> Reply:
    return Reply(value, {"ETag": f'"{value.version}"'})
