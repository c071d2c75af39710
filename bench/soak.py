"""Sessions in a row, then many at once, each removed: what is left, and what grew.

On a platform of its own. Anything left behind (process, mount, control group, loop device, file,
row) fails the figure; memory and descriptors are rows, from after the first 100 sessions on.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Final

import machine
from madang.client import Client
from madang.testing.platform import Platform, start
from madang.wire.session import Result, SessionSpec, SessionStatus, SizeRequest
from rows import Bench, Row

ENVIRONMENT: Final[Mapping[str, str]] = {
    "MADANG_NODE_CPU_OVERCOMMIT": "40",
    "MADANG_DEFAULTS_PIDS": "16",
    "MADANG_DEFAULTS_DISK": "16m",
}
SIZE: Final = SizeRequest(cpu=0.05, mem_bytes=32 << 20)
WARM, IN_A_ROW, AT_ONCE = 100, 1000, 200
SETTLE_S: Final = 60.0


def soak(bench: Bench) -> Iterator[Row]:
    """1,000 in a row and 200 at once leave nothing."""
    folder = bench.folder / "soak"
    folder.mkdir()
    with start(folder, environment=ENVIRONMENT) as platform, platform.client() as client:
        for number in range(WARM):
            one(client, number)
        before, used = settled(platform, {}), usage(platform)
        begin = time.perf_counter()
        for number in range(IN_A_ROW):
            one(client, number)
        yield Row(name="soak_in_a_row", value=time.perf_counter() - begin, unit="s",
                  note=f"{IN_A_ROW} sessions, created, waited for, removed")  # fmt: skip
        yield Row(name="soak_at_once", value=at_once(platform), unit="s",
                  note=f"{AT_ONCE} sessions that all run together, each removed")  # fmt: skip
        after = settled(platform, before)
        left = {name: after[name] - before[name] for name in after if after[name] > before[name]}
        if left:
            raise RuntimeError(f"left behind: {left}")
        yield Row(name="soak_left", value=sum(left.values()), unit="things", goal="0",
                  note=", ".join(f"{count} {name}" for name, count in after.items()))  # fmt: skip
        yield from growth(used, usage(platform))
    found = [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    if found:
        raise RuntimeError(f"mounts left by `madang down`: {found}")


def one(client: Client, number: int) -> None:
    """Create, wait, remove."""
    session = client.create_session(SessionSpec(argv=("echo", str(number)), size=SIZE))
    ended = client.wait_session(session.id, timeout_s=SETTLE_S)
    if ended.result is not Result.SUCCESS:
        raise RuntimeError(f"session {number} failed: {ended.ended}")
    client.remove(session.id)


def at_once(platform: Platform) -> float:
    """Seconds until all ran together, and were stopped and removed."""
    together = Barrier(AT_ONCE, timeout=SETTLE_S * 2)

    def each(_: int) -> None:
        with platform.client() as client:
            session = client.create_session(SessionSpec(argv=("sleep", "1000"), size=SIZE))
            running = client.wait_session(
                session.id, until=[SessionStatus.RUNNING], timeout_s=SETTLE_S
            )
            if running.status is not SessionStatus.RUNNING:
                together.abort()
                raise RuntimeError(f"does not run: {running.ended or running.pending}")
            together.wait()
            client.remove(session.id, force=True)

    begin = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        errors = [made.exception() for made in [pool.submit(each, n) for n in range(AT_ONCE)]]
    for error in sorted(filter(None, errors), key=lambda e: isinstance(e, BrokenBarrierError)):
        raise error  # the one that broke the barrier comes first
    return time.perf_counter() - begin


def settled(platform: Platform, goal: Mapping[str, int]) -> dict[str, int]:
    """The counts, once none exceeds *goal* or they no longer change."""
    give_up = time.monotonic() + SETTLE_S
    last: dict[str, int] = {}
    while time.monotonic() < give_up:
        try:
            now = counts(platform)
        except FileNotFoundError:  # a process ended while we looked at it
            continue
        if goal and all(now[name] <= goal[name] for name in now):
            return now
        if not goal and now == last:
            return now
        last = now
        time.sleep(1)
    return last


def counts(platform: Platform) -> dict[str, int]:
    """How many of each there are now."""
    state = platform.state
    groups = {  # each launcher has one folder in each hierarchy, named after its state folder
        line.rpartition(":")[2].strip("/").split("/")[0]
        for pid in machine.tree(platform.child("launcher"))
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        if "madang-" in line
    }
    return {
        "processes": len(machine.tree(platform.running().pid)),
        "mounts": Path("/proc/mounts").read_text().count(str(state)),
        "private mounts": len(
            Path(f"/proc/{platform.child('launcher')}/mounts").read_text().splitlines()
        ),
        "control groups": sum(
            len(folders)
            for name in groups
            for top in Path("/sys/fs/cgroup").glob(f"*/{name}")
            for _, folders, _ in os.walk(top)
        ),
        "loop devices": sum(
            str(state) in file.read_text()
            for file in Path("/sys/block").glob("loop*/loop/backing_file")
        ),
        "kernel folders": len(os.listdir(state / "kernels")),
        "files": sum(len(files) for _, _, files in os.walk(state)),
        **rows(state / "server" / "madang.db"),
    }


def rows(database: Path) -> dict[str, int]:
    """Of tables that grow with sessions; events and keys go by age, and are not counted."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return {
            f"rows in {table}": connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("sessions", "history")
        }


def usage(platform: Platform) -> dict[str, tuple[float, int]]:
    """PSS (MiB) and open descriptors of server and launcher."""
    found = {}
    for name in ("server", "launcher"):
        pid = platform.child(name)
        found[name] = (machine.pss_bytes([pid]) / 2**20, len(os.listdir(f"/proc/{pid}/fd")))
    return found


def growth(
    before: Mapping[str, tuple[float, int]], after: Mapping[str, tuple[float, int]]
) -> Iterator[Row]:
    """What server and launcher have more of."""
    for name, (memory, descriptors) in after.items():
        yield Row(name=f"soak_{name}_memory", value=memory - before[name][0], unit="MiB",
                  note=f"more than after the first {WARM} sessions: {memory:.0f} MiB")  # fmt: skip
        yield Row(name=f"soak_{name}_descriptors", value=descriptors - before[name][1],
                  unit="descriptors", goal="≤ 0", note=f"{descriptors} open")  # fmt: skip
