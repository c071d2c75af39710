"""Records, uids, processors, processes, timers: the launcher's memory."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.agent.launcher import registry
from madang.agent.launcher.cgroups import Group
from madang.agent.launcher.processes import ProcessId, boot_id, kill
from madang.agent.launcher.registry import Processors, Record, Uids
from madang.agent.launcher.timers import Timers
from madang.wire.errors import HostLacks, RuntimeFailed


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    record = Record(
        kernel="0123456789.1",
        uid=7,
        state=registry.STARTED,
        group=Group(version=1, paths={"memory": "/x"}),
        keeper=ProcessId(1, 2),
        init=ProcessId(3, 4),
        cpus=[1],
        boot=boot_id(),
    )
    record.save(str(tmp_path))
    assert registry.load(str(tmp_path)) == record


def test_processes_of_another_boot_are_forgotten(tmp_path: Path) -> None:
    Record(kernel="k", uid=7, keeper=ProcessId(1, 2), boot="other").save(str(tmp_path))
    found = registry.load(str(tmp_path))
    assert found is not None
    assert found.keeper is None


@given(st.binary(max_size=60) | st.sampled_from([b"{}", b'{"kernel": "x"}', b"[1]", b"null"]))
def test_a_torn_record_is_no_record(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, registry.FILE).write_bytes(data)
        assert registry.load(folder) is None


def test_a_record_of_a_newer_version_is_not_torn(tmp_path: Path) -> None:
    folder = tmp_path / f"{'0' * 26}.1"
    folder.mkdir()
    Record(kernel="k", uid=7).save(str(folder))
    registry.refuse_newer(str(tmp_path))
    registry.refuse_newer(str(tmp_path / "nowhere"))
    (folder / registry.FILE).write_text('{"version": 2, "something": "else"}')

    with pytest.raises(HostLacks, match="newer Madang, and is left alone"):
        registry.load(str(folder))
    with pytest.raises(HostLacks, match=folder.name):
        registry.refuse_newer(str(tmp_path))


@given(st.lists(st.booleans(), max_size=60))
def test_no_two_kernels_have_one_uid(steps: list[bool]) -> None:
    uids, taken = Uids(1000, 10), list[int]()
    for take in steps:
        if take and len(taken) < 10:
            uid = uids.take()
            assert uid not in taken
            assert 1000 <= uid < 1010
            taken.append(uid)
        elif taken:
            uids.free(taken.pop(0))


def test_when_all_uids_are_taken_it_says_what_to_do() -> None:
    uids = Uids(5, 1)
    uids.adopt(5)
    with pytest.raises(RuntimeFailed, match="madang rm"):
        uids.take()


def test_sessions_spread_over_processors() -> None:
    processors = Processors([0, 1, 2, 3])
    first, second = processors.take(2), processors.take(1.5)
    assert not set(first) & set(second)
    assert len(processors.take(64)) == 4
    processors.free(2, first)
    assert set(processors.take(2)) == set(first)


def test_a_reused_process_number_is_not_the_process() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    found = ProcessId.of(process.pid)
    assert found is not None
    assert ProcessId(process.pid, found.started - 1).open() is None
    fd = found.open()
    assert fd is not None
    kill(fd)
    os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOWAIT)
    assert ProcessId.of(process.pid) is None, "a zombie lives no more"
    process.wait()
    kill(fd)
    os.close(fd)
    assert found.open() is None


def test_timers_call_in_order_and_once() -> None:
    timers, called = Timers(), list[str]()
    timers.after(0.002, lambda: called.append("late"))
    timers.after(0.0, lambda: called.append("soon"))
    cancelled = timers.after(0.0, lambda: called.append("never"))
    timers.cancel(cancelled)
    timers.cancel(cancelled)
    timers.run()
    assert called == ["soon"]
    wait = timers.wait_s()
    assert wait is not None
    time.sleep(wait + 0.001)
    timers.run()
    assert called == ["soon", "late"]
    assert timers.wait_s() is None
