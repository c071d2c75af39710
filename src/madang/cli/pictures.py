"""Pictures of cells in a terminal: drawn where it can, else kept in a file."""

from __future__ import annotations

import base64
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, Final

KINDS: Final = ("image/png", "image/jpeg", "image/svg+xml", "application/pdf")
_CHUNK: Final = 4096
_DRAWS_INLINE: Final = frozenset({"iTerm.app", "WezTerm", "vscode"})


def protocol_of(environment: Mapping[str, str]) -> str:
    """How the terminal draws pictures: ``kitty``, ``iterm``, or nothing."""
    if "KITTY_WINDOW_ID" in environment or environment.get("TERM") == "xterm-kitty":
        return "kitty"
    if environment.get("TERM_PROGRAM") == "ghostty":
        return "kitty"
    program = environment.get("TERM_PROGRAM") or environment.get("LC_TERMINAL", "")
    return "iterm" if program in _DRAWS_INLINE or program == "iTerm2" else ""


class Pictures:
    """*protocol*: as ``protocol_of`` says."""

    def __init__(self, protocol: str) -> None:
        self._protocol = protocol
        self._folder = ""
        self._count = 0

    def show(self, data: Mapping[str, Any]) -> str | None:
        """What to write to the terminal for a bundle; None if there is no picture in it."""
        kind = next((kind for kind in KINDS if isinstance(data.get(kind), str)), None)
        if kind is None:
            return None
        if kind == "image/svg+xml":
            content = str(data[kind]).encode()
        else:
            try:
                content = base64.b64decode(data[kind], validate=True)
            except ValueError:
                return None
        if kind == "image/png" and self._protocol == "kitty":
            return "".join(_kitty(content)) + "\n"
        if kind in {"image/png", "image/jpeg"} and self._protocol == "iterm":
            coded = base64.b64encode(content).decode()
            return f"\x1b]1337;File=inline=1;size={len(content)}:{coded}\a\n"
        return f"[{_name(kind, content)}; saved to {self._save(kind, content)}]\n"

    def _save(self, kind: str, content: bytes) -> str:
        self._folder = self._folder or tempfile.mkdtemp(prefix="madang-pictures-")
        self._count += 1
        suffix = kind.partition("/")[2].partition("+")[0]
        path = os.path.join(self._folder, f"{self._count}.{suffix}")
        with open(path, "xb") as file:
            file.write(content)
        return path


def _kitty(content: bytes) -> Iterator[str]:
    coded = base64.b64encode(content).decode()
    for start in range(0, len(coded), _CHUNK):
        more = int(start + _CHUNK < len(coded))
        keys = f"a=T,f=100,m={more}" if start == 0 else f"m={more}"
        yield f"\x1b_G{keys};{coded[start : start + _CHUNK]}\x1b\\"


def _name(kind: str, content: bytes) -> str:
    """``image 640x480``, where that is known."""
    if content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) >= 24:
        width, height = struct.unpack(">II", content[16:24])
        return f"image {width}x{height}"
    return kind.partition("/")[2].partition("+")[0]
