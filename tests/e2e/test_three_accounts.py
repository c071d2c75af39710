"""The scenario of ``examples/three-accounts``, live."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from madang.client import Client
from madang.testing.platform import Platform

SCENARIO = Path(__file__).parents[2] / "examples" / "three-accounts" / "scenario.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sessions of several users"),
]


def test_three_accounts_share_a_machine(platform: Platform, client: Client) -> None:
    group = client.get_group("default")
    env = {**os.environ, "MADANG_URL": platform.url, "MADANG_TOKEN": platform.token}

    result = subprocess.run(
        [sys.executable, str(SCENARIO)],
        env=env,
        check=False,
        capture_output=True,
        text=True,
        timeout=180,
    )

    assert result.returncode == 0, result.stdout + result.stderr
    for text in (
        "ben's first and second run",
        "ended (preempted)",
        "refused (limit.refused)",
        "refused (",
        "place 1 of 2: important",
        "place 2 of 2: patient",
        "ben's important runs",
    ):
        assert text in result.stdout
    assert client.get_group("default").text == group.text
    assert list(client.list_sessions()) == []
    assert client.list_limits() == []
