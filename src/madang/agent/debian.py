"""Where this machine gets packages of Debian from: the mirror that builds use too."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from typing import Final

VARIABLE: Final = "DEBIAN_MIRROR"
_FILES: Final = (
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d/*.list",
    "/etc/apt/sources.list.d/*.sources",
)
_LINE: Final = re.compile(r"^\s*deb\s+(?:\[[^\]]*\]\s*)?(https?://\S+?/debian)/?\s", re.MULTILINE)
_URIS: Final = re.compile(r"^URIs:.*?(https?://\S+?/debian)/?\s*$", re.MULTILINE)


def mirror(environment: Mapping[str, str]) -> str:
    """As *environment* says, else that of the machine's own sources; empty: it names none."""
    return environment.get(VARIABLE, "") or next(_named(), "")


def _named() -> Iterator[str]:
    for path in (path for pattern in _FILES for path in sorted(glob.glob(pattern))):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read()
        except OSError:
            continue
        yield from _LINE.findall(text)
        yield from _URIS.findall(text)
