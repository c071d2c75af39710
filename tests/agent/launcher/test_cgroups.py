"""Control groups: found, limited, counted, in every version that there is."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from madang.agent.launcher import cgroups
from madang.agent.launcher.cgroups import Counters, Group, Hierarchies
from madang.wire.size import MIB, Size

SIZE = Size(cpu=0.5, mem_bytes=64 * MIB, pids=10, disk_bytes=64 * MIB)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes control groups")


@pytest.fixture
def real() -> Iterator[Hierarchies]:
    """This machine's."""
    found = cgroups.detect(f"madang-test-{secrets.token_hex(4)}")
    yield found
    for name in found.names():
        assert found.group(name).remove()
    found.remove()


@needs_root
def test_limits_written_are_limits_read(real: Hierarchies) -> None:
    group = real.make("a")
    group.limit(SIZE, [0])
    memory = group.paths["memory"]
    file = "memory.max" if group.version == 2 else "memory.limit_in_bytes"

    assert cgroups.read(f"{memory}/{file}") == str(SIZE.mem_bytes)
    assert cgroups.read(f"{group.paths['pids']}/pids.max") == "11"
    assert cgroups.read(f"{group.paths['cpuset']}/cpuset.cpus") == "0"


@needs_root
def test_a_group_with_processes_stays_until_they_are_gone(real: Hierarchies) -> None:
    group = real.make("b")
    process = subprocess.Popen(["sleep", "1000"], preexec_fn=group.join)

    assert group.processes() == [process.pid]
    assert not group.remove()
    assert group.freeze()
    assert group.thaw()
    process.send_signal(signal.SIGKILL)
    process.wait()

    assert group.remove()
    assert group.remove(), "again is fine"
    assert real.names() == set()


@needs_root
def test_counters_count(real: Hierarchies) -> None:
    group = real.make("c")
    group.limit(SIZE, [])
    code = "x = bytearray(20 << 20)\nfor n in range(10**6): pass"
    subprocess.run(["python3", "-c", code], preexec_fn=group.join, check=True)
    counters = group.counters()

    assert counters.cpu_s is not None
    assert counters.cpu_s > 0
    assert counters.mem_peak_bytes is None or counters.mem_peak_bytes > 20 * MIB
    assert (counters.oom_kills, counters.pids_denied) == (0, 0)
    group.remove()


def fake_v2(tmp_path: Path, controllers: str) -> str:
    """Files as version 2 has them; the kernel behind them is not."""
    mounts = tmp_path / "mounts"
    root = tmp_path / "cgroup"
    base = root / "madang-x"
    base.mkdir(parents=True)
    for folder in (root, base):
        (folder / "cgroup.subtree_control").write_text(controllers)
    mounts.write_text(f"cgroup2 {root} cgroup2 rw 0 0\n")
    return str(mounts)


@needs_root
def test_version_2_is_used_where_it_has_controllers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "try_write", lambda path, value: True)
    mounts = fake_v2(tmp_path, "cpu memory pids")
    found = cgroups.detect("madang-x", mounts=mounts)

    assert found.version == 2
    assert set(found.bases) == {"cpu", "memory", "pids"}
    assert len(found.group("s").folders) == 1


@needs_root
def test_without_controllers_there_is_nowhere(tmp_path: Path) -> None:
    assert cgroups.detect("madang-x", mounts=fake_v2(tmp_path, "")) is cgroups.NOWHERE
    (tmp_path / "none").write_text("")
    assert cgroups.detect("madang-x", mounts=str(tmp_path / "none")) is cgroups.NOWHERE


def version_2(folder: Path, **files: str) -> Group:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    paths = dict.fromkeys(("cpu", "memory", "pids", "cpuset"), str(folder))
    return Group(version=2, paths=paths)


def test_limits_of_version_2(tmp_path: Path) -> None:
    names = ("memory.max", "memory.swap.max", "cpu.max", "pids.max", "cpuset.cpus")
    group = version_2(tmp_path, **{name.replace(".", "__"): "" for name in names})
    group.limit(SIZE, [1, 3])

    assert [(tmp_path / name).read_text() for name in names] == [
        str(64 * MIB), "0", "50000 100000", "11", "1,3",
    ]  # fmt: skip


def test_counters_of_version_2(tmp_path: Path) -> None:
    group = version_2(
        tmp_path,
        memory__current="1000\n",
        memory__peak="2000\n",
        memory__events="low 0\nhigh 0\nmax 5\noom 2\noom_kill 1\noom_group_kill 0\n",
        cpu__stat="usage_usec 1500000\nuser_usec 1000000\n",
        pids__current="3\n",
        pids__events="max 4\n",
    )
    assert group.counters() == Counters(
        cpu_s=1.5, mem_bytes=1000, mem_peak_bytes=2000, oom_kills=1, pids=2, pids_denied=4
    )


def test_no_group_counts_nothing() -> None:
    assert Group(version=0).counters() == Counters()
    assert Group(version=0).remove()
