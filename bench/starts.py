"""Start → exit of ``/bin/true``: bare, in sandboxes of others, and in our sessions by runtime.

All in turn in the same rounds. A session is timed as its launcher's client sees it, from the order
to start until its end is told; its files were prepared before. CPU time is of all processes that
work for the start and its clean-up; daemons that were there before (docker's) are not counted.
"""

from __future__ import annotations

import asyncio
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Final

import machine
from madang.agent.launcher import offers
from madang.testing.sessions import ChosenRuntime, Launcher, Sessions, open_launcher, spec
from madang.testing.sessions import sessions as open_sessions
from madang.wire.kernel import NATIVE, RUNSC
from rows import GAP_S, Bench, Row, ms

ROUNDS: Final = 30
TRUE: Final = "/bin/true"
_BWRAP: Final = (
    *("bwrap", "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin"),
    *("--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"),
    *("--proc", "/proc", "--dev", "/dev", "--unshare-all", "--die-with-parent", TRUE),
)

Measure = Callable[[], Awaitable[tuple[float, float]]]
"""Wall and CPU seconds of one start."""


def start_exit(bench: Bench) -> Iterator[Row]:
    """A row for each way, and one for its CPU time."""
    found = asyncio.run(_measure(bench))
    bare = ms([wall for wall, _ in found["bare"]])
    for name, values in found.items():
        wall = ms([wall for wall, _ in values])
        cpu = statistics.mean(cpu for _, cpu in values) * 1000
        yield Row(name=f"start_exit_{name}", value=wall, unit="ms", reference="bare process",
                  reference_value=bare, note=f"{ROUNDS} rounds")  # fmt: skip
        yield Row(name=f"start_exit_{name}_cpu", value=cpu, unit="ms", note="mean")


async def _measure(bench: Bench) -> dict[str, list[tuple[float, float]]]:
    async with AsyncExitStack() as stack:
        launcher = stack.enter_context(open_launcher(docker_socket=bench.docker.socket))
        ways: dict[str, Measure] = {"bare": _command([TRUE])}
        if shutil.which("bwrap"):
            ways["bwrap"] = _command(list(_BWRAP))

        async def runc() -> tuple[float, float]:
            return await _command(bench.runc.run(TRUE))()

        async def runsc() -> tuple[float, float]:
            return await _command(bench.runc.run_gvisor(TRUE))()

        ways["runc"] = runc
        if offers.find(RUNSC)[0]:
            ways["runsc"] = runsc
        ways["docker"] = _command(bench.docker.run(TRUE))
        oci = (each for each in offers.PACKAGES if offers.find(each)[0])
        for name in (NATIVE, *oci, offers.DOCKER):
            runtime = ChosenRuntime(launcher, name)
            sessions = await stack.enter_async_context(open_sessions(runtime))
            ways[f"session_{name}"] = _session(launcher, sessions)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for number in range(ROUNDS + 1):
            for name, measure in ways.items():
                await asyncio.sleep(GAP_S)
                values = await measure()
                if number:  # The first round warms up.
                    found[name].append(values)
    return found


def _command(argv: list[str]) -> Measure:
    async def measure() -> tuple[float, float]:
        before, begin = _children_s(), time.perf_counter()
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        return time.perf_counter() - begin, _children_s() - before

    return measure


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _session(launcher: Launcher, sessions: Sessions) -> Measure:
    asked = spec(TRUE)
    assert launcher.process is not None
    pid = launcher.process.pid

    async def measure() -> tuple[float, float]:
        before = _tree_s(pid)
        kernel = await sessions.prepare(asked)
        begin = time.perf_counter()
        await sessions.runtime.start(kernel, asked)
        await sessions.gone(kernel)
        wall = time.perf_counter() - begin
        ended = await sessions.runtime.settle(kernel)
        if ended.exit_code != 0:
            raise RuntimeError(f"{sessions.chosen}: {ended.text}")
        await sessions.runtime.remove(kernel)
        await asyncio.sleep(2 * GAP_S)  # What it took from what is made ahead is made again.
        return wall, _tree_s(pid) - before

    return measure


def _tree_s(pid: int) -> float:
    """CPU time of the launcher, its keepers and inits, dead ones too."""
    total = 0.0
    for each in machine.tree(pid):
        try:
            total += machine.cpu_s([each])
        except FileNotFoundError:
            continue
    return total
