"""Log files of ours: what a process prints goes there, and they stay small. Standard library only.

A file that is too long becomes ``NAME.1``, in place of an older one: when its process starts, and
while it writes through ``kit.logs.LogFile``.
"""

from __future__ import annotations

import os
from typing import Final

MAX_LOG_BYTES: Final = 16 * 1024 * 1024


def redirect(log: str, *, max_bytes: int = MAX_LOG_BYTES) -> None:
    """Input from nowhere, output appended to *log*; an over-long log becomes ``.1`` first."""
    try:
        if os.stat(log, follow_symlinks=False).st_size > max_bytes:
            os.replace(log, log + ".1")
    except FileNotFoundError:
        pass
    null = os.open(os.devnull, os.O_RDONLY)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    out = os.open(log, flags, 0o600)
    for fd, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(fd, target)
    os.close(null)
    os.close(out)
