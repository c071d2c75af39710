"""One kernel's next step: a pure function of what is wanted and what is.

```
            START            (program ends)  SETTLE
 INTENDED ─────────▶ RUNNING ──────────────▶ ──────▶ ENDED
    │  ABANDON          │ STOP, then it ends          │
    └───────────────────┼─────────────────────────────▶
                        └── forgotten, from any phase: REMOVE
```

Rules that the simulation drops one by one to see them missed:

- Nothing starts before the manager has confirmed it since this agent's own start: while we were
  away it may have given the session up and started another attempt.
- Nothing starts while another attempt of the same session still lives here.
- What is not named by a full list is removed, also what the journal never knew.
- Ended is final, and so is removal: neither ever leads back to a start.
- What is to end is thawed first: a frozen program hears no signal, and a version 1 freezer holds
  even SIGKILL back.
- New rules come before anything else that lets a program go on: what is thawed has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from madang.wire.kernel import Wanted


class Phase(StrEnum):
    """Where a kernel stands, as the journal keeps it."""

    INTENDED = "intended"
    """To be started; possibly asked of the runtime already."""
    RUNNING = "running"
    ENDED = "ended"
    """Settled; files and output are kept."""
    REMOVING = "removing"
    """Forgotten by the manager; must go whatever is said later."""


class Step(StrEnum):
    REST = "rest"
    START = "start"
    GUARD = "guard"
    """Give it the newest live rules of its sandbox."""
    FREEZE = "freeze"
    THAW = "thaw"
    STOP = "stop"
    SETTLE = "settle"
    ABANDON = "abandon"
    """End it without having started it."""
    REMOVE = "remove"


@dataclass(frozen=True, slots=True, kw_only=True)
class Actual:
    """What is known of one kernel on this node."""

    phase: Phase
    gone: bool = False
    """Its program has ended or its keeper is away."""
    condemned: bool = False
    """The agent itself must end it: over a limit that nothing else holds."""
    failed: bool = False
    """Its start failed for good."""
    confirmed: bool = True
    """A full list came since the agent started."""
    rival: bool = False
    """Another attempt of the session lives here."""
    stopping: bool = False
    """Its keeper is ending it, for its time limit."""
    freeze: bool = False
    """It shall be frozen; see ``agent.freezing``."""
    frozen: bool | None = False
    """It is frozen; None: not known, or an order to freeze or thaw is not confirmed yet."""
    stale: bool = False
    """Newer live rules than the runtime was told."""


def plan(wanted: Wanted | None, actual: Actual) -> Step:
    """The next step; *wanted* None: the manager does not name it."""
    if actual.phase is Phase.REMOVING:
        return Step.REMOVE
    if wanted is None:
        return Step.REMOVE if actual.confirmed else Step.REST
    if actual.phase is Phase.ENDED:
        return Step.REST
    if actual.phase is Phase.RUNNING:
        if actual.gone:
            return Step.SETTLE
        return _plan_running(wanted, actual)
    if actual.failed or wanted is not Wanted.RUN:
        return Step.ABANDON
    return Step.START if actual.confirmed and not actual.rival else Step.REST


def _plan_running(wanted: Wanted, actual: Actual) -> Step:
    stop = actual.condemned or wanted is not Wanted.RUN
    if actual.stale and not stop:
        return Step.GUARD
    freeze = actual.freeze and not stop and not actual.stopping
    if actual.frozen is not freeze:
        return Step.FREEZE if freeze else Step.THAW
    return Step.STOP if stop else Step.REST
