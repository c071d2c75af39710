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
        return Step.STOP if actual.condemned or wanted is not Wanted.RUN else Step.REST
    if actual.failed or wanted is not Wanted.RUN:
        return Step.ABANDON
    return Step.START if actual.confirmed and not actual.rival else Step.REST
