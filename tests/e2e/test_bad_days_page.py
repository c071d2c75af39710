"""The page of bad days names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_test_that_the_page_names_exists() -> None:
    page = (ROOT / "docs" / "contributing" / "bad-days.md").read_text()
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "src/madang/testing").glob("*.py")]
    known = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert set(re.findall(r"`(test_\w+)`", page)) - known == set()
