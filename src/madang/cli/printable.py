"""What others wrote must not steer this terminal."""

from __future__ import annotations

import sys


def printable(text: str) -> str:
    """One line, without control characters."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "�" for c in text)


def print_error_text(text: str) -> None:
    """An error's words; their line breaks stay."""
    sys.stderr.write(f"error: {chr(10).join(map(printable, text.split(chr(10))))}\n")
