"""Limits, presets and idle sessions on a real platform, by the command line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from madang.client import Client
from madang.testing.patience import PATIENCE_S
from madang.testing.platform import Platform
from madang.wire.errors import LimitExceeded, NotFound
from madang.wire.limits import LimitsDraft
from madang.wire.session import Reason, Result, SessionSpec, SessionStatus, SizeRequest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sessions of several users"),
]
SMALL = SizeRequest(cpu=0.2, mem_bytes=64 << 20, disk_bytes=64 << 20)
IDLE = """
version = 1
idle_grace = "4s"
protect = "1h"
[[idle]]
kind = "output"
after = "2s"
[[idle]]
kind = "cpu"
after = "2s"
below = "0.02"
"""


@pytest.fixture
def limited(client: Client) -> Iterator[Client]:
    """Its user has no limits after the test."""
    yield client
    try:
        client.assign_limits("user:admin", None)
    except NotFound:
        pass
    for each in client.list_limits():
        client.remove_limits(each.name)


def done(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_limits_are_written_assigned_shown_and_kept(
    platform: Platform, limited: Client, tmp_path: Path
) -> None:
    file = tmp_path / "basic.toml"
    file.write_text('version = 1\nsessions = 1\ntime = "1h"\n[at_once]\nmem = "1g"\n')
    assert "nobody has them yet" in done(platform.madang("limits", "apply", "basic", str(file)))
    done(platform.madang("limits", "assign", "basic", "user:admin"))
    assert "user:admin" in done(platform.madang("limits", "ls"))
    assert done(platform.madang("limits", "show", "basic")) == file.read_text()

    name = done(platform.madang("run", "--no-sync", "-d", "--mem", "64m", "--", "sleep", "60"))
    shown = done(platform.madang("limits", "of"))
    assert "user admin" in shown
    assert "64 MiB  960 MiB" in shown
    assert limited.get_session(name.strip()).size.time_s == 3600

    refused = platform.madang("run", "--no-sync", "-d", "--mem", "64m", "--", "true")
    assert refused.returncode == 122
    assert "user admin: sessions 1 at once, 1 used → 0 left" in refused.stderr
    with pytest.raises(LimitExceeded):
        limited.create_session(SessionSpec(argv=("true",), size=SMALL))
    assert "are assigned to 1" in platform.madang("limits", "rm", "basic").stderr
    done(platform.madang("limits", "unassign", "user:admin"))
    done(platform.madang("limits", "rm", "basic"))
    assert "removed" in done(platform.madang("limits", "show", "--history", "basic"))


def test_a_preset_is_a_size_that_flags_override(platform: Platform, client: Client) -> None:
    done(platform.madang("preset", "set", "tiny", "--cpu", "0.2", "--mem", "48m", "--time", "5m"))
    try:
        assert "48 MiB" in done(platform.madang("preset", "ls"))
        arguments = ("--no-sync", "-d", "--preset", "tiny", "--mem", "64m", "--", "sleep", "60")
        name = done(platform.madang("run", *arguments)).strip()
        size = client.get_session(name).size
        assert (size.cpu, size.mem_bytes, size.time_s) == (0.2, 64 << 20, 300.0)
        unknown = platform.madang("run", "--no-sync", "--preset", "huge", "--", "true")
        assert unknown.returncode == 122
        assert "there are: large, medium, small, tiny." in unknown.stderr
    finally:
        done(platform.madang("preset", "rm", "tiny"))


def test_an_idle_session_is_warned_and_stopped_and_whoever_follows_is_told(
    platform: Platform, limited: Client
) -> None:
    limited.apply_limits("rest", LimitsDraft(text=IDLE))
    limited.assign_limits("user:admin", "rest")
    result = platform.madang("run", "--no-sync", "--mem", "64m", "--", "sleep", "600")
    assert "no output or input for" in result.stderr, result.stderr
    assert "`madang protect" in result.stderr
    session = next(iter(limited.list_sessions(ended=True)))
    assert session.result is Result.CANCELLED
    assert session.ended is not None
    assert session.ended.reason is Reason.IDLE
    assert "(limits rest of user admin)" in session.ended.text
    assert session.ended.text in result.stderr


def test_the_busy_and_the_protected_go_on(platform: Platform, limited: Client) -> None:
    limited.apply_limits("rest", LimitsDraft(text=IDLE))
    limited.assign_limits("user:admin", "rest")
    works = limited.create_session(
        SessionSpec(argv=("python3", "-c", "while True: pass"), size=SMALL)
    )
    rests = limited.create_session(SessionSpec(argv=("sleep", "600"), size=SMALL))
    kept = limited.create_session(SessionSpec(argv=("sleep", "600"), size=SMALL))
    limited.protect(kept.id, for_s=60)
    limited.wait_session(kept.id, until=[SessionStatus.RUNNING], timeout_s=PATIENCE_S)
    told = done(platform.madang("protect", kept.name, "--for", "30m"))
    assert told.startswith(f"{kept.name} is protected until ")
    ended = limited.wait_session(rests.id, timeout_s=PATIENCE_S)
    assert ended.ended is not None
    assert ended.ended.reason is Reason.IDLE
    for each in (works, kept):
        assert limited.get_session(each.id).status is SessionStatus.RUNNING
    assert limited.get_session(works.id).idle is None
    facts = json.loads(done(platform.madang("show", "--json", kept.name)))
    assert facts["protected_until"] is not None
    assert "protected until" in done(platform.madang("show", kept.name))
    too_long = platform.madang("protect", kept.name, "--for", "2h")
    assert too_long.returncode == 122
    assert "protected for at most 1h at once" in too_long.stderr


def test_a_frozen_session_is_idle_too(limited: Client) -> None:
    """It holds its memory and slots; standing still is no use of them."""
    limited.apply_limits("rest", LimitsDraft(text=IDLE))
    limited.assign_limits("user:admin", "rest")
    session = limited.create_session(SessionSpec(argv=("sleep", "600"), size=SMALL))
    limited.wait_session(session.id, until=[SessionStatus.RUNNING], timeout_s=PATIENCE_S)
    limited.freeze(session.id)
    ended = limited.wait_session(session.id, timeout_s=PATIENCE_S)
    assert ended.ended is not None
    assert ended.ended.reason is Reason.IDLE
