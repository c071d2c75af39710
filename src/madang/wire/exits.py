"""Exit codes. The program's own comes first; ours lie between 119 and 125."""

from __future__ import annotations

from typing import Final

from madang.wire.errors import PlatformError
from madang.wire.session import Ended, Reason, Session

USAGE: Final = 2
DETACHED: Final = 119
UNREACHABLE: Final = 120
UNAUTHORISED: Final = 121
REFUSED: Final = 122
LOST: Final = 123
TIMEOUT: Final = 124
INTERNAL: Final = 125
INTERRUPTED: Final = 130
CLOSED_PIPE: Final = 141
STOPPED: Final = 143

MEANING: Final = {
    "0": "success",
    "1-118": "the program's own exit code",
    str(USAGE): "the command line was wrong (or the program's own code)",
    str(DETACHED): "you let go of the session; it goes on",
    str(UNREACHABLE): "no server answers, or it was lost and did not come back",
    str(UNAUTHORISED): "no valid token, or not allowed",
    str(
        REFUSED
    ): "refused: unknown image, impossible size, wrong name or setting, a port or folder in use …",
    str(LOST): "the session could not be started, or was lost with its machine",
    str(TIMEOUT): "the session's time limit ran out",
    str(INTERNAL): "something failed inside Madang",
    "128+N": "the program was ended by signal N (137: SIGKILL, also for the memory limit)",
}

_CODES: Final = {
    "server.unreachable": UNREACHABLE,
    "server.stopping": UNREACHABLE,
    "node.unavailable": LOST,
    "launcher.unavailable": LOST,
    "runtime.failed": LOST,
    "storage.full": LOST,
    "state.version": REFUSED,
    "host.lacks": REFUSED,
}


def meaning(code: int) -> str | None:
    """What an exit code tells; None if there is no such code."""
    if 0 < code < DETACHED and code != USAGE:
        return MEANING["1-118"]
    return MEANING["128+N"] if 128 < code < 256 else MEANING.get(str(code))


def of_error(error: PlatformError) -> int:
    """The exit code for an error of ours."""
    if error.code in _CODES:
        return _CODES[error.code]
    if error.code.startswith("auth."):
        return UNAUTHORISED
    return INTERNAL if error.http_status >= 500 else REFUSED


def of_ended(ended: Ended) -> int:
    """The exit code for a program's end."""
    if ended.reason is Reason.TIMEOUT:
        return TIMEOUT
    if ended.reason is Reason.USER and ended.exit_code is None:
        return STOPPED
    return LOST if ended.exit_code is None else ended.exit_code


def of_session(session: Session) -> int:
    """The exit code for a session's end; one stopped before its start has no program's code."""
    return STOPPED if session.ended is None else of_ended(session.ended)
