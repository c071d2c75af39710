"""Values of the audit slice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from madang.manager.http import Caller, origin

HOST: Final = "host"
"""Who works on the server's own command line, beside its files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who does something, and from where."""

    id: str = ""
    """A user's id; empty: Madang itself, or nobody who is known."""
    name: str
    key: str = ""
    """Name of the token."""
    domain_id: str = ""
    source: str = ""
    request_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSettings:
    """How long audit records are kept."""

    retention_s: float | None = None
    """Older records are removed, from the oldest on; the cut itself is a record. None: never."""


def actor_of(caller: Caller) -> Actor:
    """The caller of the request that is being served."""
    where = origin.current()
    return Actor(
        id=caller.user_id,
        name=caller.user,
        key=caller.token,
        domain_id=caller.domain_id,
        source=where.source,
        request_id=where.request_id,
    )


def stranger(name: str) -> Actor:
    """Somebody who says to be *name* and has not shown it, as at a login that failed."""
    where = origin.current()
    return Actor(name=name, source=where.source, request_id=where.request_id)


def madang(name: str) -> Actor:
    """One of our own duties, such as ``retention``, or ``HOST``."""
    where = origin.current()
    return Actor(name=name, source=where.source, request_id=where.request_id)
