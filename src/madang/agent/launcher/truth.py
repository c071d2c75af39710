"""What a session's programs read about their machine, made true: processors and memory.

The kernel itself keeps ``sched_getaffinity`` true (cpuset). The files here cover what libraries
read instead: glibc's ``get_nprocs`` (``online``), Node (``/proc/stat``), R and OpenMP runtimes
(``/proc/cpuinfo``), ``free`` and most memory heuristics (``/proc/meminfo``).

Processors keep the host's numbers everywhere, because ``sched_getcpu`` and affinity masks do: an
OpenMP runtime matches ``cpuinfo`` with its mask, and allocators index by processor number into
arrays as long as ``possible``. So a session on processor 5 has ``online`` 5 (one) and ``possible``
0-5.

The files are made once, at the start: totals are true, free memory and times do not move.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMEXPR_MAX_THREADS",
    "GOMAXPROCS",
    "PYTHON_CPU_COUNT",
)

Block = dict[str, str]
"""Keys and values of one paragraph of ``/proc/cpuinfo``, in order."""

_SECRET: Final = frozenset({"Serial"})
"""Names the physical board on ARM."""


def environment(cpu: float) -> dict[str, str]:
    """Variables that tell numeric libraries and run-times how many threads make sense."""
    return dict.fromkeys(THREAD_VARIABLES, str(max(1, math.ceil(cpu))))


def files(cpu: float, cpus: Sequence[int], mem_bytes: int) -> dict[str, bytes]:
    """Absolute in-session path → content. *cpus*: the session's processors, host numbers.

    Without a cpuset (*cpus* empty) the first ``ceil(cpu)`` numbers stand in: counts are true,
    numbers may not be.
    """
    seen = sorted(set(cpus)) or list(range(max(1, math.ceil(cpu))))
    system = "/sys/devices/system/cpu"
    possible = f"0-{seen[-1]}\n".encode() if seen[-1] else b"0\n"
    return {
        "/proc/cpuinfo": render_cpuinfo(_host_cpuinfo(), seen),
        "/proc/stat": render_stat(_boot_time(), seen),
        "/proc/meminfo": render_meminfo(min(mem_bytes, _host_memory())),
        f"{system}/online": f"{cpu_list(seen)}\n".encode(),
        f"{system}/present": possible,
        f"{system}/possible": possible,
        f"{system}/kernel_max": _read(f"{system}/kernel_max", b"0\n"),
    }


def cpu_list(cpus: Sequence[int]) -> str:
    """Ascending numbers in the kernel's list format: ``0-2,5``."""
    runs: list[list[int]] = []
    for number in cpus:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_cpuinfo(text: str) -> list[Block]:
    """Paragraphs of ``/proc/cpuinfo``; x86 has one per processor, ARM a last one of the board."""
    paragraphs = (part.splitlines() for part in text.split("\n\n"))
    blocks = (
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        for lines in paragraphs
    )
    return [block for block in blocks if any(block)]


def render_cpuinfo(blocks: Sequence[Block], cpus: Sequence[int]) -> bytes:
    """The paragraphs of *cpus* alone, with counts of siblings and cores among them.

    A number that the host does not list (no cpuset: see ``files``) gets the paragraph of another.
    """
    by_number = {int(b["processor"]): b for b in blocks if b.get("processor", "").isdecimal()}
    model = next(iter(by_number.values()), {})
    ours = [{**by_number.get(n, model), "processor": str(n)} for n in cpus]
    siblings = Counter(b.get("physical id") for b in ours)
    cores = Counter(
        package for package, _ in {(b.get("physical id"), b.get("core id")) for b in ours}
    )
    for block in ours:
        package = block.get("physical id")
        counts = {"siblings": str(siblings[package]), "cpu cores": str(cores[package])}
        block.update({key: value for key, value in counts.items() if key in block})
    board = [b for b in blocks if "processor" not in b]
    return "".join(_paragraph(block) for block in (*ours, *board)).encode()


def _paragraph(block: Block) -> str:
    lines = (f"{key}\t: {value}\n" for key, value in block.items() if key not in _SECRET)
    return "".join(lines) + "\n"


def render_stat(boot_time: int, cpus: Sequence[int]) -> bytes:
    """``/proc/stat`` of an idle machine with *cpus*; ``ps`` needs the boot time."""
    names = ("cpu ", *(f"cpu{number}" for number in cpus))
    lines = [f"{name} 0 0 0 0 0 0 0 0 0 0" for name in names]
    lines += ["intr 0", "ctxt 0", f"btime {boot_time}", "processes 0", "procs_running 1"]
    return "\n".join([*lines, "procs_blocked 0", "softirq 0 0 0 0 0 0 0 0 0 0 0", ""]).encode()


def render_meminfo(total_bytes: int) -> bytes:
    """``/proc/meminfo`` of a machine of that size where only this session has just started."""
    total = total_bytes // 1024
    free = max(total - 4096, total // 2)
    values = {"MemTotal": total, "MemFree": free, "MemAvailable": free}
    zeros = (
        "Buffers Cached SwapCached Active Inactive Active(anon) Inactive(anon) Active(file) "
        "Inactive(file) Unevictable Mlocked SwapTotal SwapFree Dirty Writeback AnonPages Mapped "
        "Shmem KReclaimable Slab SReclaimable SUnreclaim KernelStack PageTables Bounce "
        "WritebackTmp"
    )
    values |= dict.fromkeys(zeros.split(), 0)
    values |= {"CommitLimit": total, "Committed_AS": 0, "VmallocTotal": 34359738367}
    lines = [f"{key + ':':<15} {value:>8} kB" for key, value in values.items()]
    pages = [f"{key + ':':<15} {0:>8}" for key in ("HugePages_Total", "HugePages_Free")]
    return "\n".join([*lines, *pages, "Hugepagesize:       2048 kB", ""]).encode()


@functools.cache
def _host_cpuinfo() -> list[Block]:
    """Read once: on large machines the kernel asks every processor for its frequency."""
    return parse_cpuinfo(_read("/proc/cpuinfo").decode("utf-8", "replace"))


@functools.cache
def _host_memory() -> int:
    return _host_field("/proc/meminfo", b"MemTotal:") * 1024


def _boot_time() -> int:
    """Not cached: it follows corrections of the clock."""
    return _host_field("/proc/stat", b"btime")


def _host_field(path: str, name: bytes) -> int:
    for line in _read(path).splitlines():
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    raise OSError(f"{path} has no line {name.decode()!r}; is /proc mounted?")


def _read(path: str, default: bytes | None = None) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        if default is None:
            raise
        return default
