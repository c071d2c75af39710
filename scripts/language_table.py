"""The table of docs/reference/languages.md, of what the matrix saw.

``LANGUAGE_MATRIX=FILE pytest tests/e2e/test_languages.py`` writes FILE; ``python
scripts/language_table.py FILE docs/reference/languages.md`` puts it between the two marks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from madang.kit.languages import Languages
from madang.testing.languages import SAMPLES

BEGIN: Final = "<!-- table -->\n"
END: Final = "<!-- end of table -->\n"
COLUMNS: Final = {
    "code": "one-liner",
    "file": "file",
    "error": "error's line",
    "cells": "cells",
    "state": "state",
    "line": "error's line in the cell",
    "input": "input",
    "interrupt": "interrupt",
    "large": "3 MB of output",
}


def table(seen: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    yield "| language | name | version | " + " | ".join(COLUMNS.values()) + " |\n"
    yield "|---" * (3 + len(COLUMNS)) + "|\n"
    for language in Languages().all():
        if language.name not in SAMPLES:
            continue
        found = seen.get(language.name, {})
        version = found.get("version", "not seen")
        marks = (found.get(column, " ")[:1] for column in COLUMNS)
        yield f"| {language.title} | `{language.name}` | {version} | {' | '.join(marks)} |\n"


def main(matrix: str, page: str) -> None:
    text = Path(page).read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    seen = json.loads(Path(matrix).read_text())
    Path(page).write_text(f"{before}{BEGIN}{''.join(table(seen))}{END}{after}")


if __name__ == "__main__":
    main(*sys.argv[1:])
