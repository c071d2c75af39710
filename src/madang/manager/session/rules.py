"""Decisions about sessions, pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from madang.kit import policy
from madang.kit.codec import from_json, to_json
from madang.kit.ids import MAX_NAME, valid_name
from madang.manager.db import micros, seconds
from madang.manager.limits.rules.idle import Look
from madang.manager.scheduling.types import Run, wishes_of
from madang.manager.session.types import LIFE, Sandboxes, SessionRow, SessionSettings
from madang.wire import network
from madang.wire.errors import InvalidRequest
from madang.wire.image import ImageKind
from madang.wire.kernel import Assignment, ImageMount, KernelReport, KernelSpec, Wanted
from madang.wire.labels import GROUP, LABEL
from madang.wire.policy import SESSION
from madang.wire.session import (
    Ended,
    Idle,
    Pending,
    Phase,
    Reason,
    Result,
    RootMode,
    Session,
    SessionKind,
    SessionSpec,
    SessionStatus,
)
from madang.wire.size import Size, check

S = SessionStatus

MAX_ARGV_BYTES: Final = 1 << 20
MAX_ENV_BYTES: Final = 1 << 18
MAX_LABELS: Final = 32
MAX_GRACE_S: Final = 3600.0
MAX_AFTER: Final = 16
MAX_TIME: Final = 32_503_680_000.0
"""The year 3000."""
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}")
_LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_RUNTIME: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_PHASE: Final = {
    S.PENDING: "queue",
    S.SCHEDULED: "prepare",
    S.RUNNING: "run",
    S.TERMINATING: "stop",
}
_RESULTS: Final = {
    Reason.USER: Result.CANCELLED,
    Reason.IDLE: Result.CANCELLED,
    Reason.PREEMPTED: Result.CANCELLED,
    Reason.GIVEN_UP: Result.CANCELLED,
    Reason.LOST: Result.LOST,
    Reason.NODE_LOST: Result.LOST,
}
_NO_SPEC: Final = KernelSpec(
    argv=(),
    image=ImageMount(name="", digest="", kind="host"),
    size=Size(cpu=0, mem_bytes=0, pids=0, disk_bytes=0),
)


def check_root(spec: SessionSpec, image: ImageMount) -> None:
    """Raises InvalidRequest where *image* has no root that the session could change."""
    if spec.root is not RootMode.READ_ONLY and image.kind != ImageKind.ROOT:
        text = f"image {image.name!r} shows the machine's own files, which no session changes: "
        raise _invalid("root", text + "use an image with a root of its own, or leave it out.")


def check_spec(spec: SessionSpec) -> SessionSpec:
    """Raises InvalidRequest, PolicyInvalid or NetworkInvalid that names what is wrong.

    Sizes are checked by ``resolve_size``.
    """
    if spec.name is not None and not valid_name(spec.name):
        raise _invalid(
            "name",
            f"{spec.name[:60]!r} is no name: 2 to {MAX_NAME} lower-case letters, digits and "
            "single dashes, beginning with a letter.",
        )
    _check_argv(spec.argv, spec.argv_encoding)
    _check_env(spec.env)
    _check_labels(spec.labels)
    if not (math.isfinite(spec.grace_s) and 0 <= spec.grace_s <= MAX_GRACE_S):
        raise _invalid("grace_s", f"{spec.grace_s:g} is not between 0 and {MAX_GRACE_S:g} seconds.")
    if not (1 <= spec.rows <= 10_000 and 1 <= spec.cols <= 10_000):
        raise _invalid("rows", "a terminal has 1 to 10000 rows and columns.")
    if spec.workspace is not None and not _DIGEST.fullmatch(spec.workspace):
        raise _invalid("workspace", "is not a digest that POST /v1/workspaces gave.")
    if not spec.image or len(spec.image) > 200 or "\0" in spec.image:
        raise _invalid("image", "has no sensible name.")
    if spec.policy:
        policy.parse(spec.policy, SESSION)
    if spec.runtime and not _RUNTIME.fullmatch(spec.runtime):
        raise _invalid("runtime", f"{spec.runtime[:60]!r} is no name of a runtime.")
    network.check(spec.network)
    _check_wishes(spec)
    return spec


def _check_wishes(spec: SessionSpec) -> None:
    if spec.group and not GROUP.fullmatch(spec.group):
        raise _invalid("group", f"{spec.group[:60]!r} is no name of a group.")
    if len(spec.after) > MAX_AFTER:
        raise _invalid("after", f"{len(spec.after)} sessions; the limit is {MAX_AFTER}.")
    for label in spec.node_labels[: MAX_LABELS + 1]:
        if not LABEL.fullmatch(label) or len(spec.node_labels) > MAX_LABELS:
            text = f"{label[:60]!r}: at most {MAX_LABELS} labels of machines, like disk=ssd."
            raise _invalid("node_labels", text)
    for name, word in (("arch", spec.arch), ("apart", spec.apart)):
        if word and not _WORD.fullmatch(word):
            raise _invalid(name, f"{word[:60]!r}: letters, digits, dots, dashes, at most 63.")
    if spec.reservation and not GROUP.fullmatch(spec.reservation):
        raise _invalid("reservation", f"{spec.reservation[:60]!r} is no name of a reservation.")
    for name, value in (("not_before", spec.not_before), ("give_up_after_s", spec.give_up_after_s)):
        if value is not None and not (math.isfinite(value) and 0 < value <= MAX_TIME):
            raise _invalid(name, f"{value:g} is out of range.")


def _invalid(field: str, text: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {text}", field=field)


def _check_argv(argv: Sequence[str], encoding: str) -> None:
    if encoding not in {"utf-8", "latin-1"}:
        raise _invalid("argv_encoding", f"{encoding[:40]!r} is neither utf-8 nor latin-1.")
    total = 0
    for argument in argv:
        if "\0" in argument:
            raise _invalid("argv", "an argument has a NUL byte; no program can be given one.")
        try:
            total += len(argument.encode(encoding)) + 1
        except UnicodeEncodeError as exc:
            raise _invalid("argv", f"an argument can't be written as {encoding}.") from exc
    if total > MAX_ARGV_BYTES:
        text = f"{total} bytes of arguments; the limit is {MAX_ARGV_BYTES}. Put them into a file."
        raise _invalid("argv", text)
    if argv and not argv[0]:
        raise _invalid("argv", "the program's name is empty.")


def _check_env(env: dict[str, str]) -> None:
    for name, value in env.items():
        if not _ENV_NAME.fullmatch(name):
            raise _invalid("env", f"{name[:60]!r} is no name of a variable.")
        if "\0" in value:
            raise _invalid("env", f"the value of {name} has a NUL byte.")
    if sum(len(name) + 4 * len(value) for name, value in env.items()) > 4 * MAX_ENV_BYTES:
        raise _invalid("env", f"more than {MAX_ENV_BYTES} bytes of variables.")


def _check_labels(labels: dict[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        raise _invalid("labels", f"{len(labels)} of them; the limit is {MAX_LABELS}.")
    for name, value in labels.items():
        if not _LABEL.fullmatch(name) or len(value) > 256 or "\0" in value:
            raise _invalid("labels", f"{name[:60]!r} is no label (letters, digits, ._/-).")


def resolve_size(spec: SessionSpec, settings: SessionSettings) -> Size:
    """What was asked for, with defaults filled in. Raises SizeInvalid."""
    ask = spec.size
    return check(
        Size(
            cpu=settings.cpu if ask.cpu is None else ask.cpu,
            mem_bytes=settings.mem_bytes if ask.mem_bytes is None else ask.mem_bytes,
            pids=settings.pids if ask.pids is None else ask.pids,
            disk_bytes=settings.disk_bytes if ask.disk_bytes is None else ask.disk_bytes,
            time_s=settings.time_s if ask.time_s is None else ask.time_s,
        )
    )


def size_of(row: SessionRow) -> Size:
    return Size(
        cpu=row.cpu_milli / 1000,
        mem_bytes=row.mem_bytes,
        pids=row.pids,
        disk_bytes=row.disk_bytes,
        time_s=None if row.time_us is None else seconds(row.time_us),
    )


def result_of(ended: Ended) -> Result:
    if ended.reason is Reason.EXIT and ended.exit_code == 0:
        return Result.SUCCESS
    return _RESULTS.get(ended.reason, Result.FAILURE)


def run_of(row: SessionRow, ended: Ended) -> Run:
    """What is kept of a session that has ended, for forecasts, shares and replays."""
    queue = next(
        (phase for phase in from_json(list[Phase], row.phases) if phase.name == "queue"), None
    )
    scheduled = None if row.node is None or queue is None else queue.ended_at
    return Run(
        session_id=row.id,
        name=row.name,
        group_name=row.group_name,
        node=row.node,
        owner=row.owner,
        project_id=row.project_id,
        program=wishes_of(row.wishes).kind,
        priority=row.priority,
        cpu_milli=row.cpu_milli,
        mem_bytes=row.mem_bytes,
        disk_bytes=row.disk_bytes,
        pids=row.pids,
        time_us=row.time_us,
        wishes=row.wishes,
        told=row.told,
        created_at=row.created_at,
        scheduled_at=None if scheduled is None else micros(scheduled),
        ended_at=row.ended_at or row.status_since,
        result=row.result or "",
        reason=str(ended.reason),
    )


def accounts_of(row: SessionRow | Any) -> tuple[str, ...]:
    """Whose limits count for it; sessions of before there were accounts have two.

    *row* has owner, project and wishes.
    """
    known = wishes_of(row.wishes).accounts
    return known or (f"user:{row.owner_id}", f"project:{row.project_id}")


def dated(ended: Ended, started_at: int | None, at: int) -> Ended:
    """With its time, and with how long it ran where nobody measured it.

    No run is believed to be longer than until *at*, now.
    """
    when = ended.at if ended.at > 0 else seconds(at)
    if started_at is None:
        return replace(ended, at=when)
    ran = ended.duration_s if ended.duration_s > 0 else when - seconds(started_at)
    most = max(0.0, seconds(at - started_at))
    return replace(ended, at=when, duration_s=min(max(0.0, ran), most))


def deadline_of(status: SessionStatus, at: int, grace_us: int = 0) -> int | None:
    """Until when the status must have changed."""
    limit = LIFE[status].deadline_s
    if limit is None:
        return None
    return at + micros(limit) + (grace_us if status is S.TERMINATING else 0)


def next_phases(text: str, target: SessionStatus, at: int) -> str:
    """End the current phase and begin the one of *target*; same phase: unchanged."""
    phases = from_json(list[Phase], text)
    name = _PHASE.get(target)
    if target is S.PREPARING or (phases and phases[-1].name == name):
        return text
    if phases and phases[-1].ended_at is None:
        phases[-1] = replace(phases[-1], ended_at=seconds(at))
    if name is not None:
        phases.append(Phase(name=name, started_at=seconds(at)))
    return to_json(phases).decode()


_WANTED: Final = {
    S.SCHEDULED: Wanted.RUN,
    S.PREPARING: Wanted.RUN,
    S.RUNNING: Wanted.RUN,
    S.TERMINATING: Wanted.STOP,
    S.TERMINATED: Wanted.KEEP,
}


def assignment_of(row: SessionRow, settings: SessionSettings, sandboxes: Sandboxes) -> Assignment:
    """What the node that holds the session shall do with it."""
    wanted = _WANTED[S(row.status)]
    live = (
        ""
        if wanted is Wanted.KEEP
        else sandboxes.live_of(row.seat, row.image_policy, from_json(SessionSpec, row.spec).policy)
    )
    return Assignment(
        kernel=row.kernel,
        nonce=row.nonce,
        revision=row.revision,
        wanted=wanted,
        spec=_kernel_spec(row, settings, sandboxes) if wanted is not Wanted.KEEP else _NO_SPEC,
        stop_reason=row.stop_reason,
        stop_text=row.stop_text,
        frozen=row.frozen_at is not None,
        freeze_revision=row.freeze_revision,
        live=live,
    )


def frost_news(
    frozen_at: int | None, revision: int, report: KernelReport
) -> tuple[int | None, int] | None:
    """What a row with *frozen_at* and *revision* becomes by *report*; None: it stays.

    A report with a smaller revision was made before the agent had heard of the newest order.
    """
    since = report.frozen_since
    told = (None if since is None else micros(since), report.freeze_revision)
    return told if report.freeze_revision >= revision and told != (frozen_at, revision) else None


def look_of(report: KernelReport, at: float) -> Look:
    """What a report says of a session's being used; *at*: monotonic seconds."""
    usage, activity = report.usage, report.activity
    network = None if usage is None else usage.network
    traffic = 0 if network is None else network.received_bytes + network.sent_bytes
    return Look(
        at=at,
        outputs=report.log_end,
        inputs=None if activity is None else activity.inputs,
        visits=None if activity is None else activity.visits,
        clients=None if activity is None else activity.clients,
        cpu_s=None if usage is None else usage.cpu_s,
        network_bytes=None if usage is None else traffic,
    )


