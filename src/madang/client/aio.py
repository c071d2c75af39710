"""The client for asyncio programs, over aiohttp. Same calls and rules as ``sync.Client``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

import aiohttp
from yarl import URL

from madang.client import archive, bookcalls, calls, workspace
from madang.client.address import Address
from madang.client.aiostreams import AsyncExec, AsyncRun
from madang.client.archive import Unpacked
from madang.client.calls import Body, Call
from madang.client.channel import CONNECT_S, lost, unreachable
from madang.client.events import Output, ServerSentEvents
from madang.client.following import Following, LogReading
from madang.client.proof import Proof, headers, proof_of, sent_body
from madang.client.requests import (
    Amount,
    Argument,
    exec_spec,
    network_request,
    new_key,
    session_spec,
    size_request,
)
from madang.client.retry import Retries
from madang.client.transport import PATIENCE_S
from madang.client.tree import Limits
from madang.client.workspace import FileChanged, Progress, Synced
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
from madang.wire.audit import AuditHead, AuditPage
from madang.wire.errors import PlatformError, RateLimited, ServerUnreachable, Shutdown
from madang.wire.image import BuildRequest, Image
from madang.wire.kernel import WORK_DIR, ExecSpec
from madang.wire.languages import Language
from madang.wire.limits import LimitsDraft, LimitsOf, LimitsText, Preset, PresetDraft
from madang.wire.link import FileEntry
from madang.wire.paths import to_wire
from madang.wire.people import WhoAmI
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
from madang.wire.session import HOST_IMAGE, HistoryEntry, Session, SessionSpec, SessionStatus
from madang.wire.usage import Bill, Correction, Interval, IntervalPage, Price, UsageReport

if TYPE_CHECKING:
    from madang.client.aiocells import AsyncCells

T = TypeVar("T")
_READ_SIZE = 256 * 1024


class AsyncTransport:
    """HTTP and WebSockets with our errors and retries."""

    def __init__(self, address: Address, proof: Proof, patience_s: float) -> None:
        self.address = address
        self.patience_s = patience_s
        self.answered = False
        self._proof = proof
        self._http: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None

    def retries(self, *, repeatable: bool = True) -> Retries:
        return Retries(self.patience_s, repeatable=repeatable, answered=self.answered)

    async def repeat(self, do: Callable[[], Awaitable[T]], *, repeatable: bool = True) -> T:
        """Do it, again after failures that pass."""
        retries = self.retries(repeatable=repeatable)
        while True:
            try:
                return await do()
            except PlatformError as exc:
                pause = retries.pause_s(exc)
                if pause is None:
                    raise
                await asyncio.sleep(pause)

    async def call(self, call: Call[T]) -> T:
        """Send, read the whole answer, decode it."""

        async def once() -> bytes:
            with self.errors():
                async with self._request(call) as response:
                    return await response.read()

        return call.decode(await self.repeat(once, repeatable=call.repeatable))

    @asynccontextmanager
    async def stream(self, call: Call[Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The answer's body as it comes."""
        with self.errors():
            async with self._request(call) as response:
                yield response.content.iter_any()

    async def channel(self, path: str) -> aiohttp.ClientWebSocketResponse:
        """A WebSocket, shaken hands."""
        with self.errors():
            try:
                channel = await self._session().ws_connect(
                    self._url(path),
                    headers=self._headers("GET", path),
                    heartbeat=20,
                    max_msg_size=0,
                )
            except aiohttp.WSServerHandshakeError as exc:
                raise await self._refusal(path, exc) from exc
        self.answered = True
        return channel

    def errors(self) -> Errors:
        return Errors(self.address)

    async def _refusal(self, path: str, error: aiohttp.WSServerHandshakeError) -> PlatformError:
        """Why a handshake failed: its answer's body is lost, so the same is asked plainly."""
        call = Call(method="GET", path=path, decode=bytes)
        try:
            async with self._request(call):
                pass
        except PlatformError as exc:
            return exc
        return calls.failure(error.status, b"", call)

    def _headers(self, method: str, path: str, body: bytes | Body = b"") -> dict[str, str]:
        """As signed: with a port, always."""
        shown = headers(self._proof, self.address, method, path, body)
        return {"Host": self.address.netloc, **shown}

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
            self._http = aiohttp.ClientSession(timeout=timeout)
        return self._http

    @asynccontextmanager
    async def _request(self, call: Call[Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        body: Any = sent_body(call.method, call.body)
        if callable(body):
            body = _threaded(body())
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_S, sock_read=call.timeout_s
        )
        async with self._session().request(
            call.method,
            self._url(call.path),
            data=body or None,
            headers={**self._headers(call.method, call.path, call.body), **call.headers},
            timeout=timeout,
        ) as response:
            self.answered = True
            if response.status >= 400:
                raise await _failure(response, call)
            yield response

    def _url(self, path: str) -> URL:
        return URL(f"{self.address}{path}", encoded=True)


class Errors:
    """Turns aiohttp's errors into ours."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, aiohttp.ClientConnectorError):
            raise unreachable(self._address, error.os_error) from error
        if isinstance(error, aiohttp.ClientError | OSError):
            raise lost(self._address, error) from error


async def _threaded(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    """A blocking iterator, read in threads."""
    iterator = iter(chunks)
    while (chunk := await asyncio.to_thread(next, iterator, None)) is not None:
        if chunk:  # an empty one would end the body
            yield chunk


async def _failure(response: aiohttp.ClientResponse, call: Call[Any]) -> PlatformError:
    error = calls.failure(response.status, await response.read(), call)
    if isinstance(error, RateLimited):
        try:
            error.details["retry_after_s"] = float(response.headers.get("Retry-After", "1"))
        except ValueError:
            pass
    return error


class AsyncClient:
    """All calls of the API, for asyncio. Use it inside one event loop.

    >>> async def main() -> int | None:
    ...     async with AsyncClient(url, token) as client:
    ...         run = await client.run(["sh", "-c", "exit 3"])
    ...         return (await run.wait()).ended.exit_code
    >>> asyncio.run(main())
    3
    """

    def __init__(
        self, url: str, token: str | Proof = None, *, patience_s: float = PATIENCE_S
    ) -> None:
        proof = proof_of(token)
        self._transport = AsyncTransport(Address.parse(url), proof, patience_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close idle connections. Sessions go on."""
        await self._transport.close()

    async def call(self, call: Call[T]) -> T:
        """Make one call of ``madang.client.calls``."""
        return await self._transport.call(call)

    # Server

    async def get_info(self) -> ServerInfo:
        return await self.call(calls.info())

    async def whoami(self) -> WhoAmI:
        return await self.call(calls.whoami())

    async def is_healthy(self) -> bool:
        """Whether a server answers and is ready."""
        try:
            return (await self.call(calls.health())).get("status") == "ok"
        except PlatformError:
            return False

    async def list_nodes(self) -> list[Node]:
        return await self.call(calls.nodes())

    async def list_errors(self) -> list[Explanation]:
        return await self.call(calls.errors())

    async def explain(self, code: str) -> Explanation:
        return await self.call(calls.error(code))

    async def get_openapi(self) -> dict[str, Any]:
        return await self.call(calls.openapi())

    async def get_metrics(self) -> str:
        """Prometheus text."""
        return (await self.call(calls.metrics())).decode()

    async def events(self, last_id: int | None = None) -> AsyncIterator[Event]:
        """Every change as it happens, after *last_id*; does not end by itself."""
        parser = ServerSentEvents(last_id)
        retries = self._transport.retries()
        while True:
            error: PlatformError = ServerUnreachable("the server closed the stream of events.")
            try:
                async with self._transport.stream(calls.events(parser.last_id)) as chunks:
                    async for chunk in chunks:
                        for event in parser.feed(chunk):
                            yield event
                        retries = self._transport.retries()
            except (ServerUnreachable, Shutdown) as exc:
                error = exc
            parser = ServerSentEvents(parser.last_id)
            await _pause(retries.pause_s(error), error)

    # Sessions

    async def create_session(
        self, spec: SessionSpec, *, key: str | None = None, dry_run: bool = False
    ) -> Session:
        """Create a session, or with *dry_run* say what it would be.

        A second call with the same *key* returns the session of the first.
        """
        return await self.call(calls.create(spec, key or new_key(), dry_run=dry_run))

    async def get_session(self, ref: str) -> Session:
        """By id, name or unique beginning of a name."""
        return await self.call(calls.session(ref))

    async def list_page(
        self,
        *,
        status: SessionStatus | None = None,
        ended: bool = False,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Page:
        return await self.call(calls.page(status=status, ended=ended, limit=limit, cursor=cursor))

    async def list_sessions(
        self, *, status: SessionStatus | None = None, ended: bool = False
    ) -> AsyncIterator[Session]:
        """Sessions page by page; those that have *ended* too if asked for."""
        cursor: str | None = None
        while True:
            page = await self.list_page(status=status, ended=ended, cursor=cursor)
            for session in page.items:
                yield session
            cursor = page.next
            if cursor is None:
                return

    async def wait_session(
        self,
        ref: str,
        *,
        until: Iterable[SessionStatus] = (SessionStatus.TERMINATED,),
        timeout_s: float | None = None,
    ) -> Session:
        """The session once its status is one of *until*, ended, or *timeout_s* is over."""
        wanted = {*until, SessionStatus.TERMINATED}
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        session = await self.get_session(ref)
        while session.status not in wanted:
            wait_s = calls.POLL_S
            if give_up is not None:
                wait_s = min(wait_s, give_up - time.monotonic())
                if wait_s <= 0:
                    break
            call = calls.session(session.id, wait_s=wait_s, version=session.version)
            session = await self.call(call)
        return session

    async def stop(self, ref: str, *, grace_s: float | None = None) -> Session:
        """SIGTERM, after the grace SIGKILL. Returns at once; see ``wait_session``."""
        return await self.call(calls.stop(ref, grace_s))

    async def freeze(self, ref: str) -> Session:
        """Its programs stand still, without CPU; memory and slots are kept, time limits go on.

        Input, a signal or an exec wakes it. Raises SessionNotRunning.
        """
        return await self.call(calls.freeze(ref))

    async def thaw(self, ref: str) -> Session:
        """Let a frozen session go on; one that runs is left as it is."""
        return await self.call(calls.thaw(ref))

    async def protect(self, ref: str, *, for_s: float | None = None) -> Session:
        """Keep it from being stopped as idle: *for_s* from now, or as long as limits allow.

        0: the protection ends.
        """
        return await self.call(calls.protect(ref, for_s))

    async def signal(self, ref: str, number: int) -> None:
        await self.call(calls.signal(ref, number))

    async def remove(self, ref: str, *, force: bool = False, version: int | None = None) -> None:
        """Remove an ended session with its files and output; with *force* stop it first."""
        await self.call(calls.remove(ref, force=force, version=version))

    async def get_history(self, ref: str) -> list[HistoryEntry]:
        return await self.call(calls.history(ref))

    async def run(
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
    ) -> AsyncRun:
        """Start a program in a session of its own and follow it; returns once it is accepted.

        Sizes are numbers (cores, bytes, seconds) or text (``"512m"``, ``"2h"``); what they leave
        open comes from the *preset*, if one is named. *workspace* is a
        digest from ``sync_workspace``.
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
        run = await self.run_spec(spec)
        try:
            await run.session()
        except BaseException:
            await run.close()
            raise
        return run

    async def run_spec(self, spec: SessionSpec) -> AsyncRun:
        """Like ``run``, for a complete *spec*."""
        first = ClientMessage(op=ClientOp.RUN, spec=spec, key=new_key())
        return await AsyncRun(self._transport, Following("/v1/run", first)).open()

    async def attach(
        self, ref: str, *, offset: int | None = None, tail_bytes: int | None = None
    ) -> AsyncRun:
        """Follow a session's main program: from *offset*, from about *tail_bytes* before the end
        of its output, or from the beginning.
        """
        if offset is None and tail_bytes is None:
            offset = 0
        first = ClientMessage(op=ClientOp.ATTACH, offset=offset, tail_bytes=tail_bytes)
        following = Following(calls.session_path(ref, "/attach"), first)
        return await AsyncRun(self._transport, following).open()

    async def cells(
        self,
        ref: str,
        language: str = "python",
        *,
        driver: str = "",
        name: str = "",
        new: bool = False,
        after: int | None = None,
    ) -> AsyncCells:
        """The channel of an interpreter in a running session, which is started if there is none.

        *new*: of a language alone, start another in any case. *after*: number of the last event
        that was seen; 0: all that are kept; None: only what comes.
        """
        from madang.client import cellcalls
        from madang.client.aiocells import AsyncCells
        from madang.wire.cells import InterpreterRequest

        request = InterpreterRequest(language=language, driver=driver, name=name)
        found = [] if new else await self.call(cellcalls.interpreters(ref))
        chosen = cellcalls.choose(found, request)
        if chosen is None:
            chosen = await self.call(cellcalls.start(ref, request))
            start = 0 if after is None else after
        else:
            start = chosen.events if after is None else after
        return await AsyncCells(self._transport, chosen, start).open()

    async def exec(
        self,
        ref: str,
        argv: Sequence[Argument],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = WORK_DIR,
        tty: bool = False,
        stdin: bool = False,
    ) -> AsyncExec:
        """Start one more program in a running session and follow it."""
        return await self.exec_spec(ref, exec_spec(argv, env=env, cwd=cwd, tty=tty, stdin=stdin))

    async def exec_spec(self, ref: str, spec: ExecSpec) -> AsyncExec:
        """Like ``exec``, for a complete *spec*."""
        first = ClientMessage(op=ClientOp.EXEC, exec=spec)
        following = Following(calls.session_path(ref, "/exec"), first)
        return await AsyncExec(self._transport, following).open()

    async def logs(
        self,
        ref: str,
        *,
        offset: int | None = None,
        tail_bytes: int | None = None,
        since: float | None = None,
        follow: bool = False,
    ) -> AsyncIterator[Output]:
        """Output from the first kept byte, from *offset*, about *tail_bytes* before its end, or
        from the time *since* (Unix seconds); with *follow* until the session has ended.
        """
        reading = LogReading(ref, offset, tail_bytes, since, follow=follow)
        retries = self._transport.retries()
        while True:
            error: PlatformError = ServerUnreachable("the server closed the stream of output.")
            try:
                async with self._transport.stream(reading.call()) as chunks:
                    async for chunk in chunks:
                        for output in reading.feed(chunk):
                            yield output
                        retries = self._transport.retries()
                if not follow or not reading.goes_on(await self.get_session(ref)):
                    return
            except (ServerUnreachable, Shutdown) as exc:
                error = exc
            reading.restart()
            await _pause(retries.pause_s(error), error)

    # Files

    async def list_files(self, ref: str, path: str, *, recursive: bool = False) -> list[FileEntry]:
        """What lies in a folder of the session (``/work`` …), or the file itself."""
        return await self.call(calls.files(ref, _wire(path), recursive=recursive))

    async def read_file(
        self, ref: str, path: str, *, start: int = 0, length: int | None = None
    ) -> bytes:
        """Bytes of one file; ``get`` is for large ones."""
        return await self.call(calls.read_file(ref, _wire(path), start=start, length=length))

    async def write_file(
        self, ref: str, path: str, data: bytes | Body, *, mode: int = 0o644
    ) -> None:
        """Replace one file, all at once or not at all."""
        await self.call(calls.write_file(ref, _wire(path), data, mode=mode))

    async def put(
        self, ref: str, sources: Sequence[str | bytes], path: str, *, name: str | None = None
    ) -> None:
        """Send local files and folders into the session's folder *path*; the only one as *name*."""
        body = archive.packer(sources, name)
        await self.call(calls.write_archive(ref, _wire(path), body))

    async def get(self, ref: str, path: str, target: str | bytes = ".") -> Unpacked:
        """Bring a file, or what lies in a folder, of the session into the local folder *target*.

        Never writes outside *target*, whatever the session sends.
        """
        async with self._transport.stream(calls.read_archive(ref, _wire(path))) as chunks:
            blocking = _blocking(chunks, asyncio.get_running_loop())
            return await asyncio.to_thread(archive.unpack, blocking, target)

    # Working directory

    async def sync_workspace(
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
        """
        for attempt in range(workspace.TRIES):
            hashed = await asyncio.to_thread(workspace.prepare, path, limits=limits, cache=cache)
            if (synced := workspace.known_already(hashed, again=again)) is not None:
                return synced
            state = await self.register_workspace(hashed.manifest)
            try:
                if state.missing:
                    await self.send_blobs(
                        lambda: workspace.send(hashed, state.missing, progress)  # noqa: B023
                    )
                return workspace.finish(hashed, state, cache)
            except FileChanged as exc:
                if attempt + 1 == workspace.TRIES:
                    raise workspace.keeps_changing(exc) from exc
        raise AssertionError("unreachable")

    async def register_workspace(self, manifest: WorkspaceManifest) -> WorkspaceState:
        return await self.call(calls.workspace(manifest))

    async def send_blobs(self, body: Body) -> None:
        await self.call(calls.workspace_blobs(body))

    # Images

    async def list_images(self) -> list[Image]:
        return await self.call(calls.images())

    async def get_image(self, name: str) -> Image:
        return await self.call(calls.image(name))

    async def remove_image(self, name: str, *, force: bool = False) -> None:
        await self.call(calls.remove_image(name, force=force))

    async def build_image(
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
        request = BuildRequest(
            name=name,
            requirements=tuple(requirements),
            labels=dict(labels or {}),
            policy=policy,
        )
        return await self.call(calls.build_image(request, new_key()))

    # Limits and presets

    async def list_limits(self) -> list[LimitsText]:
        """Limits by name; those that count for you, unless you see all."""
        found: list[LimitsText] = []
        cursor: str | None = None
        while True:
            page = await self.call(calls.limits_page(cursor))
            found += page.items
            cursor = page.next
            if cursor is None:
                return found

    async def get_limits(self, name: str) -> LimitsText:
        return await self.call(calls.limits(name))

    async def get_limits_history(self, name: str) -> list[LimitsText]:
        """Its versions, newest first."""
        return await self.call(calls.limits_history(name))

    async def apply_limits(
        self, name: str, draft: LimitsDraft, *, version: int | None = None
    ) -> LimitsText:
        """Write or change limits, if *version* is still in force (0: there are none yet)."""
        return await self.call(calls.apply_limits(name, draft, version))

    async def remove_limits(self, name: str, *, version: int | None = None) -> None:
        """Raises Conflict while anybody has them."""
        await self.call(calls.remove_limits(name, version))

    async def limits_of(self, target: str = "me") -> LimitsOf:
        """What counts for ``me``, ``user:NAME``, ``project:NAME`` …, and what is left of it."""
        return await self.call(calls.limits_of(target))

    async def assign_limits(self, target: str, name: str | None) -> LimitsOf:
        """Give *target* (``project:lab``, ``user:*`` …) limits; None: none of its own."""
        return await self.call(calls.assign_limits(target, name))

    async def list_languages(self) -> list[Language]:
        """Languages by name, with the commands that run code in them."""
        return await self.call(calls.languages())

    async def list_presets(self) -> list[Preset]:
        return await self.call(calls.presets())

    async def set_preset(
        self, name: str, draft: PresetDraft, *, version: int | None = None
    ) -> Preset:
        """Make or replace a preset, if *version* is still there (0: none)."""
        return await self.call(calls.set_preset(name, draft, version))

    async def remove_preset(self, name: str) -> None:
        await self.call(calls.remove_preset(name))

    # The queue

    async def list_groups(self) -> list[Group]:
        """Groups of machines that you may use."""
        return await self.call(calls.groups())

    async def get_group(self, name: str) -> Group:
        """Its settings and machines."""
        return await self.call(calls.group(name))

    async def put_group(self, name: str, text: str, *, version: int | None = None) -> Group:
        """Make it, or change it if *version* is still in force; for administrators."""
        return await self.call(calls.put_group(name, text, version))

    async def remove_group(self, name: str) -> None:
        """It must have no machines; for administrators."""
        await self.call(calls.remove_group(name))

    async def move_node(self, node: str, group: str) -> None:
        """Put a machine into another group; for administrators."""
        await self.call(calls.move_node(node, group))

    async def get_queue(self, group: str | None = None, *, after: int = 0) -> Queue:
        """Who waits, in order, from the place *after* on; of one group or of all."""
        return await self.call(calls.queue(group, after))

    async def why(self, ref: str) -> Why:
        """Why a session waits, until when it probably does, what would let it start."""
        return await self.call(calls.why(ref))

    async def preview(self, spec: SessionSpec) -> Why:
        """The same of a session that is not made: where it would run, or why it would wait."""
        return await self.call(calls.preview(spec))

    async def replay_queue(self, request: ReplayRequest) -> ReplayReport:
        """The past once more under other settings; for administrators and monitors."""
        return await self.call(calls.replay_queue(request))

    async def list_reservations(self) -> list[Reservation]:
        """Machines that are kept for your project."""
        return await self.call(calls.reservations())

    async def add_reservation(self, draft: ReservationDraft) -> Reservation:
        """Keep machines for a project for some time; for administrators."""
        return await self.call(calls.add_reservation(draft))

    async def remove_reservation(self, name: str) -> None:
        """Give the machines back; for administrators."""
        await self.call(calls.remove_reservation(name))

    # Sandbox policies

    async def list_refusals(self, ref: str) -> list[Refusal]:
        """What a session's sandbox policy refused it while it ran, oldest first."""
        return await self.call(calls.refusals(ref))

    async def list_policies(self) -> list[Policy]:
        """What is in force everywhere, the base first."""
        return await self.call(calls.policies())

    async def get_policy(self, target: str = "site") -> Policy:
        """Of ``base``, ``site``, ``group:``, ``node:``, ``project:`` or ``session:NAME``."""
        return await self.call(calls.policy(target))

    async def get_policy_history(self, target: str = "site") -> list[Policy]:
        """Newest first."""
        return await self.call(calls.policy_history(target))

    async def apply_policy(self, draft: PolicyDraft, *, version: int | None = None) -> Policy:
        """Put it in force, if *version* still is; in running sessions too.

        For administrators, except ``session:NAME``: its owner may add rules.
        """
        return await self.call(calls.apply_policy(draft, version))

    async def get_policy_log(
        self, target: str | None = None, *, limit: int = 100
    ) -> list[PolicyChange]:
        """Every change of *target* or of all policies, newest first; for administrators."""
        return await self.call(calls.policy_log(target, limit))

    async def replay_policy(self, question: ReplayQuestion) -> list[ReplayVerdict]:
        """What a draft would say to what sessions did."""
        return await self.call(calls.replay_policy(question))

    async def review_policy(self, draft: PolicyDraft) -> PolicyReview:
        """Check it, and compare it with what is in force."""
        return await self.call(calls.review_policy(draft))

    async def ask_policy(self, question: PolicyQuestion) -> PolicyVerdict:
        """What would happen to a system call."""
        return await self.call(calls.ask_policy(question))

    # Audit log and usage

    async def list_audit(
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
        where = {"actor": actor, "action": action, "kind": kind, "object": subject}
        more = {"since": since, "until": until, "limit": limit, "cursor": cursor}
        return await self.call(bookcalls.audit(**where, **more))

    async def get_audit_head(self) -> AuditHead:
        """Number and digest of the last record: keep it elsewhere."""
        return await self.call(bookcalls.audit_head())

    async def export_audit(self) -> AsyncIterator[bytes]:
        """The whole chain, some of it at a time; ``madang.wire.audit.verify`` takes its lines."""
        async with self._transport.stream(bookcalls.audit_export()) as chunks:
            async for chunk in chunks:
                yield chunk

    async def get_usage(
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
        return await self.call(bookcalls.usage(by, since=since, until=until, **where))

    async def list_intervals(
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
        page = {"corrected": corrected or None, "limit": limit, "cursor": cursor}
        call = bookcalls.intervals(since=since, until=until, **page, **where)
        return await self.call(call)

    async def correct_interval(
        self, interval_id: str, *, reason: str, ended_at: float | None = None
    ) -> Interval:
        """Put another row in the place of one; without *ended_at* nothing is charged."""
        correction = Correction(reason=reason, ended_at=ended_at)
        return await self.call(bookcalls.correct(interval_id, correction))

    async def get_bill(self, project: str, month: str) -> Bill:
        """Of a month such as ``2026-11`` (UTC)."""
        return await self.call(bookcalls.bill(project, month))

    async def list_prices(self) -> list[Price]:
        """All that were ever set."""
        return await self.call(bookcalls.prices())

    async def set_price(self, price: Price) -> Price:
        """What an hour of a slot costs in a group, from a time on; for administrators."""
        return await self.call(bookcalls.set_price(price))


def _wire(path: str) -> str:
    return to_wire(path.encode("utf-8", "surrogateescape"))


def _blocking(chunks: AsyncIterator[bytes], loop: asyncio.AbstractEventLoop) -> Iterator[bytes]:
    """*chunks* for a thread; at their end, and if the loop gives up, the thread is told."""

    async def following() -> bytes | None:
        return await anext(chunks, None)

    while (chunk := asyncio.run_coroutine_threadsafe(following(), loop).result()) is not None:
        yield chunk


async def _pause(seconds: float | None, error: PlatformError) -> None:
    if seconds is None:
        raise error
    await asyncio.sleep(seconds)
