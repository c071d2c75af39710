"""The platform on PostgreSQL: the database and the server may be killed, sessions go on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from madang.client import Client
from madang.testing.database import PostgresCluster, postgres_cluster
from madang.testing.patience import PATIENCE_S
from madang.testing.platform import Platform, start
from madang.wire.errors import PlatformError
from madang.wire.log import LogRecord
from madang.wire.session import Result, Session, SessionSpec, SessionStatus, SizeRequest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sessions of several users"),
]
SIZE = SizeRequest(cpu=0.1, mem_bytes=32 << 20, disk_bytes=8 << 20)
COUNT = "i=0; while [ $i -lt 100 ]; do echo $i; i=$((i+1)); sleep 0.03; done"


@pytest.fixture
def cluster() -> Iterator[PostgresCluster]:
    with postgres_cluster() as found:
        if found is None:
            pytest.skip("PostgreSQL is not installed")
        found.folder.chmod(0o755)  # the server has a user of its own
        yield found


@pytest.fixture
def platform(cluster: PostgresCluster, tmp_path: Path) -> Iterator[Platform]:
    database = asyncio.run(cluster.fresh())
    # As everywhere but in tests: what was committed is there after a crash.
    asyncio.run(cluster.query(f"ALTER DATABASE {database} SET synchronous_commit = on"))
    environment = {
        "MADANG_DATABASE_URL": cluster.url(database),
        "MADANG_NODE_CPU_OVERCOMMIT": "50",
    }
    with start(tmp_path, environment=environment) as platform:
        yield platform


def counting(client: Client) -> Session:
    session = client.create_session(SessionSpec(argv=("sh", "-c", COUNT), size=SIZE))
    return client.wait_session(session.id, until=[SessionStatus.RUNNING], timeout_s=PATIENCE_S)


def assert_counted(client: Client, session: Session) -> None:
    ended = client.wait_session(session.id, timeout_s=PATIENCE_S)
    assert ended.result is Result.SUCCESS, ended
    records = client.logs(session.id)
    output = b"".join(r.data for r in records if isinstance(r, LogRecord))
    assert output.split() == [b"%d" % n for n in range(100)]


@pytest.mark.timeout(180)
def test_killing_the_database_or_the_server_loses_no_session(
    platform: Platform, cluster: PostgresCluster
) -> None:
    with platform.client() as client:
        session = counting(client)
        cluster.stop(how="immediate")
        with pytest.raises(PlatformError) as refused:
            client.create_session(SessionSpec(argv=("true",), size=SIZE))
        assert refused.value.code in {"database.unavailable", "server.unreachable"}
        cluster.start()
        assert_counted(client, session)

        session = counting(client)
        platform.kill("server")
        assert_counted(client, session)

        done = platform.madang("run", "--no-sync", "--", "echo", "fine", cwd=platform.folder)
        assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
