"""Values of the identity slice."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

TOKEN_PREFIX: Final = "mdg_"  # noqa: S105 - not a password
"""So that leaked tokens can be recognised by scanners and by people."""
DEFAULT_PROJECT: Final = "default"


class Role(StrEnum):
    ADMIN = "admin"
    USER = "user"


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

    @property
    def sees_all(self) -> bool:
        return self.role is Role.ADMIN
