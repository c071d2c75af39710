"""Limits as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.manager.limits.rules.text import parse
from madang.manager.limits.types import Check, IdleKind
from madang.wire.errors import LimitsInvalid

WHOLE = """
version = 1
sessions = 10
pending = 20
time = "24h"
cpu_hours = 500
idle_grace = "5m"
protect = "8h"

[at_once]
cpu = 8
mem = "32g"
disk = "1t"
pids = 4096

[session]
cpu = "0.5"

[folders]
count = 3
size = "1g"

[[deserved]]
cpu = 4

[[deserved]]
group = "gpu"
mem = "8g"

[[idle]]
kind = "cpu"
after = "1h"
below = "0.05"

[[idle]]
kind = "connection"
after = "30m"
"""


def test_the_whole_language() -> None:
    found = parse(WHOLE)
    assert (found.sessions, found.pending, found.time_s, found.cpu_hours) == (10, 20, 86400.0, 500)
    assert found.at_once == {
        "cpu_milli": 8000, "mem_bytes": 32 << 30, "disk_bytes": 1 << 40, "pids": 4096,
    }  # fmt: skip
    assert found.session == {"cpu_milli": 500}
    assert (found.folders, found.folder_bytes) == (3, 1 << 30)
    assert found.deserved == {"default": {"cpu_milli": 4000}, "gpu": {"mem_bytes": 8 << 30}}
    assert found.idle == (
        Check(kind=IdleKind.CPU, after_s=3600.0, below=0.05),
        Check(kind=IdleKind.CONNECTION, after_s=1800.0),
    )
    assert (found.idle_grace_s, found.protect_s) == (300.0, 28800.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: limits begin with version"),
        ("version = 2", "line 1: version is 1"),
        ("version = true", "line 1: version is 1"),
        ("version = 1\nsesions = 3", "line 2: 'sesions' is unknown"),
        ("version = 1\nsessions = -1", "line 2: sessions takes a whole number"),
        ("version = 1\nsessions = true", "line 2: sessions takes a whole number"),
        ("version = 1\ntime = 3", 'line 2: time takes a text in quotes, like "2h"'),
        ("version = 1\ntime = 'soon'", "line 2: time: 'soon' is not a duration"),
        ("version = 1\n[at_once]\ngpu = 3", "line 3: 'gpu' is unknown in [at_once]"),
        ("version = 1\n[[at_once]]\ncpu = 3", "line 2: [[at_once]] is unknown"),
        ("version = 1\n[idle]\nkind = 'cpu'", "line 2: [idle] is unknown"),
        ("version = 1\n[[idle]]\nkind = 'mood'\nafter = '1h'", "line 3: kind is one of"),
        ("version = 1\n[[idle]]\nkind = 'cpu'", "line 2: [[idle]] needs after"),
        ("version = 1\n[[idle]]\nkind = 'cpu'\nafter = '0.1s'", "line 2: [[idle]] needs after"),
        (
            "version = 1\n[[idle]]\nkind = 'output'\nafter = '1h'\nbelow = 3",
            "line 5: below has no meaning for output",
        ),
        ("version = 1\n[[deserved]]\ngroup = ''\ncpu = 3", "line 3: group takes the name"),
        ("version = 1\n[[deserved]]\ncpu = 1\n[[deserved]]\ncpu = 3", "line 4: group 'default'"),
        ("version = 1\n#" + "x" * 20_000, "line 1: limits are longer"),
    ],
)
def test_what_is_not_understood_is_told_with_its_line(text: str, words: str) -> None:
    with pytest.raises(LimitsInvalid) as caught:
        parse(text)
    assert words in caught.value.text


@given(st.text(max_size=200) | st.text("[]=\"'\nversion 1idlekcpuaft0h{},.", max_size=200))
def test_any_text_is_limits_or_an_error_of_ours(text: str) -> None:
    for each in (text, f"version = 1\n{text}"):
        try:
            parse(each)
        except LimitsInvalid as exc:
            assert exc.details["line"] >= 1
