"""Each warning has its entry in the documentation: cause, and what to do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import madang

LOUD = {"warning", "error", "exception", "critical", "log"}
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "log-messages.md"


def messages() -> Iterator[tuple[str, str]]:
    """(where, message) of each constant text that is logged loudly."""
    root = Path(madang.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            target = node.func.value
            if isinstance(target, ast.Name) and target.id == "log" and node.func.attr in LOUD:
                for argument in node.args:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        yield f"{path.relative_to(root)}:{node.lineno}", argument.value


def test_each_loud_message_is_documented_and_no_other() -> None:
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    documented = {row[1].strip().strip("`") for row in rows}
    logged = {message: where for where, message in messages()}
    assert logged.keys() - documented == set(), "add these to docs/reference/log-messages.md"
    assert documented - logged.keys() == set(), "these are not logged any more"
