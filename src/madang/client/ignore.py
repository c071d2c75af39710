"""Which files of a working directory stay at home: ``.madangignore``.

A subset of gitignore, over bytes: blank lines and ``#`` comments; ``*``, ``?`` and ``[a-z]`` within
a name, ``**`` across folders; a ``/`` at the beginning or in the middle ties the pattern to the
folder of its file, one at the end means folders only; ``!`` takes back; ``\\`` escapes. The last
pattern that fits decides, and files in deeper folders come later. Nothing inside an ignored folder
can be taken back, because it is not entered.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

FILE_NAME: Final = b".madangignore"

DEFAULTS: Final = b"""
.git
.hg
__pycache__
.venv
venv
node_modules
.mypy_cache
.ruff_cache
.pytest_cache
.ipynb_checkpoints
.DS_Store
"""
"""Never sent, unless a ``.madangignore`` takes one back (``!.git``)."""


@dataclass(frozen=True, slots=True)
class Pattern:
    regex: re.Pattern[bytes]
    folders_only: bool
    takes_back: bool


@dataclass(frozen=True, slots=True)
class Rules:
    """Patterns in the order in which they count, each with the folder it belongs to."""

    patterns: tuple[tuple[bytes, Pattern], ...] = ()

    @classmethod
    def defaults(cls) -> Self:
        return cls(tuple((b"", pattern) for pattern in parse(DEFAULTS)))

    def extended(self, folder: bytes, text: bytes) -> Rules:
        """With the patterns of the file in *folder* (``b"a/b/"``, or empty for the root)."""
        return Rules(self.patterns + tuple((folder, pattern) for pattern in parse(text)))

    def ignores(self, path: bytes, *, is_folder: bool) -> bool:
        """Whether *path*, relative to the root, stays at home."""
        for folder, pattern in reversed(self.patterns):
            if pattern.folders_only and not is_folder:
                continue
            if path.startswith(folder) and pattern.regex.fullmatch(path, len(folder)):
                return not pattern.takes_back
        return False


def parse(text: bytes) -> list[Pattern]:
    """The patterns of one file."""
    return [p for line in text.splitlines() if (p := _parse_line(line)) is not None]


def _parse_line(line: bytes) -> Pattern | None:
    if not line.endswith(b"\\ "):
        line = line.rstrip(b" \t\r")
    if not line or line.startswith(b"#"):
        return None
    takes_back = line.startswith(b"!")
    line = line.removeprefix(b"!")
    folders_only = line.endswith(b"/")
    body = line.rstrip(b"/")
    anchored = b"/" in body
    body = body.lstrip(b"/")
    if not body:
        return None
    source = (b"" if anchored else b"(?:.*/)?") + _translate(body)
    return Pattern(re.compile(source, re.DOTALL), folders_only, takes_back)


_TOKEN: Final = re.compile(
    rb"(?P<deep>(?:^|(?<=/))\*\*/)|(?P<rest>(?<=/)\*\*$)|(?P<star>\*+)|(?P<one>\?)"
    rb"|(?P<set>\[!?\]?[^]]+\])|\\(?P<escaped>.)|(?P<plain>.)",
    re.DOTALL,
)
_REGEXES: Final = {"deep": b"(?:.*/)?", "rest": b".+", "star": b"[^/]*", "one": b"[^/]"}


def _translate(body: bytes) -> bytes:
    parts: list[bytes] = []
    for match in _TOKEN.finditer(body):
        kind = match.lastgroup or "plain"
        if kind == "set":
            parts.append(_set(match[kind]))
        else:
            parts.append(_REGEXES.get(kind) or re.escape(match[kind]))
    return b"".join(parts)


def _set(text: bytes) -> bytes:
    """``[!a-z]`` as a regex; a range that makes no sense stands for itself."""
    inner = text[1:-1]
    negated = inner.startswith(b"!")
    inner = inner.removeprefix(b"!").replace(b"\\", rb"\\").replace(b"]", rb"\]")
    regex = b"(?!/)[" + (b"^" if negated else b"") + inner.replace(b"[", rb"\[") + b"]"
    if not negated and inner.startswith(b"^"):
        regex = b"(?!/)[\\" + inner + b"]"
    try:
        re.compile(regex)
    except re.error:
        return re.escape(text)
    return regex
