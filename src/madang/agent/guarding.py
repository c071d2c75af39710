"""Live rules of a kernel's sandbox: given to the runtime whenever the manager's differ from those.

Level-triggered, like everything else here: each assignment carries the sandbox that its session
shall have now, and a digest of those of its rules that can be changed while it runs. The report
says which digest the runtime was told last. Where the two differ, the runtime is told again; so no
message, restart or crash can lose a change, and telling it twice changes nothing.

A change that this machine can't hold is told once, and reported with the reason; the former rules
stay in force. Failures that may pass are tried a few times. But where rules of the session's own
stand beside the administrator's, their sum may be what is too much: whoever starts a session could
so keep later rules off it. Then the session ends.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from madang.agent.names import Names
from madang.agent.runtime.contract import Runtime
from madang.wire.errors import (
    Conflict,
    HostLacks,
    LauncherUnavailable,
    PlatformError,
    PolicyInvalid,
    PolicyUnkept,
    RuntimeFailed,
)
from madang.wire.kernel import Assignment, Guarded, KernelReport
from madang.wire.policy import IMAGE, SESSION, Sandbox

UNKNOWN: Final = Guarded(live="unknown")
"""Of a kernel that may have been started with rules which the manager has changed since."""
_TRIES: Final = 3


class Guarding:
    """Of one kernel."""

    def __init__(self) -> None:
        self._tries = 0
        self._renew = False

    def renew(self) -> None:
        """What the rules mean has changed, though not their words."""
        self._renew = True

    def stale(self, wanted: Assignment | None, report: KernelReport) -> bool:
        """Whether the runtime has yet to be told."""
        return wanted is not None and (self._renew or wanted.live != report.guarded.live)

    async def tell(
        self, runtime: Runtime, names: Names, wanted: Assignment, former: Guarded
    ) -> Guarded:
        """Give the runtime the rules. Raises what is to be tried again; Conflict: it has ended;
        PolicyInvalid: it must end.
        """
        renewed, self._renew = self._renew, False
        sandbox = (await names.filled(wanted.spec)).sandbox
        try:
            later = await runtime.guard(wanted.kernel, sandbox)
        except (Conflict, LauncherUnavailable):
            self._renew |= renewed
            raise
        except PlatformError as exc:
            self._tries += 1
            if isinstance(exc, RuntimeFailed) and self._tries < _TRIES:
                self._renew |= renewed
                raise
            if not isinstance(exc, PolicyUnkept | HostLacks) and _adds_rules(sandbox):
                raise PolicyInvalid(exc.text) from exc
            guarded = replace(former, live=wanted.live, error=exc.text)
        else:
            guarded = Guarded(live=wanted.live, label=sandbox.label, later=later)
        self._tries = 0
        return guarded


def _adds_rules(sandbox: Sandbox) -> bool:
    """Whether any of its rules are of who started the session, or built its image."""
    rules = (*sandbox.rules, *sandbox.writes, *sandbox.live)
    return any(rule.layer in {IMAGE, SESSION} for rule in rules)
