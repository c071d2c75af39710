"""One function for each figure of the design's table; each returns one or more rows."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import machine
import references
from madang.client import Client
from madang.testing.platform import Platform, begin
from madang.wire.session import Session, SessionSpec, SessionStatus, SizeRequest

T = TypeVar("T")

PRINT: Final = ("/usr/bin/python3", "-c", "print(1)")
ROUNDS: Final = 40
GAP_S: Final = 0.05
"""Between two starts: people type; tight loops flatter whoever works ahead."""
SMALL: Final[dict[str, Any]] = {"cpu": 0.05, "mem": "32m"}
"""Of sessions that are many."""
START_S: Final = 30.0
MADANG: Final = str(Path(sys.executable).with_name("madang"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A figure, and the reference's where there is one."""

    name: str
    value: float
    unit: str
    goal: str = ""
    reference: str = ""
    reference_value: float | None = None
    note: str = ""

    def line(self) -> str:
        """``name value unit``, then the reference and its ratio."""
        text = f"{self.name} {self.value:.4g} {self.unit}"
        if self.reference_value is not None:
            ratio = self.reference_value / self.value
            text += f"   {self.reference} {self.reference_value:.4g} {self.unit} ×{ratio:.2g}"
        return text + (f"   goal {self.goal}" if self.goal else "")


class Bench:
    """What rows share: one platform and, if asked for, docker; made when first used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()

    @cached_property
    def platform(self) -> Platform:
        folder = self.folder / "platform"
        folder.mkdir()
        # So many small sessions at once are more than this machine would promise by itself.
        environment = {"MADANG_NODE_CPU_OVERCOMMIT": "4", "MADANG_DEFAULTS_PIDS": "128"}
        environment |= {"MADANG_DEFAULTS_DISK": "1g"}
        platform = begin(folder, environment=environment)
        self._stack.callback(platform.stop)
        time.sleep(2)  # let what is made ahead be made
        return platform

    @cached_property
    def client(self) -> Client:
        return self._stack.enter_context(self.platform.client())

    @cached_property
    def docker(self) -> references.Docker:
        folder = self.folder / "docker"
        folder.mkdir()
        return self._stack.enter_context(references.docker_daemon(folder))

    @cached_property
    def runc(self) -> references.Runc:
        folder = self.folder / "runc"
        folder.mkdir()
        return references.Runc(folder)

    def close(self) -> None:
        self._stack.close()

    def first_output_s(self, *argv: str, **size: object) -> float:
        """From the call of the API to the first output; the session is removed afterwards."""
        begin = time.perf_counter()
        run = self.client.run(argv, **({"cpu": 1, "mem": "512m"} | size))  # type: ignore[arg-type]
        next(iter(run))
        seconds = time.perf_counter() - begin
        self.client.remove(run.wait().id)
        return seconds

    def command(self, *argv: str) -> list[str]:
        return [MADANG, *argv]

    def whole_s(self, *argv: str) -> float:
        begin = time.perf_counter()
        subprocess.run(
            self.command(*argv), check=True, stdin=subprocess.DEVNULL, capture_output=True,
            cwd=self.folder, env=self.platform.environment,
        )  # fmt: skip
        return time.perf_counter() - begin


def interleaved(rounds: int, *measures: Callable[[], T]) -> list[list[T]]:
    """Each in turn, with gaps; the first round warms up and does not count."""
    found: list[list[T]] = [[] for _ in measures]
    for number in range(rounds + 1):
        for values, measure in zip(found, measures, strict=True):
            time.sleep(GAP_S)
            value = measure()
            if number:
                values.append(value)
    return found


def ms(values: list[float]) -> float:
    return statistics.median(values) * 1000


def session_cold(bench: Bench) -> Iterator[Row]:
    """Create → first output, beside docker, runc and the bare program."""
    ours, docker, runc, bare = interleaved(
        ROUNDS,
        lambda: bench.first_output_s(*PRINT),
        lambda: references.first_output_s(bench.docker.run(*PRINT)),
        lambda: references.first_output_s(bench.runc.run(*PRINT)),
        lambda: references.first_output_s(PRINT),
    )
    note = f"p90 {sorted(ours)[int(len(ours) * 0.9)] * 1000:.1f} ms, {ROUNDS} rounds"
    yield Row(name="session_cold", value=ms(ours), unit="ms", goal="≤ 40", reference="docker run",
              reference_value=ms(docker), note=note)  # fmt: skip
    yield Row(name="session_cold_runc", value=ms(ours), unit="ms", reference="runc run",
              reference_value=ms(runc))  # fmt: skip
    yield Row(name="session_cold_bare", value=ms(ours), unit="ms", reference="bare process",
              reference_value=ms(bare))  # fmt: skip
    yield Row(name="docker_ratio", value=ms(docker) / ms(ours), unit="×", goal="≥ 8")


def run_command(bench: Bench) -> Iterator[Row]:
    """A whole command line, from nothing to its exit code."""
    ours, docker = interleaved(
        ROUNDS // 2,
        lambda: bench.whole_s("run", "--no-sync", "--", "true"),
        lambda: references.whole_s(bench.docker.run("true")),
    )
    yield Row(name="run_command", value=ms(ours), unit="ms", goal="≤ 150", reference="docker run",
              reference_value=ms(docker))  # fmt: skip


def cli_help(bench: Bench) -> Iterator[Row]:
    ours, docker = interleaved(
        ROUNDS // 2,
        lambda: bench.whole_s("--help"),
        lambda: references.whole_s([references.docker(), "--help"]),
    )
    yield Row(name="cli_help", value=ms(ours), unit="ms", goal="≤ 100", reference="docker --help",
              reference_value=ms(docker))  # fmt: skip


def burst(bench: Bench, count: int, goal: str) -> Iterator[Row]:
    """Sessions created at once, each from a thread of its own: the last one's first output."""
    yield Row(name=f"burst_{count}", value=burst_s(bench, count, "echo", "hello"), unit="s",
              goal=goal)  # fmt: skip


