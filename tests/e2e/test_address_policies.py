"""Rules about addresses on a real platform, by command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from madang.testing.platform import Platform

pytestmark = [pytest.mark.slow, pytest.mark.root]
PYTHON = ("/usr/bin/python3", "-I", "-S", "-c")
TRY = """
import socket
server = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
port = server.getsockname()[1]
def ok(host):
    try:
        socket.create_connection((host, port)).close()
    except PermissionError:
        return False
    return True
print(ok("127.0.0.1") or ok("::1"), ok("127.0.0.2"))
"""


def test_a_name_is_looked_up_and_what_is_refused_is_told(
    platform: Platform, tmp_path: Path
) -> None:
    own = tmp_path / "own.toml"
    own.write_text('version = 1\n\n[[connect]]\nonly = ["localhost"]\nwhy = "a test"\n')

    done = platform.madang(
        "run", "--policy", str(own), "--no-sync", "--no-output", "--", *PYTHON, TRY
    )

    assert done.stdout == "True False\n", done.stderr
    assert "madang: connect to 127.0.0.2:" in done.stderr
    assert "refused by session policy, line 3 (a test)" in done.stderr


def test_a_name_that_nobody_knows_is_told_at_the_start(platform: Platform, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('version = 1\n\n[[connect]]\ndeny = ["nowhere.invalid"]\n')

    done = platform.madang(
        "run", "--policy", str(own), "--no-sync", "--no-output", "--", *PYTHON, TRY
    )

    assert done.stdout == "True True\n", done.stderr
    assert "session line 3 refuses nothing by nowhere.invalid" in done.stderr
