"""Sandbox policies in the HTTP API: what is in force, what a draft would do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A layer's text in one of its versions."""

    target: str
    """``base``, ``site`` (every machine) or ``node:NAME``."""
    version: int
    """Counts from 1; 0: nobody has written one."""
    text: str
    digest: str
    """SHA-256 of the text."""
    author: str = ""
    at: float = 0.0
    """Unix time, seconds."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyDraft:
    """A text that is to be looked at, or put in force."""

    text: str
    target: str = "site"
    """``site``, ``node:NAME`` or ``session``: where it would stand."""
    note: str = ""
    """Why it is put in force; kept with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyReview:
    """What a draft would change; it was found to be valid."""

    target: str
    version: int
    """The version in force, to which it was compared."""
    rules: int
    stricter: tuple[str, ...] = ()
    """System calls that it refuses more of."""
    wider: tuple[str, ...] = ()
    """System calls that it refuses less of."""
    other: tuple[str, ...] = ()
    """System calls about which it says something else."""
    current: str = ""
    """The text in force."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyQuestion:
    """What would happen to one system call, if a draft were in force."""

    call: str
    arguments: tuple[int, ...] = ()
    """Up to six, unsigned; missing ones are 0."""
    draft: PolicyDraft | None = None
    """None: as things are."""
    node: str = ""
    """Whose layer counts too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyVerdict:
    """What would happen to it."""

    passes: bool
    answer: str = ""
    """``EPERM``, ``SIGSYS`` …; empty if no rule has an opinion."""
    layer: str = ""
    line: int = 0
    """Where the rule stands that decides."""
    name: str = ""
    why: str = ""
