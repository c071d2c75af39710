"""Where the request that is being served came from; the audit log writes it down."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Origin:
    source: str = ""
    """Network address of the caller; empty: no request, Madang itself."""
    request_id: str = ""


_INSIDE: Final = Origin()
_origin: Final[ContextVar[Origin]] = ContextVar("origin", default=_INSIDE)


def current() -> Origin:
    return _origin.get()


def enter(source: str, request_id: str) -> None:
    """For the rest of this task, and for tasks that it starts."""
    _origin.set(Origin(source, request_id))