def burst_s(bench: Bench, count: int, *argv: str) -> float:
    """Until the last of *count* small sessions, created at once, has said something; a median."""

    def once() -> float:
        ids: list[str] = []
        barrier = threading.Barrier(count + 1)
        done: list[float] = []

        def one() -> None:
            with bench.platform.client() as client:
                client.get_info()
                barrier.wait()
                run = client.run(argv, **SMALL)
                next(iter(run))
                done.append(time.perf_counter())
                ids.append(run.wait().id)

        threads = [threading.Thread(target=one) for _ in range(count)]
        for thread in threads:
            thread.start()
        barrier.wait()
        begin = time.perf_counter()
        for thread in threads:
            thread.join()
        if len(done) != count:
            raise RuntimeError(f"{count - len(done)} of {count} sessions failed")
        for session in ids:
            bench.client.remove(session)
        time.sleep(1)
        return max(done) - begin

    return statistics.median([once() for _ in range(4)][1:])


def thaw(bench: Bench) -> Iterator[Row]:
    """A frozen session: from input through the API to the program's answer; beside an awake one."""
    script = "import sys\nprint('ready', flush=True)\nfor line in sys.stdin: print(1, flush=True)"
    spec = SessionSpec(
        argv=("/usr/bin/python3", "-c", script),
        stdin=True,
        size=SizeRequest(cpu=1, mem_bytes=64 * 2**20),
    )
    run = bench.client.run_spec(spec)
    output = iter(run)
    next(output)
    assert run.session is not None
    session = run.session.id

    def awake() -> float:
        begin = time.perf_counter()
        run.write(b"?\n")
        next(output)
        return time.perf_counter() - begin

    def frozen() -> float:
        bench.client.freeze(session)
        time.sleep(GAP_S)
        return awake()

    woken, answered = interleaved(ROUNDS, frozen, awake)
    bench.client.stop(session, grace_s=0)
    bench.client.wait_session(session, timeout_s=START_S)
    bench.client.remove(session)
    note = f"p90 {sorted(woken)[int(len(woken) * 0.9)] * 1000:.1f} ms; an awake one: "
    yield Row(name="thaw", value=ms(woken), unit="ms", goal="≤ 10",
              note=f"{note}{ms(answered):.2f} ms")  # fmt: skip


