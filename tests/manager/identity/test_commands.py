"""The commands about people, against a real server."""

from __future__ import annotations

import asyncio
import os
import re
import stat
import sys
from pathlib import Path

import pytest

from madang.testing.manager import ManagerBox
from madang.wire import exits

PASSWORD = "correct horse battery"


class Shell:
    """One person's `madang`, with a configuration of its own."""

    def __init__(self, box: ManagerBox, home: Path, **env: str) -> None:
        home.mkdir()
        self.url = box.url
        self.config = home / "client.toml"
        self._env = {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "MADANG_CONFIG": str(self.config),
            "MADANG_URL": box.url,
            **env,
        }

    async def __call__(self, *words: str, stdin: str = "", code: int = 0) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "madang.cli", *words,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT, env=self._env,
        )  # fmt: skip
        out, _ = await process.communicate(stdin.encode())
        assert process.returncode == code, out.decode()
        return out.decode()


@pytest.mark.slow
async def test_a_person_s_way_in_and_out(box: ManagerBox, tmp_path: Path) -> None:
    admin = Shell(box, tmp_path / "admin", MADANG_TOKEN=box.token)
    ann = Shell(box, tmp_path / "ann")
    await admin("project", "add", "lab")
    invited = await admin("user", "invite", "--project", "lab", "--expires", "1d")
    code = re.findall(r"mdi_\S+", invited)[0]

    await ann("whoami", code=exits.UNAUTHORISED)
    use = ("login", ann.url, "--invitation", code, "--user", "ann", "--password-stdin")
    assert "as ann (user)" in await ann(*use, stdin=f"{PASSWORD}\n")
    assert stat.S_IMODE(ann.config.stat().st_mode) == 0o600
    assert PASSWORD not in ann.config.read_text()
    await ann(*use, stdin=f"{PASSWORD}\n", code=exits.UNAUTHORISED)
    assert "lab (default)" in await ann("whoami")

    await admin("project", "join", "lab", "ann", "--admin")
    assert "ann   admin" in await admin("project", "members", "lab")
    assert "lab (default, admin)" in await ann("whoami")
    await ann("user", "add", "bob", code=exits.UNAUTHORISED)
    assert "ann " in await ann("user", "ls")
    assert "project  lab" in await admin("user", "show", "ann")
    await admin("user", "set", "ann", "--role", "domain_admin")
    await ann("user", "add", "bob", "--project", "lab")
    assert "bob" in await ann("user", "invitations")

    made = await ann("token", "add", "robot", "--key", "--scope", "read", "--expires", "1h")
    pair = dict(line.split("=", 1) for line in made.split())
    robot = Shell(box, tmp_path / "robot", **pair)
    assert "with key robot" in await robot("whoami")
    await robot("token", "add", "more", code=exits.UNAUTHORISED)
    listed = await ann("token", "ls")
    await ann("token", "revoke", re.findall(r"(\S+)  key", listed)[0])
    await robot("whoami", code=exits.UNAUTHORISED)

    assert "ann" in await ann("logout")
    await ann("whoami", code=exits.UNAUTHORISED)
    again = ("login", ann.url, "--user", "ann", "--password-stdin")
    await ann(*again, stdin="wrong password\n", code=exits.UNAUTHORISED)
    await ann(*again, stdin=f"{PASSWORD}\n")
    await ann("passwd", "--password-stdin", stdin=f"{PASSWORD}\nanother password\n")
    await admin("user", "disable", "ann")
    await ann("whoami", code=exits.UNAUTHORISED)
    assert "disabled" in await admin("user", "ls")
    await admin("user", "enable", "ann")
    await ann("whoami")
    await admin("domain", "add", "abroad")
    assert "abroad" in await admin("domain", "ls")
    await admin("project", "disable", "lab")
    assert "disabled" in await admin("project", "ls")
