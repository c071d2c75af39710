"""Values of the identity slice."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

TOKEN_PREFIX: Final = "mdg_"  # noqa: S105 - not a password
"""So that leaked tokens can be recognised by scanners and by people."""
COOKIE_PREFIX: Final = "mdb_"
INVITATION_PREFIX: Final = "mdi_"
DEFAULT_DOMAIN: Final = "default"
DEFAULT_PROJECT: Final = "default"


class Role(StrEnum):
    """What a user is everywhere; in a project, see ProjectRole."""

    ADMIN = "admin"
    DOMAIN_ADMIN = "domain_admin"
    """Administers the users and projects of a domain, and what these have."""
    MONITOR = "monitor"
    """Sees all, changes nothing."""
    USER = "user"


class ProjectRole(StrEnum):
    ADMIN = "admin"
    """Sees and administers what the members have in the project."""
    MEMBER = "member"


class Scope(StrEnum):
    """What a call needs, and what a token may be limited to."""

    READ = "read"
    SESSIONS = "sessions"
    IMAGES = "images"
    ACCOUNT = "account"
    """The user's own password, second factor, tokens and logins."""
    ADMIN = "admin"
    ALL = "*"


class TokenKind(StrEnum):
    TOKEN = "token"  # noqa: S105 - not a password
    KEY = "key"
    """A key pair: signs requests, is never sent."""
    LOGIN = "login"
    """Made with a password by `madang login`."""
    BROWSER = "browser"
    """A cookie."""


def allows(scopes: frozenset[str], needed: str) -> bool:
    """Every scope includes reading."""
    return bool(scopes) and (Scope.ALL in scopes or needed in scopes or needed == Scope.READ)


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """The caller of one request."""

    user_id: str
    user: str
    role: Role
    token_id: str
    token: str
    """The token's name."""
    project_id: str = DEFAULT_PROJECT
    domain_id: str = DEFAULT_DOMAIN
    scopes: frozenset[str] = frozenset({"*"})
    """What both the token and the role allow."""
    kind: str = TokenKind.TOKEN
    expires_at: int | None = None
    """Microseconds; None: never."""
    version: int = 0
    """Of the user: grows with each change of theirs, memberships too."""
    digest: str = ""
    """By which the token is found again."""

    def allows(self, scope: str) -> bool:
        return allows(self.scopes, scope)

    @property
    def sees_all(self) -> bool:
        return self.role in (Role.ADMIN, Role.MONITOR)

    @property
    def administers(self) -> bool:
        """Whether they may change what concerns everybody."""
        return self.role is Role.ADMIN


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentitySettings:
    """Logins: how long they last."""

    browser_idle_s: float = 12 * 3600.0
    """A browser session ends after so long without a request."""
    browser_max_s: float = 7 * 86400.0
    """A browser session ends after so long in any case."""
    login_s: float = 90 * 86400.0
    """How long the token is valid that `madang login` makes."""
    invitation_max_s: float = 30 * 86400.0
    """How long an invitation may be valid at most."""
