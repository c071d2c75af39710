"""Values of the identity slice."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

TOKEN_PREFIX: Final = "mdg_"  # noqa: S105 - not a password
"""So that leaked tokens can be recognised by scanners and by people."""
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

    @property
    def sees_all(self) -> bool:
        return self.role in (Role.ADMIN, Role.MONITOR)

    @property
    def administers(self) -> bool:
        """Whether they may change what concerns everybody."""
        return self.role is Role.ADMIN
