"""What the scripts rely on: pins that are complete, and a container that finds what is left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==", re.MULTILINE)
QUICK = {**os.environ, "CONTAINED_PATIENCE_S": "0.5"}
SCRIPTS = ("try.sh", "test.sh", "bench.sh", "scripts/common.sh")


def contained(script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "contained.py"), "sh", "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env=QUICK
    )


def name(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


@pytest.mark.parametrize("file", ["runtime.txt", "dev.txt", "jupyter.txt"])
def test_pins_have_hashes_and_name_no_place(file: str) -> None:
    text = (ROOT / "requirements" / file).read_text()
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in block for block in blocks)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime = set(PIN.findall((ROOT / "requirements" / "runtime.txt").read_text()))
    assert {name(r) for r in project["project"]["dependencies"]} <= runtime
    dev = set(PIN.findall((ROOT / "requirements" / "dev.txt").read_text()))
    groups = project["dependency-groups"]
    jupyter = {*groups.pop("jupyter"), *project["project"]["optional-dependencies"]["jupyter"]}
    assert {name(r) for group in groups.values() for r in group} | runtime <= dev
    pinned = set(PIN.findall((ROOT / "requirements" / "jupyter.txt").read_text()))
    assert {name(r) for r in jupyter} | runtime <= pinned


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_posix_sh(script: str) -> None:
    subprocess.run(["sh", "-n", str(ROOT / script)], check=True)


def test_a_wrong_option_of_try_prints_how_to_use_it() -> None:
    done = subprocess.run(
        [str(ROOT / "try.sh"), "--wrong"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--down" in done.stdout


def test_a_command_that_leaves_nothing_keeps_its_exit_code() -> None:
    assert contained("exit 0").returncode == 0
    assert contained("exit 7").returncode == 7
    assert contained("kill -9 $$").returncode == 137


def test_a_process_that_outlives_the_command_is_found_and_ended() -> None:
    done = contained("setsid sleep 1000 >/dev/null 2>&1 & echo $!")
    assert done.returncode == 1
    pid = done.stdout.splitlines()[0]
    assert f"process {pid}: sleep 1000" in done.stdout
    assert not Path(f"/proc/{pid}").exists()
