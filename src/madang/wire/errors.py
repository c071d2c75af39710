"""Every failure that a user, a client or a program can meet, with its stable code.

An error says what failed, on which object, and what to do. ``code`` never changes its meaning;
``madang explain CODE`` and the documentation print ``help_text``. Over HTTP an error is
``application/problem+json`` (RFC 9457) with ``code`` and ``details``.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any, ClassVar, Final


class Retry(StrEnum):
    """Whether the same call can succeed without being changed."""

    NEVER = "never"
    LATER = "later"
    NOW = "now"


class PlatformError(Exception):
    """Root of our errors. Subclasses set ``code``, ``http_status``, ``retry`` and ``help_text``."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retry: ClassVar[Retry] = Retry.NEVER
    help_text: ClassVar[str] = (
        "Something failed inside Madang that should not. The server's log has the details under "
        "the request id. Report it with `madang doctor --json`."
    )

    def __init__(self, text: str, **details: Any) -> None:
        super().__init__(text)
        self.text: Final = text
        self.details: Final[dict[str, Any]] = details


class InvalidRequest(PlatformError):
    code = "request.invalid"
    http_status = 400
    help_text = "The request can't be understood. The message names the field and what it takes."


class PolicyInvalid(PlatformError):
    code = "policy.invalid"
    http_status = 400
    help_text = (
        "A sandbox policy can't be read. The message names the line and what may stand there; "
        "`madang policy check FILE` tries a file, `madang policy show base` is an example."
    )


class PolicyUnkept(PlatformError):
    code = "policy.unkept"
    http_status = 409
    help_text = (
        "No machine where the session may run can keep a rule of its sandbox policy, so it was not "
        "made, or not started. Take the rule out, choose another runtime or group, or let an "
        "administrator do without it, with a warning: `accept_unenforced` of the group, "
        "`sandbox.accept_unkept` of the machine."
    )


class NetworkInvalid(PlatformError):
    code = "network.invalid"
    http_status = 400
    help_text = (
        "The network that the session asks for makes no sense. `--network full`, `--network none`, "
        "or `--allow HOST[:PORT]`, which may be repeated; `--bandwidth 100mbit` limits it."
    )


class NetworkRefused(PlatformError):
    code = "network.refused"
    http_status = 403
    help_text = (
        "This machine does not give its sessions that network. Its administrator sets which in "
        "the settings: `network.modes`, `network.forbidden`, `network.bandwidth`."
    )


class GroupInvalid(PlatformError):
    code = "group.invalid"
    http_status = 400
    help_text = (
        "The settings of a group of machines have a mistake; the text names the key. The reference "
        "of groups lists all keys; `madang group show` prints what is in force."
    )


class GroupRefused(PlatformError):
    code = "group.refused"
    http_status = 403
    help_text = (
        "That group of machines does not exist, or not for this project, this priority or this "
        "runtime. `madang group ls` lists those that you may use."
    )


class Unauthenticated(PlatformError):
    code = "auth.missing"
    http_status = 401
    help_text = (
        "No valid token came with the call. `madang login URL` stores one; the first token is "
        "printed by `madang up` and lies in the state folder, readable by its owner only."
    )


class Forbidden(PlatformError):
    code = "auth.forbidden"
    http_status = 403
    help_text = "The token is valid but may not do this. Ask an administrator for the role."


class ScopeMissing(Forbidden):
    code = "auth.scope"
    help_text = (
        "The token is limited to less than this call needs. `madang token add NAME --scope SCOPE` "
        "makes another; `madang whoami` shows what the present one may do."
    )


class CrossSite(Forbidden):
    code = "auth.cross_site"
    help_text = (
        "A browser session's change came without its Madang-CSRF header, or from another site. "
        "Pages of this server send it; programs use a token instead of the cookie."
    )


class SignatureInvalid(Unauthenticated):
    code = "auth.signature"
    help_text = (
        "The signature of the request is wrong, too old, or came before. Check the secret key and "
        "this machine's clock; the page on signed requests tells exactly what is signed."
    )


class LoginFailed(Unauthenticated):
    code = "auth.login_failed"
    help_text = (
        "User, password or the code of the second factor is wrong; which, is not told. An "
        "administrator lets a user set a new password: `madang user reset NAME`."
    )


class OtpNeeded(Unauthenticated):
    code = "auth.otp_needed"
    help_text = (
        "The account has a second factor: give the six digits that your authenticator shows, or "
        "one of the recovery codes."
    )


class InvitationInvalid(Unauthenticated):
    code = "auth.invitation"
    help_text = (
        "The invitation is unknown, was used, has expired or was taken back. Ask whoever invited "
        "you for another: `madang user invite`."
    )


