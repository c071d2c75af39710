"""Values of the policy slice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

NODE_PREFIX: Final = "node:"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRow:
    """A row as stored; times in microseconds."""

    id: int
    target: str
    version: int
    text: str
    digest: str
    author_id: str
    author: str
    at: int
    note: str
