"""Kernels: sessions with one interpreter, started and ended as Jupyter's frontends ask."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

from madang.kit.clock import Clock
from madang.kit.languages import Languages
from madang.kit.tasks import TaskSet
from madang.manager.cells.service import CellService
from madang.manager.http import Caller
from madang.manager.image.service import ImageService
from madang.manager.jupyter import types
from madang.manager.jupyter.rules import kernels as rules
from madang.manager.jupyter.rules import specs
from madang.manager.jupyter.rules.ids import session_id
from madang.manager.jupyter.rules.messages import Parents
from madang.manager.jupyter.types import INTERPRETER, Choice, JupyterSettings, Kernel
from madang.manager.limits.service import PresetService
from madang.manager.session.service import SessionService
from madang.manager.session.service.kernels import not_running
from madang.manager.session.types import SessionRow, SessionSettings
from madang.wire.api import StopRequest
from madang.wire.cells import Interpreter, InterpreterRequest, InterpreterStatus
from madang.wire.errors import Conflict, NotFound, PlatformError, Shutdown
from madang.wire.languages import Language
from madang.wire.session import SessionSpec, SessionStatus, SizeRequest

MAX_KERNELS: Final = 1000
"""Sessions of one user that are looked through for kernels."""
MAX_REMEMBERED: Final = 1024
_PAGE: Final = 200
_KEPT_ENV: Final = 64
_WAIT_S: Final = 30.0


@dataclass(slots=True)
class Memory:
    """What this server knows of a kernel beside what is stored; all of it may be lost."""

    parents: Parents = field(default_factory=Parents)
    seen: OrderedDict[str, int] = field(default_factory=OrderedDict)
    """Client's session id → number of the last event that it was sent."""
    active_at: float | None = None
    left_at: float | None = None
    """Monotonic: when the last client went; None while there is one, or there was none yet."""
    clients: int = 0
    path: str | None = None
    title: str | None = None
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)