class NotFound(PlatformError):
    code = "object.not_found"
    http_status = 404
    help_text = "No object of that name that you may see. `madang ps --all` lists sessions."


class Ambiguous(PlatformError):
    code = "object.ambiguous"
    http_status = 409
    help_text = "The prefix fits several objects. Give more letters of the name."


class Conflict(PlatformError):
    code = "object.conflict"
    http_status = 409
    help_text = "The object is in a state that does not allow this. The message says which."


class PreconditionFailed(PlatformError):
    code = "object.changed"
    http_status = 412
    retry = Retry.NOW
    help_text = "The object changed since you read it (If-Match). Read it again, then decide."


class IdempotencyMismatch(PlatformError):
    code = "request.key_reused"
    http_status = 422
    help_text = "This Idempotency-Key came before with another body. Use a new key."


class TooLarge(PlatformError):
    code = "request.too_large"
    http_status = 413
    help_text = "The request passes a limit; the message says which and how to stay under it."


class SizeInvalid(PlatformError):
    code = "size.invalid"
    http_status = 400
    help_text = (
        "A size can't be read or makes no sense. Examples: --cpu 0.5, --mem 512m, --mem 2g, "
        "--pids 200, --disk 10g, --time 90s, --time 2h."
    )


class SizeImpossible(PlatformError):
    code = "size.impossible"
    http_status = 409
    help_text = (
        "No machine is large enough, now or ever. The message says what the largest has; ask for "
        "less, or add a machine."
    )


class LimitsInvalid(PlatformError):
    code = "limits.invalid"
    http_status = 400
    help_text = (
        "A text of limits can't be read. The message names the line and what may stand there; "
        "the reference page `limits` has the whole language."
    )


class LimitExceeded(PlatformError):
    code = "limit.exceeded"
    http_status = 409
    retry = Retry.LATER
    help_text = (
        "You, your project, your domain or your token have as much as the limits allow. The "
        "message names whose limit is the tightest and what is left; `madang limits of` shows all. "
        "Stop a session (`madang ps`), or ask an administrator for more."
    )


class LimitRefused(PlatformError):
    code = "limit.refused"
    http_status = 409
    help_text = (
        "The limits never allow one session of that size or length, however little else runs. The "
        "message names whose limit it is; ask for less, or ask an administrator for more."
    )


class PresetUnknown(PlatformError):
    code = "preset.unknown"
    http_status = 404
    help_text = "There is no preset of that name. `madang preset ls` lists them with their sizes."


class LanguageUnknown(PlatformError):
    code = "language.unknown"
    http_status = 404
    help_text = "No language of that name or alias. `madang languages` lists them."


class LanguageInvalid(PlatformError):
    code = "language.invalid"
    http_status = 400
    help_text = (
        "A language's manifest can't be read. The message names the key and what it takes; see "
        "the page on adding a language."
    )


class ImageUnknown(PlatformError):
    code = "image.unknown"
    http_status = 404
    help_text = (
        "No image of that name. `madang image ls` lists them, `madang image build` makes one."
    )


class ImageInUse(PlatformError):
    code = "image.in_use"
    http_status = 409
    retry = Retry.LATER
    help_text = "Sessions still run from this image. Stop them, or remove it with --force later."


class BuildFailed(PlatformError):
    code = "image.build_failed"
    http_status = 422
    help_text = "The build ended with an error; its log says why (`madang logs BUILD`)."


class WorkspaceTooLarge(PlatformError):
    code = "workspace.too_large"
    http_status = 413
    help_text = (
        "The working directory is larger than the limit. List what is not needed in "
        ".madangignore, run from a smaller folder, use --no-sync, or raise --sync-limit."
    )


class WorkspaceIncomplete(PlatformError):
    code = "workspace.incomplete"
    http_status = 409
    retry = Retry.NOW
    help_text = "The server lacks some files of the working directory; send them, then try again."


class PathInvalid(PlatformError):
    code = "path.invalid"
    http_status = 400
    help_text = "A path is not allowed: empty, with a NUL byte, or leading out of the session."


class FileMissing(PlatformError):
    code = "file.missing"
    http_status = 404
    help_text = "No such file in the session. `madang ls SESSION:PATH` shows what is there."


class FileFailed(PlatformError):
    code = "file.failed"
    http_status = 409
    help_text = "The session's file system refused the operation; the message has its reason."


class SessionNotRunning(PlatformError):
    code = "session.not_running"
    http_status = 409
    help_text = "The session has not started yet or has ended. `madang show NAME` says which."


