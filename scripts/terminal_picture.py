"""Draw a real terminal run: ``python terminal_picture.py OUT.svg COMMAND…``.

The command runs on a pseudo-terminal; what it prints, colours included, becomes an SVG.
"""

from __future__ import annotations

import os
import pty
import re
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 100


def record(command: list[str]) -> str:
    """The terminal's content after *command*; carriage returns overwrite their line."""
    os.environ |= {"COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm-256color"}
    chunks: list[bytes] = []

    def read(fd: int) -> bytes:
        data = os.read(fd, 65536)
        chunks.append(data)
        return data

    status = pty.spawn(command, read)
    if status:
        raise SystemExit(f"the command failed: {status}")
    text = b"".join(chunks).decode().replace("\r\n", "\n")
    lines = (line.rsplit("\r", 1)[-1].removeprefix("\x1b[K") for line in text.split("\n"))
    return "\n".join(lines).rstrip()


def main() -> None:
    target, *command = sys.argv[1:]
    typed = os.environ.get("TYPED", " ".join(command))
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    console.print(Text("$ ", style="bold green") + Text(typed, style="bold"))
    console.print(Text.from_ansi(record(command)))
    svg = console.export_svg(title="madang")
    # Fonts of the reader's machine: nothing is fetched.
    svg = re.sub(r"\s*@font-face \{.*?\}|\s*<!--.*?-->", "", svg, flags=re.DOTALL)
    Path(target).write_text(svg)


if __name__ == "__main__":
    main()
