"""Run a program in a session of its own, print its output as it comes, and how it ended.

Needs a server: start one with ``madang up``. Address and token come from the environment.
"""

from __future__ import annotations

import os
import sys

from madang.client import Client


def main() -> None:
    with Client(os.environ["MADANG_URL"], os.environ["MADANG_TOKEN"]) as client:
        run = client.run(
            ["python3", "-c", "for i in range(3): print('epoch', i)"], cpu=0.5, mem="256m"
        )
        for record in run:
            sys.stdout.write(record.data.decode())
        ended = run.wait().ended
        assert ended is not None
        print(f"exit {ended.exit_code}, {ended.reason}")


if __name__ == "__main__":
    main()
