"""Every request of the HTTP API as a value: what both clients send, and how they read the answer.

A call is *repeatable* if doing it twice is the same as once; only such calls are tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from urllib.parse import quote, urlencode

from madang.kit.codec import from_json, to_json
from madang.wire.api import (
    Explanation,
    Node,
    Page,
    Problem,
    ServerInfo,
    SignalRequest,
    StopRequest,
    WorkspaceManifest,
    WorkspaceState,
)
from madang.wire.errors import InvalidRequest, PlatformError, from_problem
from madang.wire.people import WhoAmI
from madang.wire.session import HistoryEntry, Session, SessionSpec, SessionStatus

if TYPE_CHECKING:  # 10 ms, and not of use to a run
    from madang.wire.image import BuildRequest, Image
    from madang.wire.languages import Language
    from madang.wire.limits import (
        LimitsDraft,
        LimitsOf,
        LimitsPage,
        LimitsText,
        Preset,
        PresetDraft,
    )
    from madang.wire.link import FileEntry
    from madang.wire.policies import (
        Policy,
        PolicyChange,
        PolicyDraft,
        PolicyQuestion,
        PolicyReview,
        PolicyVerdict,
        ReplayQuestion,
        ReplayVerdict,
    )
    from madang.wire.policy import Refusal
    from madang.wire.queue import (
        Group,
        Queue,
        ReplayReport,
        ReplayRequest,
        Reservation,
        ReservationDraft,
        Why,
    )

T = TypeVar("T")
Body = Callable[[], Iterable[bytes]]
"""Makes a streamed body; called once more when a call is repeated."""

POLL_S: Final = 30.0
"""Longest time that one ``wait`` request asks for."""
TIMEOUT_S: Final = 60.0
REPLAY_S: Final = 600.0
_JSON: Final = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    method: str
    path: str
    decode: Callable[[bytes], T]
    body: bytes | Body = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    timeout_s: float = TIMEOUT_S
    """Longest silence."""


def failure(status: int, body: bytes, call: Call[Any]) -> PlatformError:
    """The error that an answer with *status* ≥ 400 tells."""
    try:
        problem = from_json(Problem, body)
    except InvalidRequest:
        text = (
            f"{call.method} {call.path}: answer {status}, not in our form. Is it a Madang server?"
        )
        return PlatformError(text, status=status)
    return from_problem(problem.code, problem.detail or problem.title, problem.details)


def read_as(kind: type[T]) -> Callable[[bytes], T]:
    """Decodes an answer."""

    def decode(data: bytes) -> T:
        try:
            return from_json(kind, data)
        except InvalidRequest as exc:
            raise PlatformError(f"the server's answer can't be read: {exc}") from exc

    return decode


def _nothing(_: bytes) -> None:
    return None


def _bytes(data: bytes) -> bytes:
    return data


def query(path: str, /, **values: object) -> str:
    """*path* with those of *values* that are set."""
    given = {k: int(v) if isinstance(v, bool) else v for k, v in values.items() if v is not None}
    return f"{path}?{urlencode(given)}" if given else path


def session_path(ref: str, rest: str = "") -> str:
    """Path of a session by id, name or prefix."""
    if not ref:
        raise InvalidRequest("the session's name is empty. `madang ps` lists names.")
    return f"/v1/sessions/{quote(ref, safe='')}{rest}"


def health() -> Call[dict[str, str]]:
    return Call(method="GET", path="/v1/health", decode=read_as(dict[str, str]))


def info() -> Call[ServerInfo]:
    return Call(method="GET", path="/v1/info", decode=read_as(ServerInfo))


def whoami() -> Call[WhoAmI]:
    return Call(method="GET", path="/v1/whoami", decode=read_as(WhoAmI))


def create(spec: SessionSpec, key: str, *, dry_run: bool) -> Call[Session]:
    return Call(
        method="POST",
        path=query("/v1/sessions", dry_run=dry_run or None),
        body=to_json(spec),
        headers={**_JSON, "Idempotency-Key": key},
        decode=read_as(Session),
    )


def page(
    *, status: SessionStatus | None, ended: bool, limit: int | None, cursor: str | None
) -> Call[Page]:
    where = query("/v1/sessions", status=status, all=ended or None, limit=limit, cursor=cursor)
    return Call(method="GET", path=where, decode=read_as(Page))


def session(ref: str, *, wait_s: float | None = None, version: int | None = None) -> Call[Session]:
    where = query(session_path(ref), wait=wait_s, version=version)
    timeout_s = TIMEOUT_S + (wait_s or 0.0)
    return Call(method="GET", path=where, decode=read_as(Session), timeout_s=timeout_s)


def stop(ref: str, grace_s: float | None) -> Call[Session]:
    body = to_json(StopRequest(grace_s=grace_s))
    path = session_path(ref, "/stop")
    return Call(method="POST", path=path, body=body, headers=_JSON, decode=read_as(Session))


def freeze(ref: str) -> Call[Session]:
    return Call(method="POST", path=session_path(ref, "/freeze"), decode=read_as(Session))


def thaw(ref: str) -> Call[Session]:
    return Call(method="POST", path=session_path(ref, "/thaw"), decode=read_as(Session))


def signal(ref: str, number: int) -> Call[None]:
    return Call(
        method="POST",
        path=session_path(ref, "/signal"),
        body=to_json(SignalRequest(signal=number)),
        headers=_JSON,
        decode=_nothing,
        repeatable=False,
    )


def remove(ref: str, *, force: bool, version: int | None) -> Call[None]:
    headers = {} if version is None else {"If-Match": f'"{version}"'}
    where = query(session_path(ref), force=force or None)
    return Call(method="DELETE", path=where, headers=headers, decode=_nothing, repeatable=False)


def history(ref: str) -> Call[list[HistoryEntry]]:
    path = session_path(ref, "/history")
    return Call(method="GET", path=path, decode=read_as(list[HistoryEntry]))


def logs(
    ref: str, *, offset: int | None, tail: int | None, since: float | None, follow: bool
) -> Call[bytes]:
    """The frames form: offset u64 LE and record, each."""
    path = session_path(ref, "/logs")
    where = query(
        path, offset=offset, tail=tail, since=since, follow=follow or None, format="frames"
    )
    return Call(method="GET", path=where, decode=_bytes)


def files(ref: str, path: str, *, recursive: bool) -> Call[list[FileEntry]]:
    from madang.wire.link import FileEntry

    where = query(session_path(ref, "/files"), path=path, recursive=recursive or None)
    return Call(method="GET", path=where, decode=read_as(list[FileEntry]))


def read_file(ref: str, path: str, *, start: int, length: int | None) -> Call[bytes]:
    end = "" if length is None else str(start + length - 1)
    headers = {} if start == 0 and length is None else {"Range": f"bytes={start}-{end}"}
    where = query(session_path(ref, "/file"), path=path)
    return Call(method="GET", path=where, headers=headers, decode=_bytes)


def write_file(ref: str, path: str, body: bytes | Body, *, mode: int) -> Call[None]:
    where = query(session_path(ref, "/file"), path=path, mode=mode)
    return Call(method="PUT", path=where, body=body, decode=_nothing)


def read_archive(ref: str, path: str) -> Call[bytes]:
    where = query(session_path(ref, "/archive"), path=path)
    return Call(method="GET", path=where, decode=_bytes)


def write_archive(ref: str, path: str, body: Body) -> Call[None]:
    where = query(session_path(ref, "/archive"), path=path)
    return Call(method="PUT", path=where, body=body, decode=_nothing)


def workspace(manifest: WorkspaceManifest) -> Call[WorkspaceState]:
    body = to_json(manifest)
    decode = read_as(WorkspaceState)
    return Call(method="POST", path="/v1/workspaces", body=body, headers=_JSON, decode=decode)


def workspace_blobs(body: Body) -> Call[None]:
    return Call(method="PUT", path="/v1/workspaces/blobs", body=body, decode=_nothing)


def images() -> Call[list[Image]]:
    from madang.wire.image import Image

    return Call(method="GET", path="/v1/images", decode=read_as(list[Image]))


def image(name: str) -> Call[Image]:
    from madang.wire.image import Image

    return Call(method="GET", path=f"/v1/images/{quote(name, safe='')}", decode=read_as(Image))


def remove_image(name: str, *, force: bool) -> Call[None]:
    where = query(f"/v1/images/{quote(name, safe='')}", force=force or None)
    return Call(method="DELETE", path=where, decode=_nothing, repeatable=False)


def build_image(request: BuildRequest, key: str) -> Call[Session]:
    return Call(
        method="POST",
        path="/v1/images",
        body=to_json(request),
        headers={**_JSON, "Idempotency-Key": key},
        decode=read_as(Session),
        repeatable=False,
    )


def policies() -> Call[list[Policy]]:
    from madang.wire.policies import Policy

    return Call(method="GET", path="/v1/policies", decode=read_as(list[Policy]))


def policy(target: str) -> Call[Policy]:
    from madang.wire.policies import Policy

    return Call(method="GET", path=_policy_path(target), decode=read_as(Policy))


def refusals(ref: str) -> Call[list[Refusal]]:
    from madang.wire.policy import Refusal

    path = session_path(ref, "/refusals")
    return Call(method="GET", path=path, decode=read_as(list[Refusal]))


def policy_history(target: str) -> Call[list[Policy]]:
    from madang.wire.policies import Policy

    path = f"{_policy_path(target)}/history"
    return Call(method="GET", path=path, decode=read_as(list[Policy]))


def apply_policy(draft: PolicyDraft, version: int | None) -> Call[Policy]:
    """If *version* is still in force; None: whatever is."""
    from madang.wire.policies import Policy

    headers = _JSON if version is None else {**_JSON, "If-Match": f'"{version}"'}
    return Call(
        method="PUT",
        path=_policy_path(draft.target),
        body=to_json(draft),
        headers=headers,
        decode=read_as(Policy),
        repeatable=version is None,
    )


def review_policy(draft: PolicyDraft) -> Call[PolicyReview]:
    from madang.wire.policies import PolicyReview

    path, body = "/v1/policies/review", to_json(draft)
    return Call(method="POST", path=path, body=body, headers=_JSON, decode=read_as(PolicyReview))


def ask_policy(question: PolicyQuestion) -> Call[PolicyVerdict]:
    from madang.wire.policies import PolicyVerdict

    path, body = "/v1/policies/test", to_json(question)
    return Call(method="POST", path=path, body=body, headers=_JSON, decode=read_as(PolicyVerdict))


def policy_log(target: str | None, limit: int) -> Call[list[PolicyChange]]:
    from madang.wire.policies import PolicyChange

    where = query("/v1/policy-log", target=target, limit=limit)
    return Call(method="GET", path=where, decode=read_as(list[PolicyChange]))


def replay_policy(question: ReplayQuestion) -> Call[list[ReplayVerdict]]:
    from madang.wire.policies import ReplayVerdict

    path, body = "/v1/policies/replay", to_json(question)
    decode = read_as(list[ReplayVerdict])
    return Call(method="POST", path=path, body=body, headers=_JSON, decode=decode)


def _policy_path(target: str) -> str:
    kind, _, ref = target.partition(":")
    if kind == "session" and ref:
        return session_path(ref, "/policy")
    return f"/v1/policies/{quote(target, safe='')}"


def limits_page(cursor: str | None) -> Call[LimitsPage]:
    from madang.wire.limits import LimitsPage

    return Call(method="GET", path=query("/v1/limits", cursor=cursor), decode=read_as(LimitsPage))


def limits(name: str) -> Call[LimitsText]:
    from madang.wire.limits import LimitsText

    return Call(method="GET", path=_limits_path(name), decode=read_as(LimitsText))


def limits_history(name: str) -> Call[list[LimitsText]]:
    from madang.wire.limits import LimitsText

    path = f"{_limits_path(name)}/history"
    return Call(method="GET", path=path, decode=read_as(list[LimitsText]))


def apply_limits(name: str, draft: LimitsDraft, version: int | None) -> Call[LimitsText]:
    """If *version* is still in force (0: there are none yet); None: whatever is."""
    from madang.wire.limits import LimitsText

    return Call(
        method="PUT",
        path=_limits_path(name),
        body=to_json(draft),
        headers={**_JSON, **_match(version)},
        decode=read_as(LimitsText),
        repeatable=version is None,
    )


def remove_limits(name: str, version: int | None) -> Call[None]:
    path, headers = _limits_path(name), _match(version)
    return Call(method="DELETE", path=path, headers=headers, decode=_nothing, repeatable=False)


def limits_of(target: str) -> Call[LimitsOf]:
    from madang.wire.limits import LimitsOf

    return Call(method="GET", path=_limits_of_path(target), decode=read_as(LimitsOf))


def assign_limits(target: str, name: str | None) -> Call[LimitsOf]:
    from madang.wire.limits import LimitsChoice, LimitsOf

    return Call(
        method="PUT",
        path=_limits_of_path(target),
        body=to_json(LimitsChoice(name=name)),
        headers=_JSON,
        decode=read_as(LimitsOf),
        repeatable=name is not None,
    )


def _limits_path(name: str) -> str:
    return f"/v1/limits/{quote(name, safe='')}"


def _limits_of_path(target: str) -> str:
    return f"/v1/limits-of/{quote(target, safe='')}"


def languages() -> Call[list[Language]]:
    from madang.wire.languages import Language

    return Call(method="GET", path="/v1/languages", decode=read_as(list[Language]))


def presets() -> Call[list[Preset]]:
    from madang.wire.limits import Preset

    return Call(method="GET", path="/v1/presets", decode=read_as(list[Preset]))


def set_preset(name: str, draft: PresetDraft, version: int | None) -> Call[Preset]:
    """If *version* is still there (0: none); None: whatever is."""
    from madang.wire.limits import Preset

    return Call(
        method="PUT",
        path=f"/v1/presets/{quote(name, safe='')}",
        body=to_json(draft),
        headers={**_JSON, **_match(version)},
        decode=read_as(Preset),
        repeatable=version is None,
    )


def remove_preset(name: str) -> Call[None]:
    path = f"/v1/presets/{quote(name, safe='')}"
    return Call(method="DELETE", path=path, decode=_nothing, repeatable=False)


def protect(ref: str, for_s: float | None) -> Call[Session]:
    from madang.wire.limits import ProtectRequest

    return Call(
        method="POST",
        path=session_path(ref, "/protect"),
        body=to_json(ProtectRequest(for_s=for_s)),
        headers=_JSON,
        decode=read_as(Session),
    )


def _match(version: int | None) -> dict[str, str]:
    return {} if version is None else {"If-Match": f'"{version}"'}


def groups() -> Call[list[Group]]:
    from madang.wire.queue import Group

    return Call(method="GET", path="/v1/groups", decode=read_as(list[Group]))


def group(name: str) -> Call[Group]:
    from madang.wire.queue import Group

    return Call(method="GET", path=_group_path(name), decode=read_as(Group))


def put_group(name: str, text: str, version: int | None) -> Call[Group]:
    """*version*: the one that it replaces; None: it is new."""
    from madang.wire.queue import Group, GroupDraft

    match = {} if version is None else {"If-Match": f'"{version}"'}
    return Call(
        method="PUT",
        path=_group_path(name),
        body=to_json(GroupDraft(text=text)),
        headers={**_JSON, **match},
        decode=read_as(Group),
        repeatable=False,
    )


def remove_group(name: str) -> Call[None]:
    return Call(method="DELETE", path=_group_path(name), decode=_nothing)


def move_node(node: str, group: str) -> Call[None]:
    from madang.wire.queue import NodeDraft

    path, body = f"/v1/nodes/{quote(node, safe='')}", to_json(NodeDraft(group=group))
    return Call(method="PATCH", path=path, body=body, headers=_JSON, decode=_nothing)


def _group_path(name: str) -> str:
    return f"/v1/groups/{quote(name, safe='')}"


def queue(group: str | None, after: int) -> Call[Queue]:
    from madang.wire.queue import Queue

    path = query("/v1/queue", group=group, after=after or None)
    return Call(method="GET", path=path, decode=read_as(Queue))


def why(ref: str) -> Call[Why]:
    from madang.wire.queue import Why

    return Call(method="GET", path=session_path(ref, "/why"), decode=read_as(Why))


def preview(spec: SessionSpec) -> Call[Why]:
    from madang.wire.queue import Why

    path, body = "/v1/queue/preview", to_json(spec)
    return Call(method="POST", path=path, body=body, headers=_JSON, decode=read_as(Why))


def reservations() -> Call[list[Reservation]]:
    from madang.wire.queue import Reservation

    return Call(method="GET", path="/v1/reservations", decode=read_as(list[Reservation]))


def add_reservation(draft: ReservationDraft) -> Call[Reservation]:
    from madang.wire.queue import Reservation

    return Call(
        method="POST",
        path="/v1/reservations",
        body=to_json(draft),
        headers=_JSON,
        decode=read_as(Reservation),
        repeatable=False,
    )


def remove_reservation(name: str) -> Call[None]:
    path = f"/v1/reservations/{quote(name, safe='')}"
    return Call(method="DELETE", path=path, decode=_nothing)


def replay_queue(request: ReplayRequest) -> Call[ReplayReport]:
    from madang.wire.queue import ReplayReport

    return Call(
        method="POST",
        path="/v1/queue/replay",
        body=to_json(request),
        headers=_JSON,
        decode=read_as(ReplayReport),
        timeout_s=REPLAY_S,
    )


def nodes() -> Call[list[Node]]:
    return Call(method="GET", path="/v1/nodes", decode=read_as(list[Node]))


def errors() -> Call[list[Explanation]]:
    return Call(method="GET", path="/v1/errors", decode=read_as(list[Explanation]))


def error(code: str) -> Call[Explanation]:
    path = f"/v1/errors/{quote(code, safe='')}"
    return Call(method="GET", path=path, decode=read_as(Explanation))


def openapi() -> Call[dict[str, Any]]:
    return Call(method="GET", path="/v1/openapi.json", decode=read_as(dict[str, Any]))


def metrics() -> Call[bytes]:
    return Call(method="GET", path="/metrics", decode=_bytes)


def events(last_id: int | None) -> Call[bytes]:
    """Server-sent events, after *last_id*."""
    headers = {"Accept": "text/event-stream"}
    if last_id is not None:
        headers["Last-Event-ID"] = str(last_id)
    return Call(method="GET", path="/v1/events", headers=headers, decode=_bytes)
