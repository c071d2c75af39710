"""What the names in sandbox rules stand for: looked up here, given to the launcher as addresses.

The launcher and the guards are root, so they read nothing that comes from a network. We ask the
machine's own resolver (``getent``, which uses whatever the machine is set up for), in a process
that can be ended when nothing answers.

Answers change in turn with many services, and a program may go on with one it got a while ago. So
an address counts for some minutes after it was last answered. A name that nobody can resolve stands
for nothing: it allows nothing, and refuses nothing, which is said.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from typing import Final, Protocol

from madang.kit.clock import Clock
from madang.kit.loop import Loop
from madang.wire.kernel import Assignment, KernelSpec
from madang.wire.policy import MAX_ADDRESSES, MAX_NAMES, Resolved, Sandbox
from madang.wire.policy_live import names_in

log = logging.getLogger(__name__)

REFRESH_S: Final = 30.0
KEPT_S: Final = 300.0
"""How long an address counts after it was last answered."""
_PATIENCE_S: Final = 5.0
_AT_ONCE: Final = 8
_MOST_REFRESHED: Final = 64
"""In one round: people choose the names, and each costs a process."""
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

Resolve = Callable[[str], Awaitable[list[str]]]
"""The addresses of a name, none if it has none or nobody can tell."""


class User(Protocol):
    """A kernel."""

    assignment: Assignment | None

    @property
    def running(self) -> bool: ...

    def renew_rules(self) -> None:
        """What a name in its rules stands for has changed."""


class Names(Loop):
    """Keeps the names fresh that running kernels' rules have."""

    period_s = REFRESH_S

    def __init__(
        self, clock: Clock, users: Callable[[], Iterable[User]], resolve: Resolve | None = None
    ) -> None:
        super().__init__(clock)
        self._users = users
        self._resolve = resolve or ask_the_machine
        self._known: dict[str, dict[str, float]] = {}
        """Name → address → when it was last answered. Those asked for longest ago come first."""
        self._limit = asyncio.Semaphore(_AT_ONCE)

    async def filled(self, spec: KernelSpec) -> KernelSpec:
        """*spec* with the addresses of its rules' names. Asks only for names that are new to us."""
        names = _names(spec.sandbox)
        if not names:
            return spec
        await self._look_up(names - self._known.keys())
        found = [Resolved(name=name, addresses=self._addresses(name)) for name in sorted(names)]
        return replace(spec, sandbox=replace(spec.sandbox, names=tuple(found)))

    async def tick(self, now: float) -> None:
        used = {
            user: names
            for user in self._users()
            if user.running and user.assignment is not None
            if (names := _names(user.assignment.spec.sandbox))
        }
        every = frozenset[str]().union(*used.values())
        for name in self._known.keys() - every:
            del self._known[name]
        oldest = [*(every - self._known.keys()), *self._known][:_MOST_REFRESHED]
        before = {name: self._addresses(name) for name in oldest}
        await self._look_up(oldest)
        changed = {name for name in oldest if self._addresses(name) != before[name]}
        for user, names in used.items():
            if names & changed:
                user.renew_rules()

    def _addresses(self, name: str) -> tuple[str, ...]:
        return tuple(sorted(self._known.get(name, ())))

    async def _look_up(self, names: Iterable[str]) -> None:
        async with asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(self._look_up_one(name), name=f"name:{name}")

    async def _look_up_one(self, name: str) -> None:
        async with self._limit:
            found = await self._resolve(name)
        now, former = self.clock.monotonic(), self._known.pop(name, None)
        kept = _fresh(former or {}, now - KEPT_S) | dict.fromkeys(found, now)
        latest = sorted(kept, key=lambda address: -kept[address])[:MAX_ADDRESSES]
        self._known[name] = {address: kept[address] for address in latest}
        if not latest and (former is None or former):
            log.warning("name not resolved", extra={"host": name})


def _names(sandbox: Sandbox) -> frozenset[str]:
    return frozenset(sorted(names_in(sandbox.nets))[:MAX_NAMES])


def _fresh(known: Mapping[str, float], since: float) -> dict[str, float]:
    return {address: at for address, at in known.items() if at >= since}


async def ask_the_machine(name: str) -> list[str]:
    program = shutil.which("getent", path=_PATH)
    if program is None:
        log.warning("resolver not run", extra={"host": name, "error": "no getent"})
        return []
    try:
        process = await asyncio.create_subprocess_exec(
            *(program, "ahosts", name),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={"PATH": _PATH, "LANG": "C.UTF-8"},
        )
    except OSError as exc:
        log.warning("resolver not run", extra={"host": name, "error": str(exc)})
        return []
    output = b""
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_S):
                output, _ = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    return addresses_in(output.decode("ascii", "replace"))


def addresses_in(text: str) -> list[str]:
    """Of ``getent ahosts``: the first word of each line; in order, each once."""
    found: dict[str, None] = {}
    for line in text.splitlines():
        word = line.partition(" ")[0].partition("%")[0]
        with contextlib.suppress(ValueError):
            found[str(ipaddress.ip_address(word))] = None
    return list(found)
