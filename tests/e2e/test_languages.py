"""The matrix: every language of this machine, each in sessions of the host image.

``LANGUAGE_MATRIX=FILE`` writes what was seen, for the table of the documentation
(``scripts/language_table.py``).
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from madang.client import Cells, Client
from madang.client.cellstory import Story, text_of
from madang.kit.languages import Languages
from madang.testing.languages import SAMPLES, Samples, found_here
from madang.testing.platform import Platform
from madang.wire.cells import Cell, CellStatus, EventKind
from madang.wire.languages import Language
from madang.wire.session import SessionSpec, SessionStatus, SizeRequest

pytestmark = pytest.mark.slow
SIZE = SizeRequest(cpu=1, mem_bytes=1 << 30)
HIDDEN = {"haskell": "/var/lib/ghc, where Debian's GHC keeps its packages"}
"""What sessions of the host image don't see, though the language needs it."""
NAMES = sorted(SAMPLES)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_a_language_does_all_that_it_says(platform: Platform, tmp_path: Path, name: str) -> None:
    version = found_here().get(name)
    if version is None:
        pytest.skip(f"{name} is not installed on this machine")
    if name in HIDDEN:
        pytest.skip(
            f"{name} needs an image of its own: the host image does not show {HIDDEN[name]}"
        )
    language = Languages().get(name)
    seen = {"version": version} | by_command(platform, language, SAMPLES[name], tmp_path)
    if language.cells:
        with platform.client() as client:
            seen |= by_cells(client, language, SAMPLES[name])
    if path := os.environ.get("LANGUAGE_MATRIX"):
        file = Path(path)
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | {name: seen}, indent=1, sort_keys=True) + "\n")

    assert {what: why for what, why in seen.items() if why.startswith("✗")} == {}


def check(seen: dict[str, str], what: str, good: bool, got: object) -> None:
    seen[what] = "✓" if good else f"✗ {got!r}"[:400]


def by_command(
    platform: Platform, language: Language, samples: Samples, folder: Path
) -> dict[str, str]:
    seen: dict[str, str] = {}
    run = ("run", "-q", "--mem", "1g", language.name)
    one = platform.madang(*run, "-c", samples.code, "--", "a b", cwd=folder, timeout=120)
    said = "6 ü a b\n" if samples.arguments else "6 ü\n"
    check(seen, "code", (one.returncode, one.stdout.replace(" \n", "\n")) == (0, said), one)
    file = f"Main{language.suffixes[0]}"
    (folder / file).write_text(samples.file)
    ran = platform.madang(*run, file, "--", "ä b", cwd=folder, timeout=120)
    check(seen, "file", (ran.returncode, ran.stdout) == (3, "ä b\n"), ran)
    (folder / file).write_text(samples.broken)
    bad = platform.madang(*run, file, cwd=folder, timeout=120)
    named = re.search(rf"{re.escape(file)}\W+(line )?3\b|line 3\b", bad.stderr)
    check(seen, "error", bad.returncode != 0 and named is not None, bad)
    return seen


def by_cells(client: Client, language: Language, samples: Samples) -> dict[str, str]:
    seen = dict.fromkeys(("cells", "state", "line", "input", "interrupt", "large"), "–")
    made = client.create_session(SessionSpec(size=SIZE))
    client.wait_session(made.id, until=[SessionStatus.RUNNING], timeout_s=60)
    with client.cells(made.id, language.name) as cells:
        said = cells.run(samples.print)
        check(seen, "cells", text_of(said) == "hä\n" and _text(said, "stderr") == "oh\n", said)
        if language.state:
            cells.run(samples.set)
            value = cells.run(samples.get)
            check(seen, "state", _value(value) == samples.got, value)
        wrong = cells.run(samples.wrong)
        check(seen, "line", wrong.error is not None and wrong.error.line == 3, wrong)
        if language.input:
            asked = cells.run(samples.ask, answer=lambda prompt, secret: "Ännchen")
            check(seen, "input", text_of(asked).strip() == "hello Ännchen", asked)
        broken = _interrupted(cells, samples.loop)
        after = cells.run(samples.print)
        good = broken.status is CellStatus.ERROR and after.status is CellStatus.OK
        check(seen, "interrupt", good, (broken.error, after))
        large = cells.run(samples.large)
        whole = len(text_of(large).replace("\n", "")) == 3_000_000
        check(seen, "large", whole, (len(text_of(large)), large.error))
    client.remove(made.id, force=True)
    return seen


def _value(cell: Cell) -> str:
    found = [event.data["text/plain"] for event in cell.events if event.kind is EventKind.RESULT]
    return str(found[0]) if found else text_of(cell).strip()


def _text(cell: Cell, stream: str) -> str:
    found = (event for event in cell.events if event.kind is EventKind.STREAM)
    return "".join(event.text for event in found if event.name == stream)


def _interrupted(cells: Cells, code: str) -> Cell:
    """A cell that is interrupted every two seconds: what is built first takes its time."""
    story = Story(cells.interpreter.id, code)
    story.id = cells.execute(code)
    due = time.monotonic() + 2
    while not story.ended and not cells.finished:
        for event in cells.take():
            story.add(event)
        if time.monotonic() > due:
            cells.interrupt()
            due = time.monotonic() + 2
        elif not story.ended:
            cells.pump(timeout_s=0.2)
    return story.cell()
