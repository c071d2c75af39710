"""A whole platform in real processes: ``madang up`` on a folder of its own.

>>> with start(folder) as platform, platform.client() as client:
...     client.run(["echo", "hello"]).wait().ended.exit_code
0
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from madang.client import Client
from madang.daemon.state import Running, born, read_running

MADANG: Final = (sys.executable, "-m", "madang.cli")
READY: Final = re.compile(r"is ready: (\S+)")
STOP_S: Final = 40.0


@dataclass(kw_only=True)
class Platform:
    """A running ``madang up``."""

    folder: Path
    """``state`` and ``client.toml`` lie here."""
    url: str
    process: subprocess.Popen[str]
    environment: dict[str, str] = field(default_factory=dict)
    user: int | None = None
    """Who started it, if not we."""

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def token(self) -> str:
        return (self.state / "token").read_text().strip()

    def client(self) -> Client:
        """A client with the administrator's token."""
        return Client(self.url, self.token)

    def running(self) -> Running:
        """Supervisor and its children, as they are now."""
        running = read_running(str(self.state))
        assert running is not None, "the platform does not run"
        return running

    def child(self, name: str) -> int:
        """The pid of ``launcher`` or ``server``; one that has just died is waited for."""
        end = time.monotonic() + STOP_S
        while time.monotonic() < end:
            for pid, started in self.running().children:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    command = Path(f"/proc/{pid}/cmdline").read_text()
                    serves = "daemon.server" in command
                    if command and born(pid) == started and serves == (name == "server"):
                        return pid
            time.sleep(0.02)
        raise LookupError(f"no {name} runs")

    def kill(self, name: str) -> int:
        """SIGKILL ``launcher`` or ``server``; its former pid."""
        pid = self.child(name)
        os.kill(pid, signal.SIGKILL)
        return pid

    def madang(self, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """One command line, to its end."""
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60}
        options |= {"env": self.environment} | _as_user(self.user) | more
        return subprocess.run([*MADANG, *arguments], check=False, **options)

    def stop(self, *, keep_sessions: bool = False) -> None:
        """End it, sessions first."""
        keep = ["--keep-sessions"] if keep_sessions else []
        done = self.madang("down", "--state", str(self.state), *keep, timeout=STOP_S * 2)
        try:
            self.process.wait(STOP_S)
        finally:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdout, self.process.stderr):
                assert stream is not None
                stream.close()
        assert done.returncode == 0, done.stdout + done.stderr

    def logs(self) -> str:
        """What its processes wrote, for the message of a failed test."""
        files = (self.state / "server" / "server.log", self.state / "launcher.log")
        return "".join(f"== {f}\n{f.read_text()}\n" for f in files if f.exists())


def launch(
    folder: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    user: int | None = None,
) -> subprocess.Popen[str]:
    """``madang up`` in the foreground on *folder*, not waited for."""
    return subprocess.Popen(
        [*MADANG, "up", "--port", "0", "--state", str(folder / "state"), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(folder, environment),
        start_new_session=True,
        **_as_user(user),
    )


def begin(
    folder: Path,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    user: int | None = None,
) -> Platform:
    """A platform that is ready; the caller must ``stop`` it."""
    process = launch(folder, *arguments, environment=environment, user=user)
    assert process.stdout is not None
    assert process.stderr is not None
    url = _wait_ready(process.stdout)
    if url is None:
        process.wait(STOP_S)
        with process.stdout, process.stderr:
            raise RuntimeError(f"`madang up` failed:\n{process.stderr.read()}")
    return Platform(
        folder=folder,
        url=url,
        process=process,
        environment=_environment(folder, environment),
        user=user,
    )


@contextmanager
def start(
    folder: Path,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    user: int | None = None,
) -> Iterator[Platform]:
    """A platform for as long as the block runs."""
    platform = begin(folder, arguments, environment, user)
    try:
        yield platform
    except BaseException:
        print(platform.logs())
        raise
    finally:
        platform.stop()


def _as_user(user: int | None) -> dict[str, Any]:
    return {} if user is None else {"user": user, "group": user, "extra_groups": []}


def _environment(folder: Path, more: Mapping[str, str] | None) -> dict[str, str]:
    own = {"MADANG_CONFIG": str(folder / "client.toml"), "XDG_CACHE_HOME": str(folder / "cache")}
    own |= {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder / "config")}
    return {**os.environ, **own, **(more or {})}


def _wait_ready(output: IO[str]) -> str | None:
    for line in output:
        if match := READY.search(line):
            return match[1]
    return None