class Kernels:
    """Callers see their own: whoever administers others' sessions does not run code in them."""

    def __init__(
        self,
        sessions: SessionService,
        cells: CellService,
        images: ImageService,
        presets: PresetService,
        languages: Languages,
        clock: Clock,
        standard: SessionSettings,
        settings: JupyterSettings,
    ) -> None:
        self.sessions: Final = sessions
        self.cells: Final = cells
        self.clock: Final = clock
        self._images: Final = images
        self._presets: Final = presets
        self._languages: Final = languages
        self._standard: Final = SizeRequest(cpu=standard.cpu, mem_bytes=standard.mem_bytes)
        self._settings: Final = settings
        self.began_at: Final = clock.now()
        """Unix time; what happened before is known from interpreters' events alone."""
        self._began: Final = clock.monotonic()
        self._memory: Final[OrderedDict[str, Memory]] = OrderedDict()
        self._tasks: Final = TaskSet()

    async def close(self) -> None:
        await self._tasks.close()

    def age_s(self) -> float:
        """Of this server."""
        return self.clock.monotonic() - self._began

    # Kernelspecs

    async def specs(self, caller: Caller) -> tuple[Choice, ...]:
        """What the caller may start; the first is the default."""
        return specs.choices(
            await self._images.list(caller),
            self._languages.all(),
            await self._presets.list(),
            self._standard,
            self._settings.specs,
        )

    async def spec(self, caller: Caller, name: str) -> Choice:
        """Raises NotFound."""
        for choice in await self.specs(caller):
            if choice.name == name:
                return choice
        raise NotFound(f"no kernelspec {name[:80]!r}; GET …/api/kernelspecs lists them.")

    # Starting

    async def start(
        self,
        caller: Caller,
        name: str,
        *,
        path: str = "",
        title: str = "",
        kind: str = "",
        env: Mapping[str, str] | None = None,
        alone_s: str = "",
    ) -> Kernel:
        """A new session; its interpreter is started as soon as it runs."""
        choice = await self.spec(caller, name) if name else (await self.specs(caller))[0]
        labels = {
            types.KERNEL: choice.name,
            types.LANGUAGE: choice.language.name,
            types.DRIVER: choice.driver,
            types.PATH: path,
            types.TITLE: title,
            types.KIND: kind,
            types.ALONE: alone_s,
        }
        spec = SessionSpec(
            image=choice.image,
            preset=choice.preset,
            labels={key: text[: rules.MAX_LABEL] for key, text in labels.items() if text},
            env=dict(list((env or {}).items())[:_KEPT_ENV]),
        )
        row = (await self.sessions.create(caller, spec)).row
        self._tasks.spawn(self._start_early(caller, row.id), f"jupyter {row.name}")
        return self._kernel(row, None)

    async def _start_early(self, caller: Caller, session: str) -> None:
        """So that the interpreter is there when the first client comes, who would start it too."""
        try:
            await self.interpreter(caller, session)
        except PlatformError:
            return  # whoever connects is told

    async def interpreter(self, caller: Caller, session: str) -> Interpreter:
        """The kernel's interpreter; started if there is none, once the session runs.

        Raises SessionNotRunning when the session ends before, and whatever a start raises.
        """
        async with self.memory(session).starting:
            try:
                return await self.cells.get(caller, session, INTERPRETER)
            except NotFound:
                row = await self._running(caller, session)
            labels = rules.labels_of(row)
            request = InterpreterRequest(
                language=labels.get(types.LANGUAGE, specs.PYTHON),
                driver=labels.get(types.DRIVER, ""),
                name=INTERPRETER,
            )
            try:
                return await self.cells.start(caller, session, request)
            except Conflict:  # another server was faster
                return await self.cells.get(caller, session, INTERPRETER)

    async def _running(self, caller: Caller, session: str) -> SessionRow:
        version: int | None = None
        while True:
            began = self.clock.monotonic()
            row = await self.sessions.wait(caller, session, version=version, timeout_s=_WAIT_S)
            if row.status == SessionStatus.RUNNING:
                return row
            if row.status not in rules.LIVE:
                raise not_running(row)
            if row.version == version and self.clock.monotonic() - began < _WAIT_S:
                raise Shutdown("the server is stopping; connect again.")  # nobody waits any more
            version = row.version

    # Reading

    async def row(self, caller: Caller, kernel: str) -> SessionRow:
        """The session of a kernel of the caller's. Raises NotFound."""
        row = await self.sessions.get(caller, session_id(kernel))
        if row.owner_id != caller.user_id or not rules.is_kernel(row):
            raise NotFound(f"no kernel {kernel[:64]!r}.", kernel=kernel[:64])
        return row

    async def get(self, caller: Caller, kernel: str) -> Kernel:
        row = await self.row(caller, kernel)
        try:
            interpreter = await self.cells.get(caller, row.id, INTERPRETER)
        except NotFound:
            interpreter = None
        return self._kernel(row, interpreter)

    async def list_kernels(self, caller: Caller) -> list[Kernel]:
        """Newest first."""
        rows = await self._rows(caller)
        live = await self.cells.list_interpreters(caller) if rows else []
        by_session = {each.session_id: each for each in live if each.name == INTERPRETER}
        return [self._kernel(row, by_session.get(row.id)) for row in rows]

    async def _rows(self, caller: Caller) -> list[SessionRow]:
        found: list[SessionRow] = []
        after, looked = None, 0
        while looked < MAX_KERNELS:
            rows, _ = await self.sessions.page(
                caller, status=None, ended=False, after=after, limit=_PAGE
            )
            looked += len(rows)
            found += [r for r in rows if r.owner_id == caller.user_id and rules.is_kernel(r)]
            if len(rows) < _PAGE:
                break
            after = rows[-1].id
        return found

    def language(self, row: SessionRow) -> Language:
        return self._languages.get(rules.labels_of(row).get(types.LANGUAGE, specs.PYTHON))

    def _kernel(self, row: SessionRow, interpreter: Interpreter | None) -> Kernel:
        memory = self._memory.get(row.id) or Memory()
        kernel = rules.kernel_of(row, interpreter, active_at=memory.active_at)
        path = kernel.path if memory.path is None else memory.path
        title = kernel.title if memory.title is None else memory.title
        return replace(kernel, path=path, title=title, clients=max(kernel.clients, memory.clients))

    # Changing

    async def interrupt(self, caller: Caller, kernel: str) -> None:
        """Nothing happens where no interpreter has been started yet."""
        row = await self.row(caller, kernel)
        with suppress(NotFound):
            await self.cells.interrupt(caller, row.id, INTERPRETER)

    async def restart(self, caller: Caller, kernel: str) -> Kernel:
        """The interpreter anew, in the same session: files and other programs stay."""
        row = await self.row(caller, kernel)
        try:
            interpreter = await self.cells.restart(caller, row.id, INTERPRETER)
        except NotFound:
            interpreter = await self.interpreter(caller, row.id)
        return self._kernel(row, interpreter)

    async def revive(self, caller: Caller, session: str) -> None:
        """Start the interpreter again if it has ended by itself."""
        async with self.memory(session).starting:
            interpreter = await self.cells.get(caller, session, INTERPRETER)
            if interpreter.status is InterpreterStatus.ENDED:
                await self.cells.restart(caller, session, INTERPRETER)

    async def stop(self, caller: Caller, kernel: str) -> None:
        """The kernel's session ends."""
        row = await self.row(caller, kernel)
        await self.sessions.stop(caller, row.id, StopRequest())

    async def rename(
        self, caller: Caller, kernel: str, path: str | None, title: str | None
    ) -> None:
        """What its notebook is called; this server remembers."""
        memory = self.memory((await self.row(caller, kernel)).id)
        memory.path = memory.path if path is None else path[: rules.MAX_LABEL]
        memory.title = memory.title if title is None else title[: rules.MAX_LABEL]

    def memory(self, session: str) -> Memory:
        """Of a kernel; those that were not used for longest are forgotten, unless in use."""
        found = self._memory.setdefault(session, Memory())
        self._memory.move_to_end(session)
        if len(self._memory) > MAX_REMEMBERED:
            for key, memory in list(self._memory.items())[:16]:
                if not memory.clients and key != session:
                    del self._memory[key]
        return found
