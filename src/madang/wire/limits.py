"""Limits, presets and protection in the HTTP API.

Limits are how much somebody may have; what a session may *do* is its sandbox policy
(``wire.policies``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from madang.wire.session import SizeRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsText:
    """A named text of limits in one of its versions."""

    name: str
    version: int
    """Counts from 1; 0: nobody has written one."""
    text: str
    digest: str
    """SHA-256 of the text."""
    author: str = ""
    at: float = 0.0
    """Unix time, seconds."""
    note: str = ""
    removed: bool = False
    """This version says that there are none of that name any more."""
    targets: tuple[str, ...] = ()
    """Whom they are assigned to, as ``project:lab``; those that the caller may know of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsPage:
    items: tuple[LimitsText, ...]
    next: str | None
    """Cursor of the next page; None: this is the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsDraft:
    """A text that is to be put in force."""

    text: str
    note: str = ""
    """Why; kept with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsChoice:
    """Which limits somebody is to have."""

    name: str | None
    """None: none of their own any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limited:
    """One number that is limited: of an account, by the limits in force for it."""

    what: str
    """``cpu``, ``mem``, ``disk``, ``pids`` at once; ``sessions``, ``pending``, ``cpu_hours``."""
    limit: float
    used: float
    left: float
    """Never below 0, even where a limit was lowered below what is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountLimits:
    """What counts for one account."""

    account: str
    """``token:ID``, ``user:ID``, ``project:ID`` or ``domain:ID``."""
    shown: str
    """The same in words: ``project lab``."""
    name: str
    """Of the limits."""
    version: int
    default: bool
    """They come from ``KIND:*``, not from an assignment of its own."""
    text: str
    counted: tuple[Limited, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsOf:
    """All limits that count for somebody. The tightest counts."""

    target: str
    accounts: tuple[AccountLimits, ...]
    """Those that have any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A size with a name."""

    name: str
    size: SizeRequest = field(default_factory=SizeRequest)
    """What is None is left to the server's defaults."""
    about: str = ""
    version: int = 1
    author: str = ""
    at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetDraft:
    size: SizeRequest
    about: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectRequest:
    """How long a session shall not be stopped for being idle."""

    for_s: float | None = None
    """Seconds from now; None: as long as its limits allow; 0: the protection ends."""
