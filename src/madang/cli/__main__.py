"""The console script. Imports as little as possible: this is part of every command's time."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        from madang.cli.root import run

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # while modules were being loaded
        sys.exit(130)


if __name__ == "__main__":
    main()
