"""A Docker engine of a test's own: nothing of it is the machine's, and nothing is left of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from madang.agent.launcher import syscalls
from madang.agent.launcher.engine import Engine, EngineFailed

DAEMON: Final = "dockerd"
READY_S: Final = 60.0
END_S: Final = 30.0
_POLL_S: Final = 0.05


def missing() -> str:
    """Why no engine can be started here, in words; empty: one can."""
    if os.geteuid() != 0:
        return "Docker's daemon needs root"
    if shutil.which(DAEMON) is None:
        return f"{DAEMON} is not installed: apt-get install docker.io"
    return ""


@dataclass
class Docker:
    """dockerd, and the containerd that it starts for itself."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> str:
        return f"{self.folder}/docker.sock"

    @property
    def engine(self) -> Engine:
        return Engine(self.socket)

    def start(self) -> None:
        """Returns once it answers."""
        argv = [
            *(DAEMON, "--data-root", f"{self.folder}/data", "-H", f"unix://{self.socket}"),
            *("--exec-root", f"{self.folder}/exec", "--pidfile", f"{self.folder}/dockerd.pid"),
            *("--bridge=none", "--iptables=false", "--ip6tables=false"),
            *("--ip-forward=false", "--ip-masq=false", "--log-level=warn"),
        ]
        with open(self.folder / "dockerd.log", "ab") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        late = time.monotonic() + READY_S
        while True:
            try:
                self.engine.get("/version")
                return
            except EngineFailed:
                if time.monotonic() > late or self.process.poll() is not None:
                    log_text = (self.folder / "dockerd.log").read_text(errors="replace")
                    raise TimeoutError(f"dockerd does not answer: {log_text[-2000:]}") from None
                time.sleep(_POLL_S)

    def kill(self) -> None:
        """kill -9; its containers and its containerd stay."""
        assert self.process is not None, "it was started"
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        assert self.process is not None, "it was started"
        self.process.terminate()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    async def wait_empty(self) -> None:
        """Fails if a container is left; the engine removes them in its own time.

        Dead ones are the engine's: of one that was killed, the next may fail to remove what it had
        mounted.
        """
        late = time.monotonic() + END_S
        while left := [each for each in self.containers() if each["State"] != "dead"]:
            assert time.monotonic() < late, left
            await asyncio.sleep(_POLL_S)

    def containers(self) -> list[dict[str, Any]]:
        """All of them, of whoever."""
        return self.engine.containers("")


@contextlib.contextmanager
def docker_daemon() -> Iterator[Docker]:
    """Started; ended by its process id."""
    folder = Path(tempfile.mkdtemp(prefix="madang-docker-"))
    docker = Docker(folder)
    try:
        docker.start()
        yield docker
    finally:
        if docker.process is not None and docker.process.poll() is None:
            docker.stop()
        for target in _mounted_below(folder):  # By one that was killed.
            syscalls.umount(os.fsencode(target))
        shutil.rmtree(folder, ignore_errors=True)


def _mounted_below(folder: Path) -> list[str]:
    targets = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [target for target in reversed(targets) if target.startswith(f"{folder}/")]
