"""Our part of TOML against a whole one, and lines in what is refused."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madang.kit.lines import BadLine, Item, Table, read
from madang.testing.policies import PATIENT


def plain(item: Item) -> Any:
    value = item.value
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value


def as_toml(tables: list[Table]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for table in tables:
        keys = {key: plain(item) for key, item in table.keys.items()}
        if not table.name:
            found |= keys
        elif table.repeated:
            found.setdefault(table.name, []).append(keys)
        else:
            found[table.name] = keys
    return found


PIECES = st.sampled_from(
    [
        "[a]", "[[a]]", "[[b]]", "[ c ]", "key", "x", " = ", "=", "1", "0x1F", "-3", "1_0", "true",
        "false", '"t"', "'t'", '"\\n\\u00e9"', '"a', "[", "]", "{", "}", ",", "\n", "\n", "\r\n",
        "# c", " ", "\t", "é", "\\", '"""', "1.5", "1979-05-27", "a.b", "\x00", "\r", "inf", "+0",
        "00", "0b1", "[1, 2]", "{x = 1}", "k = 1\n", "list = [\n1,\n]\n", "t = '#'\n",
    ]
)  # fmt: skip


@PATIENT
@given(st.lists(PIECES, max_size=25).map("".join) | st.text(max_size=60))
def test_what_is_taken_means_the_same_in_any_toml_reader(text: str) -> None:
    try:
        found = as_toml(read(text))
    except BadLine as exc:
        assert 1 <= exc.line <= text.count("\n") + 1
        assert exc.text
    else:
        assert found == tomllib.loads(text)


def test_every_value_knows_its_line() -> None:
    tables = read('a = 1 # one\n\n[[r]]\nlist = [\n  "x", # first\n  "y",\n]\nb = {c = 2}\n')
    top, rule = tables
    assert (top.keys["a"].line, rule.line) == (1, 3)
    assert [item.line for item in rule.keys["list"].value] == [5, 6]  # type: ignore[union-attr]
    assert rule.keys["b"].line == 8


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a = 1\na = 2", 2, "second time"),
        ("[a]\n[a]", 2, "second time"),
        ("[[a]]\n[a]", 2, "second time"),
        ("a = 1\n\nb", 3, "after 'b' comes ="),
        ("x = [1,\n2\n", 3, "no end"),
        ("x = 'a\n'", 1, "closing quote"),
        ("x = 1 y = 2", 1, "too much"),
        ("x = 1.5e3", 1, "no number"),
        ("x = .5", 1, "no number"),
        ("\nx = 1979-05-27", 2, "no number"),
        ('x = """a"""', 1, "several lines"),
        ("x = [[[[[1]]]]]", 1, "deep"),
        ("x = \\x", 1, "no text in quotes"),
        ('x = "\\q"', 1, "means nothing"),
        ("a.b = 1", 1, "after 'a' comes ="),
        ("x = 1\x00", 1, "control character"),
        ("x = " + "9" * 50, 1, "too long"),
        ("x = {a = 1,}", 1, "another key"),
        ("[a", 1, "no header"),
    ],
)
def test_what_is_refused_names_the_line(text: str, line: int, words: str) -> None:
    with pytest.raises(BadLine, match=words) as caught:
        read(text)
    assert caught.value.line == line


@PATIENT
@given(st.integers(0, 100_000))
def test_deep_nesting_never_exhausts_the_stack(depth: int) -> None:
    if depth > 4:
        with pytest.raises(BadLine, match="deep"):
            read("x = " + "[" * depth)
