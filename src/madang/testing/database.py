"""Real databases for tests: a PostgreSQL cluster of one's own, and fresh ones of either kind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import asyncpg

_VERSIONS: Final = ("17", "16", "15", "14")
_PREFIX: Final = "madang-pg-"
_OPTIONS: Final = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "autovacuum": "off",
}


def find_postgres() -> Path | None:
    """The folder with ``initdb`` and ``postgres``, as Debian and others install them."""
    folders = [Path(f"/usr/lib/postgresql/{version}/bin") for version in _VERSIONS]
    if (program := shutil.which("postgres")) is not None:
        folders.insert(0, Path(program).parent)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


class PostgresCluster:
    """A server on a Unix socket in a folder of its own; as root it runs as ``postgres``."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs: Final = programs
        self.folder: Final = folder
        self._numbers: Final = itertools.count(1)
        self._as: Final[dict[str, Any]] = (
            {"user": "postgres", "group": "postgres", "extra_groups": []}
            if os.geteuid() == 0
            else {}
        )

    def make(self) -> None:
        if self._as:
            shutil.chown(self.folder, "postgres", "postgres")
        command = ["initdb", "-D", "data", "-A", "trust", "-U", "madang", "-E", "UTF8"]
        self._run([*command, "--locale=C.UTF-8", "--no-sync"])

    def _run(self, command: list[str]) -> None:
        program = str(self._programs / command[0])
        subprocess.run(
            [program, *command[1:]],
            cwd=self.folder,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=60,
            **self._as,
        )

    def start(self) -> None:
        options = [f"-c {name}={value}" for name, value in _OPTIONS.items() if value]
        options += ["-c listen_addresses=''", f"-k {self.folder}"]
        command = ["pg_ctl", "-D", "data", "-l", "log", "-w", "-o", " ".join(options), "start"]
        self._run(command)

    def stop(self, *, how: str = "fast") -> None:
        """``fast``, or ``immediate``: as if it had crashed."""
        if (self.folder / "data" / "postmaster.pid").exists():
            self._run(["pg_ctl", "-D", "data", "-w", "-m", how, "stop"])

    def url(self, database: str) -> str:
        return f"postgresql://madang@/{database}?host={self.folder}"

    async def query(self, text: str, database: str = "postgres") -> Any:
        """Run *text* outside a transaction; the rows."""
        for _ in range(100):
            try:
                connection = await asyncpg.connect(self.url(database))
                break
            except (asyncpg.CannotConnectNowError, OSError):
                await asyncio.sleep(0.05)
        else:
            raise RuntimeError("PostgreSQL does not answer")
        try:
            return await connection.fetch(text)
        finally:
            await connection.close()

    async def fresh(self, template: str = "template0") -> str:
        """The name of a new database."""
        name = f"test_{os.getpid()}_{next(self._numbers)}"
        await self.query(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name


def _sweep(programs: Path) -> None:
    """Stop and remove the clusters of test runs that were killed."""
    for owner in Path("/tmp").glob(f"{_PREFIX}*/owner"):
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            if not Path(f"/proc/{int(owner.read_text())}").exists():
                PostgresCluster(programs, owner.parent).stop(how="immediate")
                shutil.rmtree(owner.parent, ignore_errors=True)


@contextmanager
def postgres_cluster() -> Iterator[PostgresCluster | None]:
    """One running cluster, gone afterwards; None where PostgreSQL is not installed."""
    programs = find_postgres()
    if programs is None:
        yield None
        return
    _sweep(programs)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))  # short: a socket lies in it
    cluster = PostgresCluster(programs, folder)
    try:
        (folder / "owner").write_text(str(os.getpid()))
        cluster.make()
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
