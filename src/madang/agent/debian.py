"""Where this machine gets packages of Debian from: the mirror that builds use too."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

VARIABLE: Final = "DEBIAN_MIRROR"
_FILES: Final = (
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d/*.list",
    "/etc/apt/sources.list.d/*.sources",
)
_LINE: Final = re.compile(r"^\s*deb\s+(?:\[[^\]]*\]\s*)?(https?://\S+?/debian)/?\s", re.MULTILINE)
_URIS: Final = re.compile(r"^URIs:.*?(https?://\S+?/debian)/?\s*$", re.MULTILINE)


def with_mirror(environment: Mapping[str, str], patterns: Iterable[str] = _FILES) -> dict[str, str]:
    """*environment*, with the mirror of the machine's own sources where it names none."""
    return {VARIABLE: next(_named(patterns), ""), **environment}


def _named(patterns: Iterable[str]) -> Iterator[str]:
    for path in (path for pattern in patterns for path in sorted(glob.glob(pattern))):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read()
        except OSError:
            continue
        yield from _LINE.findall(text)
        yield from _URIS.findall(text)
