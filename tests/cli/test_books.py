"""``madang audit`` and ``madang usage`` without a server: files and words."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from madang.cli.audit import audit
from madang.cli.times import parse_time, show_time
from madang.cli.usage import _cell, usage
from madang.wire.audit import GENESIS, AuditHead, AuditRecord, digest_of, export_lines
from madang.wire.errors import InvalidRequest

FIELDS = {
    "seq": 1, "at_us": 5, "actor_id": "u", "actor": "ann", "key": "k", "domain": "d",
    "action": "session.created", "kind": "session", "id": "s", "name": "calm-otter",
    "before": None, "after": {"a": 1}, "source": "", "request_id": "", "previous": GENESIS,
}  # fmt: skip


@pytest.fixture
def log(tmp_path: Path) -> Path:
    record = AuditRecord(**FIELDS, digest=digest_of(FIELDS))  # type: ignore[arg-type]
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(export_lines(AuditHead(count=1, digest=record.digest), [record])))
    return path


def test_an_export_is_verified_without_a_server(log: Path) -> None:
    done = CliRunner().invoke(audit, ["verify", str(log)], standalone_mode=False)
    assert (done.return_value, done.output[:18]) == (0, "intact: 1 records,")

    log.write_bytes(log.read_bytes().replace(b"calm-otter", b"calm-\\u001b[2J"))
    done = CliRunner().invoke(audit, ["verify", str(log)], standalone_mode=False)
    assert done.return_value == 122
    assert "NOT intact: record 1 was changed" in done.output
    assert "\x1b" not in done.output


def test_a_head_that_is_none_is_refused(log: Path) -> None:
    command = ["verify", str(log), "--head", "7"]
    done = CliRunner().invoke(audit, command, standalone_mode=False)
    assert isinstance(done.exception, InvalidRequest)
    assert "COUNT:DIGEST" in done.exception.text


def test_a_correction_says_either_when_or_that_it_is_void() -> None:
    for more in ([], ["--void", "--ended", "2026-11-28"]):
        done = CliRunner().invoke(usage, ["correct", "x.1", "--reason", "r", *more])
        assert done.exit_code == 2
        assert "either --ended TIME or --void" in done.output


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2026-11", "2026-11-01 00:00:00"),
        ("2026-11-28", "2026-11-28 00:00:00"),
        ("2026-11-28T14:05", "2026-11-28 14:05:00"),
        ("2026-11-28T14:05:07+01:00", "2026-11-28 13:05:07"),
    ],
)
def test_dates_are_in_utc_unless_they_say(text: str, shown: str) -> None:
    at = parse_time(text, field="since")
    assert at is not None
    assert show_time(at) == shown


def test_a_duration_is_a_time_ago() -> None:
    at = parse_time("2h", field="since")
    assert at is not None
    assert 7199 < time.time() - at < 7300


def test_what_is_no_time_is_told() -> None:
    with pytest.raises(InvalidRequest, match="2026-11-28T14:05"):
        parse_time("yesterday", field="since")


@pytest.mark.parametrize(("name", "cell"), [("ann", "ann"), ("=1+1", "'=1+1"), ("@x", "'@x")])
def test_no_name_is_a_formula(name: str, cell: str) -> None:
    assert _cell(name) == cell
