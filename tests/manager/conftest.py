"""Fixtures of the manager's tests: each test gets a fresh database of either kind."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from madang.manager.app import ManagerSettings
from madang.manager.db import Database, open_database
from madang.testing.database import PostgresCluster, postgres_cluster
from madang.testing.manager import ManagerBox, manager_box

for _slice in (
    "audit",
    "identity",
    "usage",
    "fleet",
    "limits",
    "image",
    "policy",
    "scheduling",
    "session",
):
    importlib.import_module(f"madang.manager.{_slice}.tables")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresCluster]:
    """One cluster for the whole run."""
    with postgres_cluster() as cluster:
        if cluster is None:
            pytest.skip("PostgreSQL is not installed (Debian: postgresql-15)")
        yield cluster


class Templates:
    """Migrated once, then copied."""

    def __init__(self, folder: Path) -> None:
        self.sqlite = folder / "template.db"
        self.postgres = ""


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return Templates(tmp_path_factory.mktemp("database"))


async def _migrate(url: str) -> None:
    database = open_database(url)
    await database.open()
    await database.close()


@pytest.fixture(params=["sqlite", "postgresql"])
async def database_url(request: pytest.FixtureRequest, tmp_path: Path, templates: Templates) -> str:
    """A fresh, migrated database of each kind."""
    if request.param == "sqlite":
        return await sqlite_copy(templates, tmp_path)
    cluster: PostgresCluster = request.getfixturevalue("postgres")
    if not templates.postgres:
        name = await cluster.fresh()
        await _migrate(cluster.url(name))
        templates.postgres = name
    return cluster.url(await cluster.fresh(templates.postgres))


async def sqlite_copy(templates: Templates, folder: Path) -> str:
    if not templates.sqlite.exists():
        await _migrate(f"sqlite:///{templates.sqlite}")
    shutil.copy(templates.sqlite, folder / "test.db")
    return f"sqlite:///{folder / 'test.db'}"


@pytest.fixture
async def sqlite_url(tmp_path: Path, templates: Templates) -> str:
    """Where one kind of database is enough."""
    return await sqlite_copy(templates, tmp_path)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = open_database(database_url)
    await database.open()
    yield database
    await database.close()


@pytest.fixture
async def box(sqlite_url: str) -> AsyncIterator[ManagerBox]:
    """A manager over HTTP, on SQLite."""
    async with manager_box(ManagerSettings(database_url=sqlite_url)) as box:
        yield box


@pytest.fixture
async def either_box(database_url: str) -> AsyncIterator[ManagerBox]:
    """A manager over HTTP, on each kind of database."""
    async with manager_box(ManagerSettings(database_url=database_url)) as box:
        yield box
