"""What we compare with, on the same machine in the same run: docker, runc, a bare process.

Docker's daemon and its image are made for the run and removed after it. The image is this
machine's own Python with the libraries it needs, so that everybody starts the same program.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PYTHON: Final = "/usr/bin/python3"
READY_S: Final = 30.0


def first_output_s(argv: Sequence[str]) -> float:
    """Seconds from the start of *argv* until its first byte of output is here."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    data = process.stdout.read(1)
    seconds = time.perf_counter() - begin
    process.stdout.read()
    process.stdout.close()
    if process.wait() or not data:
        raise RuntimeError(f"{argv} failed")
    return seconds


def whole_s(argv: Sequence[str]) -> float:
    """Seconds of a whole command."""
    begin = time.perf_counter()
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Docker:
    """A daemon of our own with one image, ``python``."""

    socket: str

    def command(self, *arguments: str) -> list[str]:
        return [docker(), "-H", f"unix://{self.socket}", *arguments]

    def run(self, *argv: str) -> list[str]:
        """Like our sessions: no network, one CPU, memory and processes limited."""
        limits = ("--cpus", "1", "--memory", "512m", "--pids-limit", "512", "--network", "none")
        return self.command("run", "--rm", *limits, "python", *argv)


def docker() -> str:
    """Debian's client; another one in the path may be of another version."""
    return "/usr/bin/docker"


@contextlib.contextmanager
def docker_daemon(folder: Path) -> Iterator[Docker]:
    """dockerd with everything below *folder*; ended by its process id."""
    socket = str(folder / "docker.sock")
    with open(folder / "dockerd.log", "wb") as log:
        daemon = subprocess.Popen(
            [
                *("dockerd", "--data-root", str(folder / "data"), "-H", f"unix://{socket}"),
                *("--exec-root", str(folder / "exec"), "--pidfile", str(folder / "dockerd.pid")),
                *("--bridge=none", "--iptables=false", "--ip6tables=false"),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        found = Docker(socket)
        wait_for(lambda: answers(found))
        archive = folder / "root.tar"
        subprocess.run(["tar", "-C", str(root(folder)), "-cf", str(archive), "."], check=True)
        subprocess.run(
            found.command("import", str(archive), "python"), check=True, capture_output=True
        )
        yield found
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()


def answers(docker: Docker) -> bool:
    """Whether the daemon is there."""
    asked = subprocess.run(docker.command("version"), capture_output=True, check=False)
    return asked.returncode == 0


def wait_for(ready: Callable[[], bool]) -> None:
    """Poll a daemon that has no other way to say that it is ready."""
    late = time.monotonic() + READY_S
    while time.monotonic() < late:
        if ready():
            return
        time.sleep(0.1)
    raise TimeoutError("docker's daemon did not become ready")


def root(folder: Path) -> Path:
    """A root file system with Python and what it is linked with; made once."""
    made = folder / "root"
    if made.exists():
        return made
    for name in ("usr/bin", "usr/lib", "usr/lib64", "proc", "dev", "sys", "tmp", "etc"):
        (made / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (made / name).symlink_to(f"usr/{name}")
    library = sysconfig.get_path("stdlib", vars={"installed_base": "/usr"})
    ignored = shutil.ignore_patterns("test", "idlelib", "tkinter", "ensurepip")
    shutil.copytree(library, made / library.lstrip("/"), symlinks=True, ignore=ignored)
    programs = [os.path.realpath(PYTHON), "/usr/bin/true", "/usr/bin/echo"]
    extensions = [str(p) for p in Path(library, "lib-dynload").glob("*.so")]
    for path in {*programs, *libraries([*programs, *extensions])}:
        target = made / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    (made / "usr/bin/python3").unlink(missing_ok=True)
    (made / "usr/bin/python3").symlink_to(os.path.basename(os.path.realpath(PYTHON)))
    return made


def libraries(files: Sequence[str]) -> set[str]:
    """What the dynamic linker loads for *files*, by the paths it says."""
    found = subprocess.run(["ldd", *files], capture_output=True, text=True, check=False).stdout
    return {word for line in found.splitlines() for word in line.split() if word.startswith("/")
            and not word.endswith(":")}  # fmt: skip


class Runc:
    """A bundle for ``runc run`` (with the same limits) or, without any, ``runsc run``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def run(self, *argv: str) -> list[str]:
        """The command line of one run."""
        return ["runc", *self._run(argv)]

    def run_gvisor(self, *argv: str) -> list[str]:
        flags = ("--platform=ptrace", "--network=none", "--ignore-cgroups")
        return ["runsc", *flags, f"--root={self._folder}/state", *self._run(argv)]

    def _run(self, argv: tuple[str, ...]) -> list[str]:
        bundle = self._folder / "bundle"
        if not bundle.exists():
            bundle.mkdir()
            subprocess.run(["runc", "spec"], cwd=bundle, check=True)
        config = json.loads((bundle / "config.json").read_text())
        config["process"] |= {"terminal": False, "args": list(argv)}
        config["root"] = {"path": str(root(self._folder)), "readonly": True}
        config["linux"]["resources"] = {
            "memory": {"limit": 512 * 1024**2},
            "cpu": {"quota": 100_000, "period": 100_000},
            "pids": {"limit": 512},
        }
        (bundle / "config.json").write_text(json.dumps(config))
        self._count += 1
        return ["run", "--bundle", str(bundle), f"madang-bench-{os.getpid()}-{self._count}"]
