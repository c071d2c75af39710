"""Logging in and out, and who one is."""

from __future__ import annotations

from typing import Any, Final

from madang.manager.db import seconds
from madang.manager.http import Call, Reply, endpoint
from madang.manager.http.credentials import credentials_of
from madang.manager.identity.rules import origins
from madang.manager.identity.service import Invitations, Logins, People
from madang.manager.identity.service.logins import LoggedIn
from madang.manager.identity.types import COOKIE_PREFIX, Principal, TokenKind
from madang.wire.errors import CrossSite
from madang.wire.people import Acceptance, LoginReply, LoginRequest, ProjectRole, WhoAmI

NO_STORE: Final = {"Cache-Control": "no-store"}


class LoginApi:
    def __init__(
        self, people: People, logins: Logins, invitations: Invitations, browser_max_s: float
    ) -> None:
        self._people: Final = people
        self._logins: Final = logins
        self._invitations: Final = invitations
        self._browser_max_s: Final = browser_max_s

    @endpoint("GET", "/v1/whoami", returns=WhoAmI)
    async def whoami(self, call: Call[None, None]) -> Reply:
        """Who the token belongs to, and what it may do."""
        caller = principal(call)
        rows = await self._people.memberships(caller.user_id)
        projects = tuple(ProjectRole(project=row.project, role=row.role) for row in rows)
        default = (row.project for row in rows if row.project_id == caller.project_id)
        expires = caller.expires_at
        who = WhoAmI(
            user=caller.user,
            role=str(caller.role),
            token=caller.token,
            domain=await self._people.domain_name(caller.domain_id),
            project=next(default, ""),
            projects=projects,
            scopes=tuple(sorted(caller.scopes)),
            kind=caller.kind,
            expires_at=None if expires is None else seconds(expires),
            csrf=_csrf(call) if caller.kind == TokenKind.BROWSER else "",
        )
        return Reply(who, NO_STORE)

    @endpoint("POST", "/v1/login", auth=False, body=LoginRequest, returns=LoginReply)
    async def login(self, call: Call[None, LoginRequest]) -> Reply:
        """Log in with a password: a cookie for a browser, or a token by the name given."""
        _refuse_other_sites(call)
        return self._welcome(call, await self._logins.login(call.body))

    @endpoint("POST", "/v1/invitations/accept", auth=False, body=Acceptance, returns=LoginReply)
    async def accept_invitation(self, call: Call[None, Acceptance]) -> Reply:
        """Use an invitation: choose a name and a password, or a new password. Logs in."""
        _refuse_other_sites(call)
        return self._welcome(call, await self._invitations.accept(call.body))

    @endpoint("POST", "/v1/logout", scope="read", status=204)
    async def logout(self, call: Call[None, None]) -> Reply:
        """End the browser session, or revoke the token, that the call comes with."""
        await self._logins.logout(principal(call))
        cleared = [name for name in (origins.SECURE_COOKIE, origins.COOKIE) if _cookie(call, name)]
        headers = {"Set-Cookie": _set_cookie(cleared[0], "", 0)} if cleared else {}
        return Reply(None, headers)

    def _welcome(self, call: Call[Any, Any], done: LoggedIn) -> Reply:
        headers = dict(NO_STORE)
        if done.cookie:
            secure = call.request.secure or origins.is_secure(call.header("Origin"))
            name = origins.SECURE_COOKIE if secure else origins.COOKIE
            headers["Set-Cookie"] = _set_cookie(name, done.cookie, int(self._browser_max_s))
        return Reply(done.reply, headers)


def principal(call: Call[Any, Any]) -> Principal:
    caller = call.caller
    assert isinstance(caller, Principal), "this slice authenticates"
    return caller


def _cookie(call: Call[Any, Any], name: str) -> str | None:
    return call.request.cookies.get(name)


def _csrf(call: Call[Any, Any]) -> str:
    shown = _cookie(call, origins.SECURE_COOKIE) or _cookie(call, origins.COOKIE) or ""
    return origins.csrf_of(shown) if shown.startswith(COOKIE_PREFIX) else ""


def _set_cookie(name: str, value: str, age_s: int) -> str:
    secure = "; Secure" if name == origins.SECURE_COOKIE else ""
    return f"{name}={value}; Path=/; Max-Age={age_s}; HttpOnly; SameSite=Lax{secure}"


def _refuse_other_sites(call: Call[Any, Any]) -> None:
    """No page of another site logs somebody in here, into whose account ever."""
    shown = credentials_of(call.request)
    from_browser = shown.origin is not None or shown.fetch_site is not None
    if from_browser and not origins.is_ours(shown.origin, shown.fetch_site, shown.host):
        raise CrossSite("the request comes from another site.")
