"""Keepers that are slow, dying, lying or not there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from madang.agent import keepers
from madang.agent.keepers import KeeperNews, SocketKeepers
from madang.agent.watch import Watch, read_ended
from madang.kit.clock import SystemClock
from madang.testing.patience import PATIENCE_S
from madang.wire.errors import InvalidRequest, SessionNotRunning
from madang.wire.link import Resize, Signal, StdinEnd

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def keeper(folder: Path, serve: Serve) -> AsyncIterator[str]:
    """A keeper that does *serve* with each connection, then closes it."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    with keepers._short(str(folder)) as path:
        server = await asyncio.start_unix_server(handle, path)
    try:
        yield str(folder)
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def saying(*lines: bytes) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.writelines(lines)
        await writer.drain()

    return serve


async def news(folder: str) -> list[KeeperNews]:
    async with aclosing(SocketKeepers().watch(folder)) as told:
        return [each async for each in told]


async def test_a_watcher_is_told_offsets_and_the_end(tmp_path: Path) -> None:
    async with keeper(tmp_path, saying(b'{"end": 5}\n', b'{"end": 9}\n{"ended": true}\n')) as io:
        assert await news(io) == [KeeperNews(5), KeeperNews(9), KeeperNews(ended=True)]


async def test_a_socket_in_a_deep_folder_is_reached(tmp_path: Path) -> None:
    async with keeper(tmp_path / ("deep" * 30), saying(b'{"end": 1}\n')) as io:
        assert await news(io) == [KeeperNews(1)]


@pytest.mark.parametrize(
    "line", [b"garbage\n", b"\xff\xfe\n", b"[1]\n", b'{"end": "x"}\n', b"x" * 10**6]
)
async def test_a_keeper_that_says_garbage_is_taken_for_gone(tmp_path: Path, line: bytes) -> None:
    async with keeper(tmp_path, saying(b'{"end": 5}\n', line)) as io:
        watch = Watch(io, SocketKeepers(), SystemClock())
        async with asyncio.timeout(PATIENCE_S):
            await watch.run()

        assert watch.gone
        assert watch.end == 5


async def test_no_keeper_no_news(tmp_path: Path) -> None:
    assert await news(str(tmp_path)) == []
    assert await news(str(tmp_path / "nowhere")) == []
    async with keeper(tmp_path, saying()):
        pass
    assert await news(str(tmp_path)) == [], "its socket is still there, nobody listens"


async def test_who_has_no_keeper_can_not_be_told_anything(tmp_path: Path) -> None:
    io, ways = str(tmp_path), SocketKeepers()
    with pytest.raises(SessionNotRunning):
        await ways.stop(io, reason="user", text="", grace_s=1)
    with pytest.raises(SessionNotRunning):
        await ways.signal(io, 15)
    with pytest.raises(SessionNotRunning):
        await ways.stdin(io)


async def test_a_refusal_comes_back_as_the_error_it_is(tmp_path: Path) -> None:
    answer = json.dumps({"error": "request.invalid", "text": "signal: no"}).encode() + b"\n"
    async with keeper(tmp_path, saying(answer)) as io:
        with pytest.raises(InvalidRequest, match="signal: no"):
            await SocketKeepers().signal(io, 99)


async def test_a_keeper_that_dies_before_it_answers_is_not_running(tmp_path: Path) -> None:
    async with keeper(tmp_path, saying()) as io:
        with pytest.raises(SessionNotRunning):
            await SocketKeepers().stop(io, reason="user", text="", grace_s=1)


async def test_a_keeper_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepers, "_PATIENCE_S", 0.05)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with keeper(tmp_path, silent) as io:
        with pytest.raises(SessionNotRunning):
            await SocketKeepers().signal(io, 15)


async def test_requests_say_what_they_must(tmp_path: Path) -> None:
    heard: list[dict[str, object]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(json.loads(await reader.readline()))
        writer.write(b'{"ok": true}\n')

    async with keeper(tmp_path, serve) as io:
        await SocketKeepers().stop(io, reason="oom", text="too much ½", grace_s=0.5)
        await SocketKeepers().signal(io, 10)

    assert heard == [
        {"op": "stop", "reason": "oom", "text": "too much ½", "grace_s": 0.5},
        {"op": "signal", "signal": 10},
    ]


async def test_input_waits_for_a_program_that_does_not_read(tmp_path: Path) -> None:
    release = asyncio.Event()
    total = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal total
        await reader.readline()
        await release.wait()
        while data := await reader.read(1 << 20):
            total += len(data)

    async with keeper(tmp_path, serve) as io:
        writer = await SocketKeepers().stdin(io)
        writing = asyncio.create_task(writer.write(b"x" * 20_000_000))
        await asyncio.sleep(0.05)
        assert not writing.done()
        release.set()
        await writing
        await writer.write(Resize(rows=3, cols=4))
        await writer.write(Signal(signal=2))
        await writer.write(StdinEnd())
        await writer.close()
        frames = -(-20_000_000 // (64 * 1024))
        while total < 20_000_000 + 5 * frames + (5 + 4) + (5 + 1) + 5:
            await asyncio.sleep(0)


async def test_input_for_a_program_that_has_ended_says_so(tmp_path: Path) -> None:
    async with keeper(tmp_path, saying()) as io:
        writer = await SocketKeepers().stdin(io)
        with pytest.raises(SessionNotRunning):
            for _ in range(100):
                await writer.write(b"x" * 100_000)
        await writer.close()


async def test_a_full_queue_of_connections_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path
    with keepers._short(str(folder)) as path:
        import socket

        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(0)
    waiting = [asyncio.create_task(news(str(folder))) for _ in range(4)]
    await asyncio.sleep(0.05)
    listener.setblocking(False)
    for _ in range(4):
        link, _ = await asyncio.get_running_loop().sock_accept(listener)
        link.send(b'{"end": 3}\n')
        link.close()
    listener.close()

    assert await asyncio.gather(*waiting) == [[KeeperNews(3)]] * 4


def test_an_end_that_can_not_be_read_is_none(tmp_path: Path) -> None:
    assert read_ended(str(tmp_path)) is None
    for content in (b"", b"{}", b"{", b"\xff", b'{"reason": "nonsense"}'):
        (tmp_path / "ended.json").write_bytes(content)
        assert read_ended(str(tmp_path)) is None
    (tmp_path / "ended.json").write_bytes(b'{"reason": "exit", "exit_code": 3}')
    found = read_ended(str(tmp_path))
    assert found is not None
    assert found.exit_code == 3
