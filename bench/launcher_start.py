"""How fast the launcher starts sessions: from the claim to the first byte of output.

Run as root: ``python bench/launcher_start.py [ROUNDS]``. Prints ``name value unit``, medians:
``sporadic`` with 100 ms between sessions, as people start them, and ``tight`` one after another.
A bare ``posix_spawn`` of the same program is measured in the same rounds.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections import defaultdict

from madang.agent.runtime import layout
from madang.agent.runtime.native import NativeRuntime
from madang.kit.clock import SystemClock
from madang.kit.ids import new_id
from madang.testing.sessions import Launcher, open_launcher, spec
from madang.wire.kernel import KernelId
from madang.wire.log import unpack

PROGRAM = ("/bin/echo", "hello")


def first_output_at(folder: str) -> float:
    """When the keeper read the first output, Unix time."""
    with open(f"{folder}/log/{0:020d}", "rb") as file:
        records, _ = unpack(file.read(), 0)
    return records[0].at_us / 1e6


async def one(runtime: NativeRuntime, found: dict[str, list[float]]) -> None:
    kernel = KernelId(new_id(), 1)
    began = time.time()
    await runtime.prepare(kernel, spec(*PROGRAM))
    prepared = time.time()
    started = await runtime.start(kernel, spec(*PROGRAM))
    running = time.time()
    folder = f"{runtime.kernel_dir(kernel)}/io/main"
    while (ended := layout.read_ended(folder)) is None:
        await asyncio.sleep(0.001)
    said = first_output_at(folder)
    removing = time.time()
    await runtime.remove(kernel)
    found["prepare"].append(prepared - began)
    found["start_answered"].append(running - prepared)
    found["claim_to_output"].append(said - prepared)
    found["prepare_to_output"].append(said - began)
    found["sandbox"].append(started.timings_ms["sandbox"] / 1000)
    found["output_to_ended"].append(ended.at - said)
    found["remove"].append(time.time() - removing)


def bare() -> float:
    reader, writer = os.pipe()
    began = time.perf_counter()
    actions = [(os.POSIX_SPAWN_DUP2, writer, 1)]
    pid = os.posix_spawn(PROGRAM[0], list(PROGRAM), {}, file_actions=actions)
    os.read(reader, 100)
    took = time.perf_counter() - began
    os.waitpid(pid, 0)
    os.close(reader)
    os.close(writer)
    return took


async def measure(launcher: Launcher, rounds: int) -> None:
    runtime = NativeRuntime(launcher.socket, str(launcher.state), SystemClock())
    await runtime.open()
    await asyncio.sleep(1.0)
    for name, gap_s in (("sporadic", 0.1), ("tight", 0.0)):
        found: defaultdict[str, list[float]] = defaultdict(list)
        for number in range(rounds):
            await one(runtime, found)
            found["posix_spawn"].append(bare())
            if number == 0:
                found.clear()
            await asyncio.sleep(gap_s)
        for key, values in found.items():
            best, median = min(values) * 1000, statistics.median(values) * 1000
            print(f"launcher_{name}_{key} {median:.2f} ms (best {best:.2f})")
    await runtime.close()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with open_launcher() as launcher:
        asyncio.run(measure(launcher, rounds))


if __name__ == "__main__":
    main()
