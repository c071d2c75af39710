"""The asyncio client: what differs from the blocking one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.client.fake import TOKEN, FakeServer
from tests.client.test_client_sync import COUNT, COUNTED

from madang.client import AsyncClient
from madang.wire.api import ClientOp
from madang.wire.errors import ImageUnknown, NotFound, ServerUnreachable, Shutdown, Unauthenticated
from madang.wire.log import LogRecord
from madang.wire.session import SessionSpec, SessionStatus


@pytest.fixture
async def aclient(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, TOKEN, patience_s=10.0) as made:
        yield made


async def collect(output: AsyncIterator[object]) -> bytes:
    return b"".join([item.data async for item in output if isinstance(item, LogRecord)])


async def test_a_run_gives_output_and_the_exit_code(aclient: AsyncClient) -> None:
    run = await aclient.run(["sh", "-c", "echo hello; exit 3"])

    assert await collect(aiter(run)) == b"hello\n"
    ended = (await run.wait()).ended
    assert ended is not None
    assert ended.exit_code == 3


async def test_many_runs_at_once_do_not_mix(aclient: AsyncClient) -> None:
    async def one(i: int) -> bytes:
        async with await aclient.run(["cat"], stdin=True) as run:
            await run.write(b"%d" % i * 1000)
            await run.close_stdin()
            return await collect(aiter(run))

    assert await asyncio.gather(*map(one, range(8))) == [b"%d" % i * 1000 for i in range(8)]


async def test_bytes_survive_in_both_directions(aclient: AsyncClient) -> None:
    data = os.urandom(1_000_000)
    async with await aclient.run(["cat"], stdin=True) as run:
        async with asyncio.TaskGroup() as tasks:
            echoed = tasks.create_task(collect(aiter(run)))
            await run.write(data)
            await run.close_stdin()

    assert echoed.result() == data


async def test_a_cut_stream_loses_nothing_and_repeats_nothing(
    server: FakeServer, aclient: AsyncClient
) -> None:
    server.cut_after = 500

    run = await aclient.run(["sh", "-c", f"{COUNT}; sleep 0.2; echo end"])

    assert await collect(aiter(run)) == COUNTED + b"end\n"
    assert [m.op for m in server.messages].count(ClientOp.ATTACH) == 1


async def test_followed_logs_survive_a_restart(server: FakeServer, aclient: AsyncClient) -> None:
    script = f"{COUNT}; sleep 0.5; echo end"
    session = await aclient.create_session(SessionSpec(argv=("sh", "-c", script)))
    await aclient.wait_session(session.id, until=[SessionStatus.RUNNING])
    server.cut_after = 333

    async def restart() -> None:
        await asyncio.sleep(0.2)
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(restart())
        output = await collect(aclient.logs(session.id, follow=True))

    assert output == COUNTED + b"end\n"


async def test_errors_are_the_classes_of_the_catalogue(
    server: FakeServer, aclient: AsyncClient
) -> None:
    with pytest.raises(NotFound):
        await aclient.get_session("nothing-like-it")
    with pytest.raises(NotFound):
        await aclient.attach("nothing-like-it")
    with pytest.raises(ImageUnknown):
        await (await aclient.run(["true"], image="nope")).wait()
    async with AsyncClient(server.url, "wrong") as stranger:
        with pytest.raises(Unauthenticated):
            await stranger.whoami()


async def test_nobody_listening_is_told_at_once() -> None:
    async with AsyncClient("http://127.0.0.1:9", TOKEN) as client:
        with pytest.raises(ServerUnreachable, match="madang up"):
            await client.whoami()


async def test_a_stopping_server_is_tried_again(server: FakeServer, aclient: AsyncClient) -> None:
    server.fail_next = [Shutdown("stopping")]

    session = await aclient.create_session(SessionSpec(argv=("true",)))

    assert session.id in server.jobs


async def test_files_travel_both_ways(
    server: FakeServer, aclient: AsyncClient, tmp_path: Path
) -> None:
    source = tmp_path / "data"
    source.mkdir()
    (source / "big").write_bytes(os.urandom(700_000))
    session = await aclient.create_session(SessionSpec())

    await aclient.put(session.id, [str(source)], "/work")
    got = await aclient.get(session.id, "/work/data", str(tmp_path / "back"))

    assert got.files == 1
    assert (tmp_path / "back/big").read_bytes() == (source / "big").read_bytes()


async def test_a_folder_is_synced_once(
    server: FakeServer, aclient: AsyncClient, tmp_path: Path
) -> None:
    source = tmp_path / "project"
    source.mkdir()
    (source / "train.py").write_text("print(1)")

    first = await aclient.sync_workspace(str(source))
    second = await aclient.sync_workspace(str(source))

    assert first.digest == second.digest
    assert (first.sent_files, second.sent_files) == (1, 0)
    assert list(server.blobs.values()) == [b"print(1)"]


async def test_exec_lists_and_events_work(server: FakeServer, aclient: AsyncClient) -> None:
    session = await aclient.create_session(SessionSpec())
    await aclient.wait_session(session.id, until=[SessionStatus.RUNNING])

    program = await aclient.exec(session.id, ["echo", "inside"])

    assert await collect(aiter(program)) == b"inside\n"
    assert (await program.wait()).exit_code == 0
    assert [s.id async for s in aclient.list_sessions()] == [session.id]
    events = aclient.events(last_id=0)
    assert (await anext(events)).id == 1
    await events.aclose()  # type: ignore[attr-defined]
