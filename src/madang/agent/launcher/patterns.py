"""Patterns of paths: ``*`` within a name, ``**`` any number of folders."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Final

_ANY: Final = "**"


def compiled(patterns: Iterable[str]) -> re.Pattern[str]:
    """Matches whole paths that one of *patterns* names; none name nothing."""
    found = "|".join(map(_expression, patterns))
    return re.compile(f"(?:{found})" if found else r"(?!)", re.DOTALL)


def _expression(pattern: str) -> str:
    """``/a/**`` takes in ``/a`` itself."""
    found = ""
    for part in _parts(pattern):
        if part == _ANY:
            found += "(?:/.*)?"
        elif not part.strip("*"):
            found += "/[^/]+"  # A name is never empty: `/*` does not name `/`.
        else:
            found += "/" + "[^/]*".join(map(re.escape, part.split("*")))
    return found or "/"


def may_lie_under(pattern: str, folder: str) -> bool:
    """Whether *pattern* may name *folder*, or anything in it."""
    names = _parts(folder)
    parts = _parts(pattern)
    for at, name in enumerate(names):
        if at == len(parts):
            return False
        if parts[at] == _ANY:
            return True
        if not _matches(name, parts[at]):
            return False
    return True


def _matches(name: str, part: str) -> bool:
    return fnmatchcase(name, part.replace("[", "[[]").replace("?", "[?]"))


def holds_all_of(pattern: str, folder: str) -> bool:
    """Whether *pattern* surely names everything in *folder*."""
    names, parts = _parts(folder), _parts(pattern)
    if not parts or parts[-1] != _ANY or "*" in "".join(parts[:-1]):
        return False
    return names[: len(parts) - 1] == parts[:-1]


def folders_of(pattern: str) -> list[str]:
    """Patterns of the folders that may have an entry which *pattern* names."""
    parts = _parts(pattern)
    found = []
    while parts and parts[-1] == _ANY:
        found.append("/" + "/".join(parts))
        parts.pop()
    return [*found, "/" + "/".join(parts[:-1])] if parts else found


def folders_held(pattern: str) -> list[str]:
    """Patterns of folders all of whose entries *pattern* surely names."""
    parts = _parts(pattern)
    if parts and parts[-1] == _ANY:
        return [pattern]
    return ["/" + "/".join(parts[:-1])] if parts and parts[-1] == "*" else []


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]
