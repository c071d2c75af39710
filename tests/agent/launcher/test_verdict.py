"""Blame and words for every end."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.agent.launcher.cgroups import Counters
from madang.agent.launcher.verdict import Seen, derive
from madang.wire.session import Reason
from madang.wire.size import MIB, Size

SIZE = Size(cpu=1, mem_bytes=512 * MIB, pids=20, disk_bytes=100 * MIB)
CLEAN = Seen(status=0, counters=Counters(), size=SIZE)
KILLED = signal.SIGKILL
OOM = Counters(oom_kills=1, mem_peak_bytes=511 * MIB)


def exit_status(code: int) -> int:
    return code << 8


@pytest.mark.parametrize(
    ("seen", "reason", "code", "text"),
    [
        (CLEAN, Reason.EXIT, 0, ""),
        (replace(CLEAN, status=exit_status(3)), Reason.EXIT, 3, "exit code 3"),
        (replace(CLEAN, status=int(signal.SIGSEGV)), Reason.SIGNAL, 139, "SIGSEGV"),
        (replace(CLEAN, status=40), Reason.SIGNAL, 168, "40"),
        (
            replace(CLEAN, status=int(KILLED), counters=OOM),
            Reason.OOM,
            137,
            "killed: memory limit 512 MiB reached, peak 511 MiB; ask for more with --mem",
        ),
        (replace(CLEAN, status=None, counters=OOM), Reason.OOM, 137, "512 MiB"),
        (replace(CLEAN, counters=OOM), Reason.EXIT, 0, "1 child process was killed"),
        (
            replace(CLEAN, status=exit_status(1), counters=Counters(oom_kills=3)),
            Reason.EXIT,
            1,
            "3 child processes were killed for the memory limit 512 MiB",
        ),
        (
            replace(CLEAN, status=exit_status(1), counters=Counters(pids_denied=7)),
            Reason.PIDS,
            1,
            "processes limit 20 reached, 7 refused; ask for more with --pids",
        ),
        (replace(CLEAN, counters=Counters(pids_denied=7)), Reason.EXIT, 0, ""),
        (
            replace(CLEAN, status=exit_status(1), disk_full=True),
            Reason.DISK,
            1,
            "disk limit 100 MiB reached; ask for more with --disk",
        ),
        (
            replace(CLEAN, failure=(127, "no such program: x")),
            Reason.EXIT,
            127,
            "no such program: x",
        ),
        (replace(CLEAN, status=None), Reason.SIGNAL, 137, "SIGKILL"),
        (replace(CLEAN, dropped_bytes=2 * MIB), Reason.EXIT, 0, "2 MiB of output were lost"),
    ],
)
def test_each_end_has_its_reason_and_words(
    seen: Seen, reason: Reason, code: int, text: str
) -> None:
    ended = derive(seen)
    assert (ended.reason, ended.exit_code) == (reason, code)
    assert text in ended.text


seen = st.builds(
    Seen,
    status=st.none() | st.integers(0, 255).map(exit_status) | st.integers(1, 64),
    counters=st.builds(
        Counters,
        oom_kills=st.integers(0, 3),
        pids_denied=st.integers(0, 3),
        mem_peak_bytes=st.none() | st.integers(0, 10**12),
    ),
    size=st.none() | st.just(SIZE),
    stop=st.none() | st.just((Reason.USER, "stopped by ada")) | st.just((Reason.TIMEOUT, "late")),
    disk_full=st.booleans(),
    dropped_bytes=st.integers(0, 10),
)


@given(seen)
def test_a_stop_that_was_asked_for_comes_first_and_an_exec_is_never_blamed_for_limits(
    found: Seen,
) -> None:
    ended = derive(found)
    if found.stop is not None:
        assert ended.reason is found.stop[0]
        assert found.stop[1] in ended.text
    elif found.size is None:
        assert ended.reason in {Reason.EXIT, Reason.SIGNAL}
    if found.stop is None and found.failure is None and found.status == 0:
        assert ended.reason is Reason.EXIT
    assert ended.exit_code is not None
    assert (ended.signal is None) or ended.exit_code == 128 + ended.signal
