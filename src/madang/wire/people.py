"""Domains, projects, users, tokens and logins, as the API shows and takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SCOPES: Final = ("read", "sessions", "images", "account", "admin", "*")
"""What a token may be limited to. Each includes reading; ``*`` is all that its user may do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """An organisation: its projects and its users."""

    name: str
    created_at: float
    disabled_at: float | None = None
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """People who work together; names are unique in the domain."""

    name: str
    domain: str
    created_at: float
    disabled_at: float | None = None
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    user: str
    role: str
    """``member`` or ``admin``"""
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    name: str
    domain: str
    role: str
    """``user``, ``domain_admin``, ``monitor``, ``admin``"""
    project: str
    """Where their sessions belong if they don't say."""
    created_at: float
    disabled_at: float | None = None
    has_password: bool = False
    has_totp: bool = False
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NameDraft:
    """A new domain."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectDraft:
    name: str
    domain: str = ""
    """The caller's, if empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """Disabled: requests are refused at once."""

    disabled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberDraft:
    role: str = "member"


@dataclass(frozen=True, slots=True, kw_only=True)
class UserDraft:
    name: str
    role: str = "user"
    project: str = ""
    """``NAME`` or ``DOMAIN/NAME``; the caller's, if empty."""
    expires_s: float = 7 * 86400.0
    """How long the code that sets their password is valid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserChange:
    """What is None stays as it is."""

    role: str | None = None
    disabled: bool | None = None
    project: str | None = None
    """Their default project; they must be a member."""
    totp: bool | None = None
    """False: administrators take a lost second factor away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InvitationDraft:
    role: str = "user"
    project: str = ""
    user: str = ""
    """An existing user who shall set a new password; empty: someone new."""
    expires_s: float = 7 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    id: str
    project: str
    domain: str
    role: str
    user: str
    """Whose password it sets; empty: whoever comes with it chooses a name."""
    made_by: str
    created_at: float
    expires_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NewInvitation:
    invitation: Invitation
    code: str
    """Shown this once; only its hash is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Use of an invitation."""

    code: str
    password: str
    user: str = ""
    token: str = ""
    """Name of a token to make; empty: a browser session by cookie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginRequest:
    user: str
    password: str
    otp: str = ""
    """Of the second factor, or a recovery code."""
    token: str = ""
    """Name of a token to make; empty: a browser session by cookie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginReply:
    user: str
    expires_at: float | None
    token: str = ""
    """The token that was asked for; shown this once."""
    csrf: str = ""
    """Of a browser session: goes into the header ``Madang-CSRF`` of each change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    id: str
    name: str
    kind: str
    """``token``, ``key`` (signs requests), ``login`` (of `madang login`), ``browser``"""
    user: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float | None = None
    last_used_at: float | None = None
    source: str = ""
    """Address that it was made from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDraft:
    name: str
    kind: str = "token"
    """``token`` or ``key``"""
    scopes: tuple[str, ...] = ("*",)
    expires_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken:
    token: Token
    secret: str
    """The token itself, or the secret key of a key pair. Shown this once."""
    access_key: str = ""
    """Of a key pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PasswordChange:
    new: str
    old: str = ""
    """Empty where there is none yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PasswordProof:
    password: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TotpDraft:
    """The second factor, not in force yet."""

    secret: str
    uri: str
    """For an authenticator's QR code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TotpProof:
    otp: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryCodes:
    codes: tuple[str, ...]
    """Each logs in once, instead of the second factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectRole:
    project: str
    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WhoAmI:
    user: str
    role: str
    token: str
    """The token's name, never the token."""
    domain: str = ""
    project: str = ""
    projects: tuple[ProjectRole, ...] = ()
    scopes: tuple[str, ...] = ()
    kind: str = "token"
    expires_at: float | None = None
    csrf: str = ""
    """Of a browser session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainPage:
    """As all pages: ``next`` goes into ``?cursor=``."""

    items: tuple[Domain, ...]
    next: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectPage:
    items: tuple[Project, ...]
    next: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberPage:
    items: tuple[Member, ...]
    next: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UserPage:
    items: tuple[User, ...]
    next: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPage:
    items: tuple[Token, ...]
    next: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InvitationPage:
    items: tuple[Invitation, ...]
    next: str | None = None