def life_cpu(bench: Bench) -> Iterator[Row]:
    """CPU of supervisor, launcher and server, keepers included, without the program's own."""
    running = bench.platform.running()
    pids = [running.pid, *(pid for pid, _ in running.children)]
    count, programs = 50, 0.0
    bench.first_output_s("echo", "x")
    time.sleep(1)
    before = machine.cpu_s(pids)
    idle = time.perf_counter()
    for _ in range(count):
        run = bench.client.run(["echo", "hello"], cpu=1, mem="64m")
        ended = run.wait().ended
        programs += (ended and ended.cpu_s) or 0.0
        time.sleep(GAP_S)
    time.sleep(1)
    used = machine.cpu_s(pids) - before
    yield Row(name="life_cpu", value=(used - programs) / count * 1000, unit="ms", goal="≤ 30",
              note=f"over {time.perf_counter() - idle:.0f} s with {count} sessions")  # fmt: skip


def read_rate(bench: Bench) -> Iterator[Row]:
    """Authenticated reads of one session: server on one core, load from the other."""
    session = bench.client.run(["echo", "hello"], cpu=1, mem="64m").wait()
    server = bench.platform.child("server")
    subprocess.run(["taskset", "-apc", "0", str(server)], check=True, capture_output=True)
    try:
        shown = subprocess.run(
            ["taskset", "-c", "1", "wrk", "-t1", "-c8", "-d5s", "--latency",
             "-H", f"Authorization: Bearer {bench.platform.token}",
             f"{bench.platform.url}/v1/sessions/{session.id}"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    finally:
        subprocess.run(["taskset", "-apc", "0-1", str(server)], check=True, capture_output=True)
    if "Non-2xx" in shown:
        raise RuntimeError(shown)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", shown)
    slow = re.search(r"99%\s+([\d.]+)(us|ms|s)", shown)
    assert rate and slow, shown
    p99 = float(slow[1]) * {"us": 0.001, "ms": 1, "s": 1000}[slow[2]]
    yield Row(name="read_rate", value=float(rate[1]), unit="/s", goal="≥ 3000")
    yield Row(name="read_rate_p99", value=p99, unit="ms", goal="≤ 10")


def memory(bench: Bench) -> Iterator[Row]:
    """PSS when nothing runs, and what an idle session adds."""
    platform = bench.platform
    time.sleep(1)
    everything = machine.tree(platform.running().pid)
    launcher = machine.tree(platform.child("launcher"))
    idle = machine.pss_bytes(everything)
    yield Row(name="idle_memory", value=idle / 2**20, unit="MiB", goal="≤ 140",
              note=f"{len(everything)} processes, sandboxes made ahead included")  # fmt: skip
    yield Row(name="launcher_memory", value=machine.pss_bytes(launcher) / 2**20, unit="MiB",
              note="launcher and sandboxes made ahead")  # fmt: skip
    agent = agent_pss_bytes() + machine.pss_bytes(launcher)
    yield Row(name="agent_memory", value=agent / 2**20, unit="MiB", goal="≤ 60",
              note="a process with the agent alone, and launcher_memory")  # fmt: skip
    with idle_sessions(bench.client, 10):
        time.sleep(1)
        more = machine.pss_bytes(machine.tree(platform.running().pid)) - idle
    yield Row(name="session_memory", value=more / 10 / 2**20, unit="MiB", goal="≤ 5",
              note="keeper, init and the server's share, of ten idle sessions")  # fmt: skip


def agent_pss_bytes() -> int:
    """Of an interpreter that has loaded all of the agent and nothing of the manager."""
    script = (
        "import asyncio, gc, madang.agent.service, madang.agent.build, madang.storage\n"
        "import madang.agent.runtime.native, madang.kit.clock\n"
        "gc.collect()\n"
        "print(flush=True)\n"
        "input()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout
        process.stdout.readline()
        found = machine.pss_bytes([process.pid])
        process.communicate("\n")
    return found


def _idle(cpu: float = 0.05) -> SessionSpec:
    return SessionSpec(size=SizeRequest(cpu=cpu, mem_bytes=32 * 2**20))


TINY: Final = SessionSpec(
    size=SizeRequest(cpu=0.01, mem_bytes=16 * 2**20, pids=16, disk_bytes=64 * 2**20)
)
"""So many of them as the machine's memory holds."""


@contextmanager
def idle_sessions(
    client: Client, count: int, spec: SessionSpec | None = None
) -> Iterator[list[Session]]:
    made = [client.create_session(spec or _idle()) for _ in range(count)]
    try:
        wanted = [SessionStatus.RUNNING]
        found = [client.wait_session(s.id, until=wanted, timeout_s=START_S) for s in made]
        if any(session.status is not SessionStatus.RUNNING for session in found):
            raise RuntimeError(f"not all of {count} sessions run: {found[-1].pending}")
        yield found
    finally:
        for session in made:
            client.stop(session.id, grace_s=0)
        for session in made:
            client.wait_session(session.id, timeout_s=START_S)
            client.remove(session.id)


def submit_rate(bench: Bench) -> Iterator[Row]:
    """Durable creates accepted, from four connections; the sessions wait for room."""
    count, threads = 1000, 4
    ids: list[str] = []
    with idle_sessions(bench.client, 1):

        def some() -> None:
            with bench.platform.client() as client:
                ids.extend(
                    client.create_session(_idle(cpu=7.9)).id for _ in range(count // threads)
                )

        workers = [threading.Thread(target=some) for _ in range(threads)]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - begin
        for session in ids:
            bench.client.stop(session, grace_s=0)
    for session in ids:
        bench.client.remove(session)
    yield Row(name="submit_rate", value=len(ids) / seconds, unit="/s", goal="≥ 500",
              note="the client's own time included")  # fmt: skip


def restart(bench: Bench) -> Iterator[Row]:
    """SIGKILL of the server with live sessions: until it answers and knows all of them."""
    count = 750
    with idle_sessions(bench.client, count, TINY) as sessions:
        old = bench.platform.kill("server")
        begin = time.perf_counter()
        with bench.platform.client() as client:
            client.get_info()
            ready = time.perf_counter() - begin
            alive = [client.get_session(s.id).status for s in sessions]
        lost = sum(status is not SessionStatus.RUNNING for status in alive)
        assert bench.platform.child("server") != old
    yield Row(name="restart", value=ready, unit="s", goal="≤ 5",
              note=f"{count} live sessions (the goal: 5,000), {lost} lost")  # fmt: skip


def blas_truth(bench: Bench) -> Iterator[Row]:
    """See ``blas_truth.py``: a matrix product in a one-CPU session, over the right thread count."""
    script = Path(__file__).with_name("blas_truth.py")
    shown = subprocess.run(
        [sys.executable, str(script)], check=True, capture_output=True, text=True
    ).stdout
    value = re.search(r"blas_truth ([\d.]+)", shown)
    assert value, shown
    yield Row(name="blas_truth", value=float(value[1]), unit="×", goal="≤ 1.05")


CONNECTS: Final = """
import socket, time
sock, best = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 1.0
for _ in range(20):
    start = time.perf_counter()
    for _ in range(1000):
        sock.connect(("127.0.0.1", 9))
    best = min(best, (time.perf_counter() - start) / 1000)
print(best * 1e6)
"""
FENCED: Final = """
version = 1
[[connect]]
deny = ["10.0.0.0/8:5432", "[fd00::]/8", "169.254.169.254", "*:25"]
[[connect]]
only = ["127.0.0.0/8", "192.0.2.0/24:443", "[2001:db8::]/32:8000-8999"]
with = "ECONNREFUSED"
"""


def policy_connect(bench: Bench) -> Iterator[Row]:
    """What rules about addresses add to a connect: sessions with and without them in turn.

    Of UDP, which does nothing else; each session gives the best of its blocks.
    """

    def connect_us(policy: str) -> float:
        run = bench.client.run([PRINT[0], "-c", CONNECTS], cpu=1, mem="512m", policy=policy)
        found = float(b"".join(chunk.data for chunk in run).decode())
        bench.client.remove(run.wait().id)
        return found

    plain, fenced = interleaved(15, lambda: connect_us(""), lambda: connect_us(FENCED))
    added = statistics.median(b - a for a, b in zip(plain, fenced, strict=True))
    note = f"medians: {statistics.median(plain):.3f} without, {statistics.median(fenced):.3f} with"
    yield Row(name="policy_connect", value=added, unit="µs", goal="≤ 1", note=note)