class InterpreterBusy(PlatformError):
    code = "interpreter.busy"
    http_status = 409
    retry = Retry.LATER
    help_text = (
        "A cell runs, and the interpreter can do one thing at a time. Wait for its end, interrupt "
        "it, or restart the interpreter."
    )


class InterpreterEnded(PlatformError):
    code = "interpreter.ended"
    http_status = 409
    help_text = (
        "The interpreter has ended; the message says why. Restart it, if its session still runs, "
        "or start another."
    )


class LogGone(PlatformError):
    code = "log.gone"
    http_status = 410
    help_text = "The output was removed with its session, or passed the kept size."


class NodeUnavailable(PlatformError):
    code = "node.unavailable"
    http_status = 503
    retry = Retry.LATER
    help_text = "The session's machine does not answer at present. Running sessions go on."


class LauncherUnavailable(PlatformError):
    code = "launcher.unavailable"
    http_status = 503
    retry = Retry.LATER
    help_text = "The launcher does not answer; `madang up` restarts it. Running sessions go on."


class RuntimeFailed(PlatformError):
    code = "runtime.failed"
    http_status = 500
    help_text = "The session could not be set up. `madang doctor` says what this machine lacks."


class RuntimeNotOffered(PlatformError):
    code = "runtime.not_offered"
    http_status = 409
    help_text = (
        "The machine does not offer that runtime. `madang doctor` tells which it has and how to "
        "get the others; leave `--runtime` out for its own choice."
    )

    def __init__(self, runtime: str, *, offered: Iterable[str], why: str) -> None:
        names = ", ".join(offered)
        text = f"runtime {runtime[:40]!r}: {why}. Offered: {names}."
        super().__init__(text, runtime=runtime[:40], offered=names)


class StorageFull(PlatformError):
    code = "storage.full"
    http_status = 507
    retry = Retry.LATER
    help_text = (
        "The disk under the state folder is full. Remove sessions (`madang rm`) or free space."
    )


class DatabaseUnavailable(PlatformError):
    code = "database.unavailable"
    http_status = 503
    retry = Retry.LATER
    help_text = (
        "The server's database does not answer or refuses to work; the message has its words. "
        "Running sessions go on, and so does the server once the database is back."
    )


class StateVersion(PlatformError):
    code = "state.version"
    http_status = 500
    help_text = "The state folder was written by a newer Madang. Start that version or newer."


class StateLocked(PlatformError):
    code = "state.locked"
    http_status = 409
    retry = Retry.LATER
    help_text = "Another `madang up` uses this state folder. `madang down` stops it."


class PortTaken(PlatformError):
    code = "port.taken"
    http_status = 409
    help_text = "The port is in use. Choose another: `madang up --port N`."


class HostLacks(PlatformError):
    code = "host.lacks"
    http_status = 500
    help_text = "This machine lacks something sessions need. `madang doctor` names it and the mend."


class ConfigInvalid(PlatformError):
    code = "config.invalid"
    http_status = 400
    help_text = "A setting is unknown or wrong. `madang config show` lists all, with their meaning."


class ServerUnreachable(PlatformError):
    code = "server.unreachable"
    http_status = 503
    retry = Retry.LATER
    help_text = (
        "No server answers at the address. Start one with `madang up`, or `madang login URL`."
    )


class Shutdown(PlatformError):
    code = "server.stopping"
    http_status = 503
    retry = Retry.LATER
    help_text = "The server is stopping or restarting. Try again in a moment; sessions go on."


class RateLimited(PlatformError):
    code = "request.rate_limited"
    http_status = 429
    retry = Retry.LATER
    help_text = "Too many calls at once. Wait as long as Retry-After says."


def catalogue() -> dict[str, type[PlatformError]]:
    """All errors by code, for ``explain``, documentation and clients.

    A subclass that does not set ``code`` is a variant of its parent, and not listed.
    """
    found: dict[str, type[PlatformError]] = {PlatformError.code: PlatformError}
    todo = list(PlatformError.__subclasses__())
    while todo:
        kind = todo.pop()
        if "code" in vars(kind):
            found[kind.code] = kind
        todo += kind.__subclasses__()
    return dict(sorted(found.items()))


def from_problem(code: str, text: str, details: dict[str, Any]) -> PlatformError:
    """Rebuild an error that crossed a boundary; unknown codes become a plain PlatformError.

    Built without calling the subclass's ``__init__``, whose arguments differ.
    """
    kind = catalogue().get(code, PlatformError)
    error = kind.__new__(kind)
    PlatformError.__init__(error, text, **details)
    return error
