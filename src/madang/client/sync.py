"""The client for ordinary (blocking) programs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

from madang.client import calls
from madang.client.address import Address
from madang.client.calls import Body, Call
from madang.client.events import Output, ServerSentEvents
from madang.client.following import Following, LogReading
from madang.client.proof import Proof, proof_of
from madang.client.requests import (
    Amount,
    Argument,
    exec_spec,
    network_request,
    new_key,
    session_spec,
    size_request,
)
from madang.client.streams import Exec, Run
from madang.client.transport import PATIENCE_S, Transport
from madang.wire.api import (
    ClientMessage,
    ClientOp,
    Event,
    Explanation,
    Node,
    Page,
    ServerInfo,
    WorkspaceManifest,
    WorkspaceState,
)
from madang.wire.errors import PlatformError, ServerUnreachable, Shutdown
from madang.wire.kernel import WORK_DIR, ExecSpec
from madang.wire.paths import to_wire
from madang.wire.people import WhoAmI
from madang.wire.session import HOST_IMAGE, HistoryEntry, Session, SessionSpec, SessionStatus

if TYPE_CHECKING:
    from madang.client.archive import Unpacked
    from madang.client.cells import Cells  # not of use to a run
    from madang.client.tree import Limits
    from madang.client.workspace import Progress, Synced
    from madang.wire.audit import AuditHead, AuditPage
    from madang.wire.image import Image
    from madang.wire.languages import Language
    from madang.wire.limits import LimitsDraft, LimitsOf, LimitsText, Preset, PresetDraft
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
    from madang.wire.usage import Bill, Interval, IntervalPage, Price, UsageReport

T = TypeVar("T")


class Client:
    """All calls of the API, blocking.

    *token*: the token itself, or a ``KeyPair`` that signs each request.
    A ``Client`` may be used by several threads, each stream of it by one. Calls that may be
    repeated are tried again while the server restarts, for up to *patience_s*.

    >>> with Client(url, token) as client:
    ...     session = client.run(["sh", "-c", "echo hello; exit 3"]).wait()
    ...     session.ended.exit_code
    3
    """

    def __init__(
        self, url: str, token: str | Proof = None, *, patience_s: float = PATIENCE_S
    ) -> None:
        self._transport = Transport(Address.parse(url), proof_of(token), patience_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close idle connections. Sessions go on."""
        self._transport.close()

    @property
    def url(self) -> str:
        return str(self._transport.address)

    def call(self, call: Call[T]) -> T:
        """Make one call of ``madang.client.calls``."""
        return self._transport.call(call)

    # Server

    def get_info(self) -> ServerInfo:
        return self.call(calls.info())

    def whoami(self) -> WhoAmI:
        return self.call(calls.whoami())

    def is_healthy(self) -> bool:
        """Whether a server answers and is ready."""
        try:
            return self.call(calls.health()).get("status") == "ok"
        except PlatformError:
            return False

    def list_nodes(self) -> list[Node]:
        return self.call(calls.nodes())

    def list_errors(self) -> list[Explanation]:
        return self.call(calls.errors())

    def explain(self, code: str) -> Explanation:
        return self.call(calls.error(code))

    def get_openapi(self) -> dict[str, Any]:
        return self.call(calls.openapi())

    def get_metrics(self) -> str:
        """Prometheus text."""
        return self.call(calls.metrics()).decode()

    def events(self, last_id: int | None = None) -> Iterator[Event]:
        """Every change as it happens, after *last_id*; does not end by itself."""
        parser = ServerSentEvents(last_id)
        retries = self._transport.retries()
        while True:
            error: PlatformError = ServerUnreachable("the server closed the stream of events.")
            try:
                with self._transport.stream(calls.events(parser.last_id)) as chunks:
                    for chunk in chunks:
                        yield from parser.feed(chunk)
                        retries = self._transport.retries()
            except (ServerUnreachable, Shutdown) as exc:
                error = exc
            parser = ServerSentEvents(parser.last_id)
            _pause(retries.pause_s(error), error)

    # Sessions

    def create_session(
        self, spec: SessionSpec, *, key: str | None = None, dry_run: bool = False
    ) -> Session:
        """Create a session, or with *dry_run* say what it would be.

        A second call with the same *key* returns the session of the first.
        """
        return self.call(calls.create(spec, key or new_key(), dry_run=dry_run))

    def get_session(self, ref: str) -> Session:
        """By id, name or unique beginning of a name."""
        return self.call(calls.session(ref))

    def list_page(
        self,
        *,
        status: SessionStatus | None = None,
        ended: bool = False,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Page:
        return self.call(calls.page(status=status, ended=ended, limit=limit, cursor=cursor))

    def list_sessions(
        self, *, status: SessionStatus | None = None, ended: bool = False
    ) -> Iterator[Session]:
        """Sessions page by page; those that have *ended* too if asked for."""
        cursor: str | None = None
        while True:
            page = self.list_page(status=status, ended=ended, cursor=cursor)
            yield from page.items
            cursor = page.next
            if cursor is None:
                return

    def wait_session(
        self,
        ref: str,
        *,
        until: Iterable[SessionStatus] = (SessionStatus.TERMINATED,),
        timeout_s: float | None = None,
    ) -> Session:
        """The session once its status is one of *until*, ended, or *timeout_s* is over."""
        wanted = {*until, SessionStatus.TERMINATED}
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        session = self.get_session(ref)
        while session.status not in wanted:
            wait_s = calls.POLL_S
            if give_up is not None:
                wait_s = min(wait_s, give_up - time.monotonic())
                if wait_s <= 0:
                    break
            call = calls.session(session.id, wait_s=wait_s, version=session.version)
            session = self.call(call)
        return session

    def stop(self, ref: str, *, grace_s: float | None = None) -> Session:
        """SIGTERM, after the grace SIGKILL. Returns at once; see ``wait_session``."""
        return self.call(calls.stop(ref, grace_s))

    def freeze(self, ref: str) -> Session:
        """Its programs stand still, without CPU; memory and slots are kept, time limits go on.

        Input, a signal or an exec wakes it. Raises SessionNotRunning.
        """
        return self.call(calls.freeze(ref))

    def thaw(self, ref: str) -> Session:
        """Let a frozen session go on; one that runs is left as it is."""
        return self.call(calls.thaw(ref))

    def protect(self, ref: str, *, for_s: float | None = None) -> Session:
        """Keep it from being stopped as idle: *for_s* from now, or as long as limits allow.

        0: the protection ends.
        """
        return self.call(calls.protect(ref, for_s))

    def signal(self, ref: str, number: int) -> None:
        self.call(calls.signal(ref, number))

    def remove(self, ref: str, *, force: bool = False, version: int | None = None) -> None:
        """Remove an ended session with its files and output; with *force* stop it first."""
        self.call(calls.remove(ref, force=force, version=version))

    def get_history(self, ref: str) -> list[HistoryEntry]:
        return self.call(calls.history(ref))

    def run(
        self,
        argv: Sequence[Argument] = (),
        *,
        image: str = HOST_IMAGE,
        cpu: Amount | None = None,
        mem: Amount | None = None,
        pids: int | None = None,
        disk: Amount | None = None,
        time_limit: Amount | None = None,
        preset: str = "",
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        project: str = "",
        tty: bool = False,
        stdin: bool = False,
        workspace: str | None = None,
        policy: str = "",
        runtime: str = "",
        network: str | None = None,
        allow: Sequence[str] = (),
        bandwidth: Amount | None = None,
    ) -> Run:
        """Start a program in a session of its own and follow it; returns once it is accepted.

        Sizes are numbers (cores, bytes, seconds) or text (``"512m"``, ``"2h"``); what they leave
        open comes from the *preset*, if one is named. *workspace* is a
        digest from ``sync_workspace``. *network*: ``"full"``, or targets in *allow*, like
        ``["data.example.org:443"]``; *bandwidth* like ``"100mbit"``.

        >>> with Client(url, token) as client:
        ...     with client.run(["sh", "-c", "read x; echo got $x"], stdin=True) as run:
        ...         run.write(b"it\\n")
        ...         run.close_stdin()
        ...         b"".join(record.data for record in run)
        b'got it\\n'
        """
        spec = session_spec(
            argv,
            image=image,
            size=size_request(cpu=cpu, mem=mem, pids=pids, disk=disk, time=time_limit),
            preset=preset,
            name=name,
            project=project,
            env=env,
            labels=labels,
            tty=tty,
            stdin=stdin,
            workspace=workspace,
            policy=policy,
            runtime=runtime,
            network=network_request(network, allow, bandwidth),
        )
        run = self.run_spec(spec)
        try:
            run.session  # noqa: B018 - waits until the session is there, or was refused
        except BaseException:
            run.close()
            raise
        return run

    def run_spec(self, spec: SessionSpec) -> Run:
        """Like ``run``, for a complete *spec*; the session is made at the stream's first use."""
        first = ClientMessage(op=ClientOp.RUN, spec=spec, key=new_key())
        return Run(self._transport, Following("/v1/run", first))

    def attach(self, ref: str, *, offset: int | None = None, tail_bytes: int | None = None) -> Run:
        """Follow a session's main program: from *offset*, from about *tail_bytes* before the end
        of its output, or from the beginning.
        """
        if offset is None and tail_bytes is None:
            offset = 0
        first = ClientMessage(op=ClientOp.ATTACH, offset=offset, tail_bytes=tail_bytes)
        return Run(self._transport, Following(calls.session_path(ref, "/attach"), first))

    def cells(
        self,
        ref: str,
        language: str = "python",
        *,
        driver: str = "",
        name: str = "",
        new: bool = False,
        after: int | None = None,
    ) -> Cells:
        """The channel of an interpreter in a running session, which is started if there is none.

        *new*: of a language alone, start another in any case. *after*: number of the last event
        that was seen; 0: all that are kept; None: only what comes.
        """
        from madang.client import cellcalls
        from madang.client.cells import Cells
        from madang.wire.cells import InterpreterRequest

        request = InterpreterRequest(language=language, driver=driver, name=name)
        found = [] if new else self.call(cellcalls.interpreters(ref))
        chosen = cellcalls.choose(found, request)
        if chosen is None:
            chosen = self.call(cellcalls.start(ref, request))
            start = 0 if after is None else after
        else:
            start = chosen.events if after is None else after
        return Cells(self._transport, chosen, start)

    def exec(
        self,
        ref: str,
        argv: Sequence[Argument],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = WORK_DIR,
        tty: bool = False,
        stdin: bool = False,
    ) -> Exec:
        """Start one more program in a running session and follow it.

        >>> with Client(url, token) as client:
        ...     session = client.create_session(SessionSpec())
        ...     _ = client.wait_session(session.id, until=[SessionStatus.RUNNING])
        ...     program = client.exec(session.id, ["echo", "inside"])
        ...     output = b"".join(record.data for record in program)
        ...     _ = client.stop(session.id, grace_s=0)
        ...     output
        b'inside\\n'
        """
        return self.exec_spec(ref, exec_spec(argv, env=env, cwd=cwd, tty=tty, stdin=stdin))

    def exec_spec(self, ref: str, spec: ExecSpec) -> Exec:
        """Like ``exec``, for a complete *spec*."""
        first = ClientMessage(op=ClientOp.EXEC, exec=spec)
        return Exec(self._transport, Following(calls.session_path(ref, "/exec"), first))

    def logs(
        self,
        ref: str,
        *,
        offset: int | None = None,
        tail_bytes: int | None = None,
        since: float | None = None,
        follow: bool = False,
    ) -> Iterator[Output]:
        """Output from the first kept byte, from *offset*, about *tail_bytes* before its end, or
        from the time *since* (Unix seconds); with *follow* until the session has ended.
        """
        reading = LogReading(ref, offset, tail_bytes, since, follow=follow)
        retries = self._transport.retries()
        while True:
            error: PlatformError = ServerUnreachable("the server closed the stream of output.")
            try:
                with self._transport.stream(reading.call()) as chunks:
                    for chunk in chunks:
                        yield from reading.feed(chunk)
                        retries = self._transport.retries()
                if not follow or not reading.goes_on(self.get_session(ref)):
                    return
            except (ServerUnreachable, Shutdown) as exc:
                error = exc
            reading.restart()
            _pause(retries.pause_s(error), error)

    # Files

    def list_files(self, ref: str, path: str, *, recursive: bool = False) -> list[FileEntry]:
        """What lies in a folder of the session (``/work`` …), or the file itself."""
        return self.call(calls.files(ref, _wire(path), recursive=recursive))

    def read_file(self, ref: str, path: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of one file; ``get`` is for large ones."""
        return self.call(calls.read_file(ref, _wire(path), start=start, length=length))

    def write_file(self, ref: str, path: str, data: bytes | Body, *, mode: int = 0o644) -> None:
        """Replace one file, all at once or not at all."""
        self.call(calls.write_file(ref, _wire(path), data, mode=mode))

    def put(
        self, ref: str, sources: Sequence[str | bytes], path: str, *, name: str | None = None
    ) -> None:
        """Send local files and folders into the session's folder *path*; the only one as *name*."""
        from madang.client import archive

        body = archive.packer(sources, name)
        self.call(calls.write_archive(ref, _wire(path), body))

    def get(self, ref: str, path: str, target: str | bytes = ".") -> Unpacked:
        """Bring a file, or what lies in a folder, of the session into the local folder *target*.

        Never writes outside *target*, whatever the session sends.
        """
        from madang.client import archive

        with self._transport.stream(calls.read_archive(ref, _wire(path))) as chunks:
            return archive.unpack(chunks, target)

    # Working directory

    def sync_workspace(
        self,
        path: str | bytes = ".",
        *,
        limits: Limits | None = None,
        cache: str | None = None,
        again: bool = False,
        progress: Progress | None = None,
    ) -> Synced:
        """Send what the server lacks of a folder; ``.digest`` goes into ``run(workspace=…)``.

        *cache* is a file that remembers digests: only changed files are read again, and of a
        folder that is as it was the server is not even asked. Should a create then fail with
        WorkspaceIncomplete, sync *again*.

        >>> with Client(url, token) as client:
        ...     synced = client.sync_workspace(folder)
        ...     run = client.run(["ls"], workspace=synced.digest)
        ...     b"".join(record.data for record in run)
        b'train.py\\n'
        """
        from madang.client import workspace

        return workspace.sync(
            self, path, limits=limits, cache=cache, again=again, progress=progress
        )

    def register_workspace(self, manifest: WorkspaceManifest) -> WorkspaceState:
        return self.call(calls.workspace(manifest))

    def send_blobs(self, body: Body) -> None:
        self.call(calls.workspace_blobs(body))

    # Images

    def list_images(self) -> list[Image]:
        return self.call(calls.images())

    def get_image(self, name: str) -> Image:
        return self.call(calls.image(name))

    def remove_image(self, name: str, *, force: bool = False) -> None:
        self.call(calls.remove_image(name, force=force))

    def build_image(
        self,
        name: str,
        requirements: Sequence[str],
        *,
        labels: Mapping[str, str] | None = None,
        policy: str = "",
    ) -> Session:
        """Start a build: a session whose output is the build log and whose end is the build's.

        Stopping it cancels the build.
        """
        from madang.wire.image import BuildRequest

        request = BuildRequest(
            name=name,
            requirements=tuple(requirements),
            labels=dict(labels or {}),
            policy=policy,
        )
        return self.call(calls.build_image(request, new_key()))

    # Limits and presets

    def list_limits(self) -> list[LimitsText]:
        """Limits by name; those that count for you, unless you see all."""
        found: list[LimitsText] = []
        cursor: str | None = None
        while True:
            page = self.call(calls.limits_page(cursor))
            found += page.items
            cursor = page.next
            if cursor is None:
                return found

    def get_limits(self, name: str) -> LimitsText:
        return self.call(calls.limits(name))

    def get_limits_history(self, name: str) -> list[LimitsText]:
        """Its versions, newest first."""
        return self.call(calls.limits_history(name))

    def apply_limits(
        self, name: str, draft: LimitsDraft, *, version: int | None = None
    ) -> LimitsText:
        """Write or change limits, if *version* is still in force (0: there are none yet)."""
        return self.call(calls.apply_limits(name, draft, version))

    def remove_limits(self, name: str, *, version: int | None = None) -> None:
        """Raises Conflict while anybody has them."""
        self.call(calls.remove_limits(name, version))

    def limits_of(self, target: str = "me") -> LimitsOf:
        """What counts for ``me``, ``user:NAME``, ``project:NAME`` …, and what is left of it."""
        return self.call(calls.limits_of(target))

    def assign_limits(self, target: str, name: str | None) -> LimitsOf:
        """Give *target* (``project:lab``, ``user:*`` …) limits; None: none of its own."""
        return self.call(calls.assign_limits(target, name))

    def list_languages(self) -> list[Language]:
        """Languages by name, with the commands that run code in them."""
        return self.call(calls.languages())

    def list_presets(self) -> list[Preset]:
        return self.call(calls.presets())

    def set_preset(self, name: str, draft: PresetDraft, *, version: int | None = None) -> Preset:
        """Make or replace a preset, if *version* is still there (0: none)."""
        return self.call(calls.set_preset(name, draft, version))

    def remove_preset(self, name: str) -> None:
        self.call(calls.remove_preset(name))

    # The queue

    def list_groups(self) -> list[Group]:
        """Groups of machines that you may use."""
        return self.call(calls.groups())

    def get_group(self, name: str) -> Group:
        """Its settings and machines."""
        return self.call(calls.group(name))

    def put_group(self, name: str, text: str, *, version: int | None = None) -> Group:
        """Make it, or change it if *version* is still in force; for administrators."""
        return self.call(calls.put_group(name, text, version))

    def remove_group(self, name: str) -> None:
        """It must have no machines; for administrators."""
        self.call(calls.remove_group(name))

    def move_node(self, node: str, group: str) -> None:
        """Put a machine into another group; for administrators."""
        self.call(calls.move_node(node, group))

    def get_queue(self, group: str | None = None, *, after: int = 0) -> Queue:
        """Who waits, in order, from the place *after* on; of one group or of all."""
        return self.call(calls.queue(group, after))

    def why(self, ref: str) -> Why:
        """Why a session waits, until when it probably does, what would let it start."""
        return self.call(calls.why(ref))

    def preview(self, spec: SessionSpec) -> Why:
        """The same of a session that is not made: where it would run, or why it would wait."""
        return self.call(calls.preview(spec))

    def replay_queue(self, request: ReplayRequest) -> ReplayReport:
        """The past once more under other settings; for administrators and monitors."""
        return self.call(calls.replay_queue(request))

    def list_reservations(self) -> list[Reservation]:
        """Machines that are kept for your project."""
        return self.call(calls.reservations())

    def add_reservation(self, draft: ReservationDraft) -> Reservation:
        """Keep machines for a project for some time; for administrators."""
        return self.call(calls.add_reservation(draft))

    def remove_reservation(self, name: str) -> None:
        """Give the machines back; for administrators."""
        self.call(calls.remove_reservation(name))

    # Sandbox policies

    def list_refusals(self, ref: str) -> list[Refusal]:
        """What a session's sandbox policy refused it while it ran, oldest first."""
        return self.call(calls.refusals(ref))

    def list_policies(self) -> list[Policy]:
        """What is in force everywhere, the base first."""
        return self.call(calls.policies())

    def get_policy(self, target: str = "site") -> Policy:
        """Of ``base``, ``site``, ``group:``, ``node:``, ``project:`` or ``session:NAME``."""
        return self.call(calls.policy(target))

    def get_policy_history(self, target: str = "site") -> list[Policy]:
        """Newest first."""
        return self.call(calls.policy_history(target))

    def apply_policy(self, draft: PolicyDraft, *, version: int | None = None) -> Policy:
        """Put it in force, if *version* still is; in running sessions too.

        For administrators, except ``session:NAME``: its owner may add rules.
        """
        return self.call(calls.apply_policy(draft, version))

    def get_policy_log(self, target: str | None = None, *, limit: int = 100) -> list[PolicyChange]:
        """Every change of *target* or of all policies, newest first; for administrators."""
        return self.call(calls.policy_log(target, limit))

    def replay_policy(self, question: ReplayQuestion) -> list[ReplayVerdict]:
        """What a draft would say to what sessions did."""
        return self.call(calls.replay_policy(question))

    def review_policy(self, draft: PolicyDraft) -> PolicyReview:
        """Check it, and compare it with what is in force."""
        return self.call(calls.review_policy(draft))

    def ask_policy(self, question: PolicyQuestion) -> PolicyVerdict:
        """What would happen to a system call."""
        return self.call(calls.ask_policy(question))

    # Audit log and usage

    def list_audit(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        kind: str | None = None,
        subject: str | None = None,
        since: float | None = None,
        until: float | None = None,
        limit: int | None = None,
        cursor: int | None = None,
    ) -> AuditPage:
        """Logins and changes, newest first; *action* ``session`` means all of sessions."""
        from madang.client import bookcalls

        where = {"actor": actor, "action": action, "kind": kind, "object": subject}
        more = {"since": since, "until": until, "limit": limit, "cursor": cursor}
        return self.call(bookcalls.audit(**where, **more))

    def get_audit_head(self) -> AuditHead:
        """Number and digest of the last record: keep it elsewhere."""
        from madang.client import bookcalls

        return self.call(bookcalls.audit_head())

    def export_audit(self) -> Iterator[bytes]:
        """The whole chain, some of it at a time; ``madang.wire.audit.verify`` takes its lines."""
        from madang.client import bookcalls

        with self._transport.stream(bookcalls.audit_export()) as chunks:
            yield from chunks

    def get_usage(
        self,
        by: Sequence[str] = ("user",),
        *,
        since: float | None = None,
        until: float | None = None,
        **where: str | None,
    ) -> UsageReport:
        """Sums by user, project, domain, group, month, session, node, or several of these.

        *where*: only of that user, project, group, node, session.
        """
        from madang.client import bookcalls

        return self.call(bookcalls.usage(by, since=since, until=until, **where))

    def list_intervals(
        self,
        *,
        since: float | None = None,
        until: float | None = None,
        corrected: bool = False,
        limit: int | None = None,
        cursor: str | None = None,
        **where: str | None,
    ) -> IntervalPage:
        """Rows of the usage ledger, newest sessions first; *where* as of ``get_usage``."""
        from madang.client import bookcalls

        page = {"corrected": corrected or None, "limit": limit, "cursor": cursor}
        call = bookcalls.intervals(since=since, until=until, **page, **where)
        return self.call(call)

    def correct_interval(
        self, interval_id: str, *, reason: str, ended_at: float | None = None
    ) -> Interval:
        """Put another row in the place of one; without *ended_at* nothing is charged."""
        from madang.client import bookcalls
        from madang.wire.usage import Correction

        correction = Correction(reason=reason, ended_at=ended_at)
        return self.call(bookcalls.correct(interval_id, correction))

    def get_bill(self, project: str, month: str) -> Bill:
        """Of a month such as ``2026-11`` (UTC)."""
        from madang.client import bookcalls

        return self.call(bookcalls.bill(project, month))

    def list_prices(self) -> list[Price]:
        """All that were ever set."""
        from madang.client import bookcalls

        return self.call(bookcalls.prices())

    def set_price(self, price: Price) -> Price:
        """What an hour of a slot costs in a group, from a time on; for administrators."""
        from madang.client import bookcalls

        return self.call(bookcalls.set_price(price))


def _wire(path: str) -> str:
    return to_wire(path.encode("utf-8", "surrogateescape"))


def _pause(seconds: float | None, error: PlatformError) -> None:
    if seconds is None:
        raise error
    time.sleep(seconds)
