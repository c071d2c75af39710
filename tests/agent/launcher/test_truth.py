"""Generated files against the programs' ways of reading them."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.agent.launcher import truth

CPUS = st.sets(st.integers(0, 511), min_size=1, max_size=40).map(sorted)

X86 = "".join(
    f"processor\t: {n}\nmodel name\t: Fast CPU\nphysical id\t: {n // 4}\nsiblings\t: 4\n"
    f"core id\t\t: {n % 4 // 2}\ncpu cores\t: 2\nflags\t\t: fpu sse\npower management:\n\n"
    for n in range(8)
)
PI = (
    "".join(f"processor\t: {n}\nBogoMIPS\t: 38.40\nCPU part\t: 0xd03\n\n" for n in range(4))
    + "Hardware\t: BCM2835\nRevision\t: a02082\nSerial\t\t: 00000000deadbeef\n"
    "Model\t\t: Raspberry Pi 3\n"
)


def parse_list(text: str) -> list[int]:
    """As glibc reads ``online``."""
    found: list[int] = []
    for part in text.strip().split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


@given(CPUS)
def test_a_cpu_list_reads_back(cpus: list[int]) -> None:
    assert parse_list(truth.cpu_list(cpus)) == cpus


@given(CPUS, st.integers(16 << 20, 1 << 50))
def test_every_file_tells_the_same_count(cpus: list[int], mem_bytes: int) -> None:
    files = truth.files(len(cpus), cpus, mem_bytes)
    system = "/sys/devices/system/cpu"

    assert parse_list(files[f"{system}/online"].decode()) == cpus
    assert parse_list(files[f"{system}/possible"].decode()) == list(range(cpus[-1] + 1))
    lines = files["/proc/stat"].decode().splitlines()
    assert [line.split()[0] for line in lines if line.startswith("cpu")] == [
        "cpu", *(f"cpu{n}" for n in cpus),
    ]  # fmt: skip
    processors = [
        int(line.partition(":")[2])
        for line in files["/proc/cpuinfo"].decode().splitlines()
        if line.startswith("processor")
    ]
    assert processors == cpus


@given(st.integers(16 << 20, 1 << 50))
def test_memory_is_the_limit_but_never_more_than_the_machine_has(mem_bytes: int) -> None:
    fields = dict(
        line.split(":")
        for line in truth.files(1, [0], mem_bytes)["/proc/meminfo"].decode().splitlines()
    )
    total, free = (int(fields[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024
    assert total == min(mem_bytes // 1024, total)
    assert total <= machine
    assert 0 < free <= total
    assert int(fields["SwapTotal"].split()[0]) == 0


def test_cpuinfo_of_x86_counts_cores_and_siblings_of_the_session() -> None:
    text = truth.render_cpuinfo(truth.parse_cpuinfo(X86), [1, 2, 3, 5]).decode()

    blocks = truth.parse_cpuinfo(text)
    assert [block["processor"] for block in blocks] == ["1", "2", "3", "5"]
    assert [block["siblings"] for block in blocks] == ["3", "3", "3", "1"]
    assert [block["cpu cores"] for block in blocks] == ["2", "2", "2", "1"]
    assert blocks[0]["flags"] == "fpu sse"
    assert "power management" in blocks[0]


def test_cpuinfo_of_arm_keeps_the_board_without_its_serial_number() -> None:
    text = truth.render_cpuinfo(truth.parse_cpuinfo(PI), [2]).decode()

    assert text.count("processor") == 1
    assert "Raspberry Pi 3" in text
    assert "deadbeef" not in text


def test_a_processor_that_the_host_does_not_list_still_has_a_model() -> None:
    text = truth.render_cpuinfo(truth.parse_cpuinfo(X86), [99]).decode()

    assert "processor\t: 99\n" in text
    assert "Fast CPU" in text


def test_an_unreadable_cpuinfo_still_counts() -> None:
    assert truth.render_cpuinfo([], [0, 1]).decode().count("processor") == 2


def parse_mask(text: str) -> list[int]:
    bits = int(text.replace(",", ""), 16)
    return [n for n in range(bits.bit_length()) if bits >> n & 1]


@given(CPUS)
def test_a_cpu_mask_reads_back(cpus: list[int]) -> None:
    text = truth.cpu_mask(cpus)
    assert parse_mask(text) == cpus
    assert all(len(word) == 8 for word in text.split(","))


@given(CPUS.filter(lambda cpus: len(cpus) <= 40), st.integers(1, 4))
def test_the_topology_is_the_session_s_part_of_the_machine_s(cpus: list[int], threads: int) -> None:
    cores = {n: truth.Core(n // 64, n % 64 // threads) for n in range(512)}

    found = truth.render_topology(cores, cpus)

    for n in cpus:
        told = {name: found[f"cpu{n}/topology/{name}"] for name in TOPOLOGY}
        same = [m for m in cpus if cores[m] == cores[n]]
        assert parse_list(told["thread_siblings_list"]) == same
        assert parse_mask(told["thread_siblings"]) == same
        assert parse_list(told["core_siblings_list"]) == [m for m in cpus if m // 64 == n // 64]
        assert told["physical_package_id"] == str(n // 64)
    distinct = {found[f"cpu{n}/topology/thread_siblings_list"] for n in cpus}
    assert len(distinct) == len({cores[n] for n in cpus})


def test_a_very_large_session_has_no_topology_files() -> None:
    assert truth.render_topology({}, range(200)) == {}
    assert len(truth.files(200, range(200), 1 << 40)) < 20


TOPOLOGY = (
    "core_id physical_package_id thread_siblings thread_siblings_list core_siblings_list".split()
)


@pytest.mark.parametrize(
    ("cpu", "threads"), [(0.01, "1"), (0.5, "1"), (1, "1"), (1.5, "2"), (64, "64")]
)
def test_thread_counts_are_rounded_up(cpu: float, threads: str) -> None:
    variables = truth.environment(cpu)
    assert set(variables.values()) == {threads}
    assert {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GOMAXPROCS"} <= variables.keys()


def test_without_a_cpuset_the_count_is_true() -> None:
    files = truth.files(1.5, [], 1 << 30)
    assert files["/sys/devices/system/cpu/online"] == b"0-1\n"


def test_the_boot_time_is_the_real_one() -> None:
    with open("/proc/stat", encoding="ascii") as file:
        real = next(int(line.split()[1]) for line in file if line.startswith("btime"))
    told = truth.files(1, [0], 1 << 30)["/proc/stat"].decode()
    assert abs(int(told.split("btime ")[1].split()[0]) - real) <= 1
