"""The real Jupyter: its clients, nbclient, and JupyterLab in a headless browser.

They live in an environment of their own (``.venv-jupyter``, made by test.sh).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from madang.testing.platform import Platform

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-jupyter" / "bin" / "python"
SCRIPTS = Path(__file__).parent / "jupyter"
CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sessions of several users"),
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-jupyter: ./test.sh makes it"),
]


def environment(platform: Platform, folder: Path) -> dict[str, str]:
    """With a Jupyter of its own."""
    own = {
        "PYTHONPATH": str(ROOT / "src"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "IPYTHONDIR": str(folder / "ipython"),
    }
    return platform.environment | own


def run(command: list[str], env: dict[str, str], timeout: float = 220) -> str:
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_jupyter_servers_gateway_client_starts_and_ends_kernels(
    platform: Platform, tmp_path: Path
) -> None:
    url = f"{platform.url}/jupyter/admin"
    script = str(SCRIPTS / "gateway_client.py")
    told = run([str(PYTHON), script, url, platform.token], environment(platform, tmp_path))
    assert told.splitlines()[0].startswith("Python · ")
    assert told.splitlines()[-1] == "ended"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("plain", [False, True])
def test_a_local_jupyter_runs_single_kernels_at_the_server(
    platform: Platform, tmp_path: Path, plain: bool
) -> None:
    env = environment(platform, tmp_path)
    madang = [str(PYTHON), "-m", "madang.cli", "jupyter"]
    extra = ["--plain"] if plain else []
    assert "python" in run([*madang, "kernels"], env)
    assert "1 kernels" in run([*madang, "install-kernels", "python", *extra], env)
    told = run([str(PYTHON), str(SCRIPTS / "local_kernel.py"), "madang-python"], env)
    stays = "a restart made another session" if plain else "the session stayed over a restart"
    assert told.splitlines() == [
        "cells ran",
        "a cell was interrupted",
        stays,
        "a shutdown ended the session",
        "nbclient ran a notebook",
        "a frontend that was killed left no session",
    ]
    assert "removed 1" in run([*madang, "remove-kernels"], env)


def _watch(seen: subprocess.Popen[str], platform: Platform) -> list[str]:
    """What it prints; the server is killed when it asks for that."""
    assert seen.stdin is not None
    assert seen.stdout is not None
    told = []
    with seen.stdin, seen.stdout:
        for line in seen.stdout:
            told.append(line.rstrip())
            if told[-1] == "please kill the server":
                platform.kill("server")
                seen.stdin.write("killed\n")
                seen.stdin.flush()
    return told


@pytest.mark.timeout(300)
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian: chromium)")
def test_jupyterlab_in_a_browser_runs_plots_interrupts_reconnects_and_restarts(
    platform: Platform, tmp_path: Path
) -> None:
    assert CHROMIUM is not None
    script, url = str(SCRIPTS / "lab.py"), f"{platform.url}/jupyter/admin"
    seen = subprocess.Popen(
        [str(PYTHON), script, url, platform.token, str(tmp_path), CHROMIUM],
        env=environment(platform, tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        told = _watch(seen, platform)
        assert seen.wait(30) == 0, told
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(seen.pid, signal.SIGKILL)
        seen.wait()
    assert told[0] == "a kernel started"
    assert told[1].startswith("cells ran")
    assert told[2] == "a cell was interrupted"
    assert told[4] == "reconnected: " + " ".join(f"tick{i}" for i in range(8))
    assert told[5] == "the kernel was restarted"
    assert (tmp_path / "lab.png").stat().st_size > 10_000
