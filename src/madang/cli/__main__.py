"""The console script. Imports as little as possible: this is part of every command's time."""

from __future__ import annotations

import gc
import os
import sys

_GC_THRESHOLD = 50_000
"""Loading modules makes many objects and no garbage; what runs long is still looked after."""


def main() -> None:
    """Run the command line and leave with its exit code."""
    gc.set_threshold(_GC_THRESHOLD)
    try:
        from madang.cli.root import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # while modules were being loaded
        code = 130
    _leave(code)


def _leave(code: int) -> None:
    """At once: taking an interpreter apart takes as long as many a command."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # whoever read it has gone
            pass
    os._exit(code)


if __name__ == "__main__":
    main()
