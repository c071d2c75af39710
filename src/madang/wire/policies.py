"""Sandbox policies in the HTTP API: what is in force, what a draft would do, what was refused."""

from __future__ import annotations

from dataclasses import dataclass, field

from madang.wire.policy import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEffect:
    """What a change has done to sessions that run."""

    running: int
    """So many run where it counts."""
    changed: int
    """So many of them have other live rules now."""
    waiting: tuple[str, ...] = ()
    """Names of those whose machine has not said yet that they have; it tells them all the same."""
    failed: dict[str, str] = field(default_factory=dict)
    """Name → why it can't have them; there the former ones still count."""
    later: tuple[str, ...] = ()
    """Places of rules, like ``site line 3``, that count only for sessions which start from now on.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A layer's text in one of its versions."""

    target: str
    """``base``, ``site`` (everywhere), ``group:NAME``, ``node:NAME``, ``project:NAME`` or
    ``session:NAME``; a project of another domain: ``project:DOMAIN/NAME``."""
    version: int
    """Counts from 1; 0: nobody has written one."""
    text: str
    digest: str
    """SHA-256 of the text."""
    author: str = ""
    at: float = 0.0
    """Unix time, seconds."""
    note: str = ""
    refused: dict[str, int] = field(default_factory=dict)
    """Line of a rule → how often it has refused something, in this version."""
    effect: PolicyEffect | None = None
    """In the answer to a change only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChange:
    """An entry of the log: a version, and the text that was in force before."""

    policy: Policy
    former: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyDraft:
    """A text that is to be looked at, or put in force."""

    text: str
    target: str = "site"
    """``site``, ``group:NAME``, ``node:NAME``, ``project:NAME`` or ``session``: where it stands."""
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
    group: str = ""
    project: str = ""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayQuestion:
    """What a draft would say to what sessions did."""

    draft: PolicyDraft
    refusals: tuple[Refusal, ...]
    """As recorded; at most 5,000."""
    node: str = ""
    """Whose layer counts too."""
    group: str = ""
    project: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayVerdict:
    """What would happen to it, by the live rules of all layers with the draft in its place."""

    refusal: Refusal
    judged: bool
    """False: numbers of calls and answers can't be replayed."""
    passes: bool
    place: str = ""
    """Of the rule that would refuse it, or write it down."""
    why: str = ""
