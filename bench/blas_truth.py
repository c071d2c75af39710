"""A matrix product in a one-processor session, over the same with the right number of threads.

A library that believes in more processors than it gets is slower by factors; here it must not.
Run as root: ``python bench/blas_truth.py [ROUNDS]``. The reference is numpy outside of any session,
pinned to one processor and told to use one thread. Both live side by side and take turns; medians.
``without_variables``: the session's thread-count variables removed, so that libraries go by what
they see.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable

from madang.agent.runtime.native import NativeRuntime
from madang.kit.clock import SystemClock
from madang.testing.sessions import Launcher, Sessions, numpy_image, open_launcher, sessions
from madang.wire.size import GIB

PYTHON = "/usr/bin/python3"
WORKER = """
import os, sys, time
if "bare" in sys.argv:
    for name in list(os.environ):
        if name.endswith("_THREADS"):
            del os.environ[name]
import numpy
a = numpy.ones((1024, 1024), numpy.float32)
a @ a
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    print((time.perf_counter() - start) / 5 * 1000, flush=True)
"""
Turn = Callable[[], Awaitable[float]]


async def session_worker(found: Sessions, launcher: Launcher, *arguments: str) -> Turn:
    kernel = await found.start(
        *(PYTHON, "-c", WORKER, *arguments), image=numpy_image(launcher.state),
        stdin=True, cpu=1.0, mem_bytes=GIB,
    )  # fmt: skip
    written = await found.until(kernel, b"ready\n")
    feed = await found.keepers.stdin(found.io(kernel))
    lines = written.count(b"\n")

    async def turn() -> float:
        nonlocal lines
        await feed.write(b"go\n")
        while (told := b"".join(found.output(kernel))).count(b"\n") == lines:
            await asyncio.sleep(0.005)
        lines += 1
        return float(told.split()[-1])

    return turn


def reference_worker(site_packages: str) -> tuple[subprocess.Popen[str], Turn]:
    cpu = min(os.sched_getaffinity(0))
    environment = {
        "PYTHONPATH": site_packages,
        "OPENBLAS_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }
    process = subprocess.Popen(
        ["taskset", "-c", str(cpu), PYTHON, "-c", WORKER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    incoming, outgoing = process.stdout, process.stdin
    incoming.readline()

    async def turn() -> float:
        outgoing.write("go\n")
        outgoing.flush()
        return float(await asyncio.to_thread(incoming.readline))

    return process, turn


async def measure(launcher: Launcher, rounds: int) -> dict[str, float]:
    runtime = NativeRuntime(launcher.socket, str(launcher.state), SystemClock())
    async with sessions(runtime, launcher) as found:
        turns = {
            "session": await session_worker(found, launcher),
            "without_variables": await session_worker(found, launcher, "bare"),
        }
        digest = numpy_image(launcher.state).digest
        layer = launcher.state / "layers" / digest / "site-packages"
        process, turns["right"] = reference_worker(str(layer))
        try:
            samples: dict[str, list[float]] = {name: [] for name in turns}
            for _ in range(rounds):
                for name, turn in turns.items():
                    samples[name].append(await turn())
        finally:
            process.communicate()
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 25
    with open_launcher() as launcher:
        try:
            found = asyncio.run(measure(launcher, rounds))
        except LookupError as exc:
            sys.exit(f"blas_truth: {exc}")
    right = found["right"]
    print(f"blas_truth {found['session'] / right:.3f} ratio")
    print(f"blas_truth_without_variables {found['without_variables'] / right:.3f} ratio")
    print(f"blas_session {found['session']:.2f} ms")
    print(f"blas_right {right:.2f} ms")


if __name__ == "__main__":
    main()
