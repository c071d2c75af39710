"""What a session's programs read about their machine, made true: processors and memory.

The kernel itself keeps ``sched_getaffinity`` true (cpuset). The files here cover what libraries
read instead: glibc's ``get_nprocs`` (``online``), Node (``/proc/stat``), R and OpenMP runtimes
(``/proc/cpuinfo``), ``free`` and most memory heuristics (``/proc/meminfo``), joblib, lscpu and
hwloc (``topology``: which processors are threads of one core).

Processors keep the host's numbers everywhere, because ``sched_getcpu`` and affinity masks do: an
OpenMP runtime matches ``cpuinfo`` with its mask, and allocators index by processor number into
arrays as long as ``possible``. So a session on processor 5 has ``online`` 5 (one) and ``possible``
0-5.

The files are made once, at the start: totals are true, free memory and times do not move.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

MOST_TOPOLOGY: Final = 128
"""Processors."""
_CPU: Final = "/sys/devices/system/cpu"

PROC_FILES: Final = ("/proc/cpuinfo", "/proc/stat", "/proc/meminfo")

Block = dict[str, str]
"""Keys and values of one paragraph of ``/proc/cpuinfo``, in order."""

_SECRET: Final = frozenset({"Serial"})
"""Names the physical board on ARM."""


@dataclass(frozen=True, slots=True)
class Core:
    """Which core a processor is a thread of."""

    package: int
    number: int

    @classmethod
    def read(cls, cpu: int) -> Core:
        folder = f"{_CPU}/cpu{cpu}/topology"
        package = _read(f"{folder}/physical_package_id").strip() or "0"
        number = _read(f"{folder}/core_id").strip() or str(cpu)
        return cls(int(package), int(number))


def environment(cpu: float) -> dict[str, str]:
    """Variables that tell numeric libraries and run-times how many threads make sense."""
    return dict.fromkeys(THREAD_VARIABLES, str(max(1, math.ceil(cpu))))


def files(cpu: float, cpus: Sequence[int], mem_bytes: int) -> dict[str, bytes]:
    """Absolute in-session path → content. *cpus*: the session's processors, host numbers.

    Without a cpuset (*cpus* empty) the first ``ceil(cpu)`` numbers stand in: counts are true,
    numbers may not be.
    """
    seen = sorted(set(cpus)) or list(range(max(1, math.ceil(cpu))))
    possible = cpu_list(range(seen[-1] + 1))
    system = {"online": cpu_list(seen), "present": possible, "possible": possible}
    system |= {"kernel_max": str(max(HOST.kernel_max, seen[-1]))}
    system |= render_topology(HOST.cores, seen)
    return {
        "/proc/cpuinfo": render_cpuinfo(HOST.cpuinfo, seen),
        "/proc/stat": render_stat(_boot_time(), seen),
        "/proc/meminfo": render_meminfo(min(mem_bytes, HOST.mem_bytes or mem_bytes)),
        **{f"{_CPU}/{name}": f"{text}\n".encode() for name, text in system.items()},
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


def cpu_mask(cpus: Sequence[int]) -> str:
    """Numbers as the kernel's masks: hexadecimal words of 32 bits, the highest first."""
    bits = sum(1 << number for number in cpus)
    words = range(max(cpus) // 32, -1, -1)
    return ",".join(f"{bits >> 32 * word & 0xFFFFFFFF:08x}" for word in words)


def render_topology(cores: Mapping[int, Core], cpus: Sequence[int]) -> dict[str, str]:
    """Name below ``/sys/devices/system/cpu`` → text, as if the machine had *cpus* alone.

    A number that the host does not list is a core of its own. Very large sessions get none: each
    file is a page.
    """
    if len(cpus) > MOST_TOPOLOGY:
        return {}
    ours = {number: cores.get(number, Core(0, number)) for number in cpus}
    found: dict[str, str] = {}
    for number, core in ours.items():
        threads = [n for n, other in ours.items() if other == core]
        package = [n for n, other in ours.items() if other.package == core.package]
        texts = {
            "core_id": str(core.number),
            "physical_package_id": str(core.package),
            "thread_siblings": cpu_mask(threads),
            "thread_siblings_list": cpu_list(threads),
            "core_siblings": cpu_mask(package),
            "core_siblings_list": cpu_list(package),
        }
        found |= {f"cpu{number}/topology/{name}": text for name, text in texts.items()}
    return found


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


def _boot_time() -> int:
    """Not kept: it follows corrections of the clock. As the kernel counts it; where we are, its
    own file may be hidden already."""
    return (time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) // 1_000_000_000


def _field(path: str, name: str) -> int:
    """The first number on the line of that name; 0 if there is none."""
    for line in _read(path).splitlines():
        if line.startswith(name):  # Before the split: a line of interrupts has thousands of words.
            words = line.replace(":", " ").split()
            if words[0] == name:
                return int(words[1])
    return 0


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Host:
    """What the machine has, as far as it does not change."""

    cpuinfo: list[Block]
    cores: dict[int, Core]
    kernel_max: int
    mem_bytes: int

    @classmethod
    def read(cls) -> Host:
        cpuinfo = parse_cpuinfo(_read("/proc/cpuinfo"))
        numbers = [int(n) for block in cpuinfo if (n := block.get("processor", "")).isdecimal()]
        return cls(
            cpuinfo=cpuinfo,
            cores={number: Core.read(number) for number in numbers},
            kernel_max=int(_read(f"{_CPU}/kernel_max") or 0),
            mem_bytes=_field("/proc/meminfo", "MemTotal") * 1024,
        )


HOST: Final = Host.read()
"""Read with the launcher's import, once: its forks share it, and on large machines a look at
``/proc/cpuinfo`` asks every processor for its frequency."""
