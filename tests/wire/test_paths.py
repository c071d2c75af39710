from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.wire.errors import PathInvalid
from madang.wire.paths import display, from_wire, relative, to_wire

names = st.binary(min_size=1, max_size=60).filter(lambda b: b"\0" not in b)


@given(names)
def test_any_file_name_survives_json(name: bytes) -> None:
    assert from_wire(json.loads(json.dumps(to_wire(name)))) == name


@pytest.mark.parametrize(
    "text",
    ["..", "a/../b", "../x", "/etc/passwd", "a//b", "./a", "", "a%00b", "%2e%2e/x", "a/%2e%2e"],
)
def test_a_path_that_leads_elsewhere_is_refused(text: str) -> None:
    with pytest.raises(PathInvalid):
        relative(text)


@given(names)
def test_a_relative_path_never_leaves_its_root(name: bytes) -> None:
    try:
        path = relative(to_wire(name))
    except PathInvalid:
        return
    assert not path.startswith(b"/")
    assert b".." not in path.split(b"/")


def test_names_are_shown_without_control_characters() -> None:
    assert display(b"a\x1b[31m\xff") == "a�[31m�"