def _kernel_spec(row: SessionRow, settings: SessionSettings, sandboxes: Sandboxes) -> KernelSpec:
    spec = from_json(SessionSpec, row.spec)
    return KernelSpec(
        argv=spec.argv,
        argv_encoding=spec.argv_encoding,
        env=spec.env,
        image=from_json(ImageMount, row.image_mount),
        size=size_of(row),
        tty=spec.tty,
        stdin=spec.stdin,
        rows=spec.rows,
        cols=spec.cols,
        hostname=row.name,
        workspace=spec.workspace,
        grace_s=seconds(row.grace_us),
        log_limit_bytes=settings.log_limit_bytes,
        build=row.kind == SessionKind.BUILD,
        owner=row.owner_id,
        sandbox=sandboxes.of(row.seat, row.image_policy, spec.policy),
        runtime=spec.runtime,
        network=spec.network,
        root=spec.root,
    )


def view(row: SessionRow, live: KernelReport | None) -> Session:
    """The session as the API returns it; *live* is its kernel's newest report, if any."""
    spec = from_json(SessionSpec, row.spec)
    status = S(row.status)
    enforced = from_json(dict[str, str], row.enforced)
    return Session(
        id=row.id,
        name=row.name,
        kind=SessionKind(row.kind),
        owner=row.owner,
        status=status,
        result=None if row.result is None else Result(row.result),
        image=row.image,
        image_digest=row.image_digest,
        argv=spec.argv,
        argv_encoding=spec.argv_encoding,
        size=size_of(row),
        env=spec.env,
        tty=spec.tty,
        stdin=spec.stdin,
        labels=spec.labels,
        network=spec.network,
        group=row.group_name,
        priority=row.priority,
        node=row.node,
        attempt=row.attempt,
        created_at=seconds(row.created_at),
        started_at=None if row.started_at is None else seconds(row.started_at),
        ended_at=None if row.ended_at is None else seconds(row.ended_at),
        status_since=seconds(row.status_since),
        deadline=None if row.deadline is None else seconds(row.deadline),
        status_owner=LIFE[status].owner,
        frozen_since=_frozen_since(row),
        idle=_idle(row),
        protected_until=None if row.protected_until is None else seconds(row.protected_until),
        pending=None if row.pending is None else from_json(Pending, row.pending),
        ended=None if row.ended is None else from_json(Ended, row.ended),
        phases=from_json(tuple[Phase, ...], row.phases),
        runtime=enforced.get("runtime", spec.runtime),
        enforced=_enforced(enforced, live),
        warnings=from_json(tuple[str, ...], row.warnings) + _unkept(live),
        refusals=sum(from_json(dict[str, int], row.refused).values()),
        usage=None if live is None or status is S.TERMINATED else live.usage,
        log_end=row.log_end if live is None or live.log_end is None else live.log_end,
        version=row.version,
    )


def _enforced(began: dict[str, str], live: KernelReport | None) -> dict[str, str]:
    """How limits are held, and whose live rules count where that has changed since the start."""
    label = "" if live is None else live.guarded.label
    return began | {"live": label} if label and label != began.get("policy") else began


def _unkept(live: KernelReport | None) -> tuple[str, ...]:
    if live is None or not live.guarded.error:
        return ()
    return (f"a changed policy is not in force here: {live.guarded.error}",)


def _idle(row: SessionRow) -> Idle | None:
    if row.idle_stop_at is None or row.status != S.RUNNING:
        return None
    return Idle(stop_at=seconds(row.idle_stop_at), text=row.idle_text)


def _frozen_since(row: SessionRow) -> float | None:
    if row.frozen_at is None or row.status != S.RUNNING:
        return None
    return seconds(row.frozen_at)
