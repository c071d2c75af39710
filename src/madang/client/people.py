"""Requests about people, as values: ``client.call(people.users())``, in both clients.

A list comes in pages: ``following`` goes on where a page ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import quote

from madang.client.calls import Call, query
from madang.kit.codec import from_json, to_json
from madang.wire import people as wire
from madang.wire.errors import InvalidRequest, PlatformError

T = TypeVar("T")
_JSON: Final = {"Content-Type": "application/json"}


class _Caller(Protocol):
    def call(self, call: Call[T]) -> T: ...


def every(client: _Caller, make: Callable[[str | None], Call[Any]]) -> Iterator[Any]:
    """All items of all pages; *make* makes the request of one, by its cursor."""
    cursor: str | None = None
    while True:
        page = client.call(make(cursor))
        yield from page.items
        if (cursor := page.next) is None:
            return


def _call(
    method: str,
    path: str,
    kind: type[T],
    body: Any = None,
    *,
    version: int | None = None,
    repeatable: bool = False,
) -> Call[T]:
    headers = {} if body is None else dict(_JSON)
    if version is not None:
        headers["If-Match"] = f'"{version}"'

    def decode(data: bytes) -> T:
        try:
            return from_json(kind, data)
        except InvalidRequest as exc:
            raise PlatformError(f"the server's answer can't be read: {exc}") from exc

    return Call(
        method=method,
        path=path,
        body=b"" if body is None else to_json(body),
        headers=headers,
        decode=decode,
        repeatable=repeatable or method == "GET",
    )


def _done(method: str, path: str, body: Any = None) -> Call[None]:
    return Call(
        method=method,
        path=path,
        body=b"" if body is None else to_json(body),
        headers={} if body is None else dict(_JSON),
        decode=lambda _: None,
        repeatable=False,
    )


def _path(kind: str, name: str, rest: str = "") -> str:
    return f"/v1/{kind}/{quote(name, safe='')}{rest}"


# Coming and going


def login(request: wire.LoginRequest) -> Call[wire.LoginReply]:
    return _call("POST", "/v1/login", wire.LoginReply, request)


def accept(use: wire.Acceptance) -> Call[wire.LoginReply]:
    return _call("POST", "/v1/invitations/accept", wire.LoginReply, use)


def logout() -> Call[None]:
    return _done("POST", "/v1/logout")


# The own account


def tokens(user: str | None = None, cursor: str | None = None) -> Call[wire.TokenPage]:
    return _call("GET", query("/v1/tokens", user=user, cursor=cursor), wire.TokenPage)


def add_token(draft: wire.TokenDraft) -> Call[wire.NewToken]:
    return _call("POST", "/v1/tokens", wire.NewToken, draft)


def revoke_token(token_id: str) -> Call[None]:
    return _done("DELETE", _path("tokens", token_id))


def change_password(change: wire.PasswordChange) -> Call[None]:
    return _done("PUT", "/v1/account/password", change)


def start_totp(password: str) -> Call[wire.TotpDraft]:
    body = wire.PasswordProof(password=password)
    return _call("POST", "/v1/account/totp", wire.TotpDraft, body)


def confirm_totp(otp: str) -> Call[wire.RecoveryCodes]:
    return _call("PUT", "/v1/account/totp", wire.RecoveryCodes, wire.TotpProof(otp=otp))


def stop_totp(password: str) -> Call[None]:
    return _done("POST", "/v1/account/totp/off", wire.PasswordProof(password=password))


# Domains and projects


def domains(cursor: str | None = None) -> Call[wire.DomainPage]:
    return _call("GET", query("/v1/domains", cursor=cursor), wire.DomainPage)


def domain(name: str) -> Call[wire.Domain]:
    return _call("GET", _path("domains", name), wire.Domain)


def add_domain(name: str) -> Call[wire.Domain]:
    return _call("POST", "/v1/domains", wire.Domain, wire.NameDraft(name=name))


def switch_domain(name: str, *, disabled: bool, version: int | None = None) -> Call[wire.Domain]:
    body = wire.Switch(disabled=disabled)
    return _call("PATCH", _path("domains", name), wire.Domain, body, version=version)


def projects(cursor: str | None = None) -> Call[wire.ProjectPage]:
    return _call("GET", query("/v1/projects", cursor=cursor), wire.ProjectPage)


def project(ref: str) -> Call[wire.Project]:
    """*ref*: NAME, or DOMAIN/NAME."""
    return _call("GET", _path("projects", ref), wire.Project)


def add_project(draft: wire.ProjectDraft) -> Call[wire.Project]:
    return _call("POST", "/v1/projects", wire.Project, draft)


def switch_project(ref: str, *, disabled: bool, version: int | None = None) -> Call[wire.Project]:
    body = wire.Switch(disabled=disabled)
    return _call("PATCH", _path("projects", ref), wire.Project, body, version=version)


def members(ref: str, cursor: str | None = None) -> Call[wire.MemberPage]:
    where = query(_path("projects", ref, "/members"), cursor=cursor)
    return _call("GET", where, wire.MemberPage)


def set_member(ref: str, user: str, role: str) -> Call[wire.Member]:
    where = _path("projects", ref, f"/members/{quote(user, safe='')}")
    return _call("PUT", where, wire.Member, wire.MemberDraft(role=role), repeatable=True)


def remove_member(ref: str, user: str) -> Call[None]:
    return _done("DELETE", _path("projects", ref, f"/members/{quote(user, safe='')}"))


# Users and invitations


def users(cursor: str | None = None) -> Call[wire.UserPage]:
    return _call("GET", query("/v1/users", cursor=cursor), wire.UserPage)


def user(name: str) -> Call[wire.User]:
    return _call("GET", _path("users", name), wire.User)


def add_user(draft: wire.UserDraft) -> Call[wire.NewInvitation]:
    return _call("POST", "/v1/users", wire.NewInvitation, draft)


def change_user(
    name: str, change: wire.UserChange, *, version: int | None = None
) -> Call[wire.User]:
    return _call("PATCH", _path("users", name), wire.User, change, version=version)


def invitations(cursor: str | None = None) -> Call[wire.InvitationPage]:
    return _call("GET", query("/v1/invitations", cursor=cursor), wire.InvitationPage)


def invite(draft: wire.InvitationDraft) -> Call[wire.NewInvitation]:
    return _call("POST", "/v1/invitations", wire.NewInvitation, draft)


def withdraw(invitation_id: str) -> Call[None]:
    return _done("DELETE", _path("invitations", invitation_id))
