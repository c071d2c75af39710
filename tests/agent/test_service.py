"""The agent on real runtimes: whole lives of kernels, and what goes wrong in them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from madang.storage import BlobStore
from madang.testing.nodes import NodeFolder, NodeUnderTest, node
from madang.testing.patience import PATIENCE_S
from madang.testing.sessions import spec
from madang.testing.simulation import assignment
from madang.wire.api import WorkspaceFile, WorkspaceManifest
from madang.wire.errors import (
    InvalidRequest,
    LogGone,
    PlatformError,
    SessionNotRunning,
)
from madang.wire.kernel import Assignment, ExecSpec, KernelId, KernelState, Wanted
from madang.wire.link import (
    Attach,
    ExecStarted,
    FileEntry,
    FilesWritten,
    ListFiles,
    ReadFile,
    ReadLog,
    ReadTar,
    SendSignal,
    StartExec,
    StdinEnd,
    WriteFile,
)
from madang.wire.log import LogGap, LogRecord, Stream
from madang.wire.session import Ended, Reason

SH = "/bin/sh"


@pytest.fixture
async def blobs(tmp_path: Path) -> BlobStore:
    store = BlobStore(str(tmp_path / "blobs"))
    await store.open()
    return store


@pytest.fixture
async def it(state: NodeFolder, blobs: BlobStore) -> AsyncIterator[NodeUnderTest]:
    async with node(state.runtime, state.settings, blobs) as found:
        yield found


_numbers = iter(range(10**9))


def a_run(*argv: str, **more: Any) -> Assignment:
    """A new session that runs *argv*."""
    name = f"{next(_numbers):010d}"
    return assignment(name, spec=spec(*argv, **more))


def shell(script: str, **more: Any) -> Assignment:
    return a_run(SH, "-c", script, **more)


async def test_a_program_runs_and_its_end_is_told(it: NodeUnderTest) -> None:
    wanted = shell("echo out; echo err >&2; exit 3")
    await it.want(wanted)

    items = await it.items(ReadLog(kernel=wanted.kernel, follow=True))

    records = [item for item in items if isinstance(item, LogRecord)]
    assert {(r.stream, r.data) for r in records} == {
        (Stream.STDOUT, b"out\n"),
        (Stream.STDERR, b"err\n"),
    }
    end = items[-1]
    assert isinstance(end, Ended)
    assert (end.reason, end.exit_code) == (Reason.EXIT, 3)
    assert (await it.ended(wanted.kernel)).exit_code == 3
    report = it.reports[wanted.kernel]
    assert report.nonce == wanted.nonce
    assert report.started_at is not None
    assert report.log_end == max(record.end for record in records)
    assert "sandbox" in report.timings_ms


async def test_an_end_is_told_until_the_manager_knows_it(it: NodeUnderTest) -> None:
    wanted = shell("true")
    await it.want(wanted)
    await it.ended(wanted.kernel)

    def told() -> int:
        return sum(r.kernel == wanted.kernel and r.ended is not None for r in it.heard)

    before = told()
    await it.until(lambda: told() >= before + 2)
    await it.keep(wanted.kernel)
    known, beats = told(), it.heartbeats
    await it.until(lambda: it.heartbeats >= beats + 3)

    assert told() <= known + 1, "one report may have been under way"


async def test_files_and_output_stay_until_forgotten(it: NodeUnderTest) -> None:
    wanted = shell("echo kept; echo content > $MADANG_OUTPUTS/file; echo x > file")
    await it.want(wanted)
    await it.ended(wanted.kernel)
    await it.keep(wanted.kernel)

    assert await it.output(wanted.kernel) == b"kept\n"
    await it.forget(wanted.kernel)
    while it.agent.kernels:
        await it.agent.kernels_changed.wait()

    with pytest.raises(LogGone):
        await it.output(wanted.kernel)


async def test_a_stop_ends_a_program_with_the_reason_given(it: NodeUnderTest) -> None:
    wanted = shell("sleep 60")
    await it.want(wanted)
    await it.running(wanted.kernel)

    await it.stop_kernel(wanted.kernel)

    ended = await it.ended(wanted.kernel)
    assert (ended.reason, ended.exit_code) == (Reason.USER, 143)


async def test_a_program_that_ignores_sigterm_is_killed_after_the_grace(it: NodeUnderTest) -> None:
    wanted = shell("trap '' TERM; echo ready; while :; do sleep 1; done")
    await it.want(wanted)
    stream = await it.open(ReadLog(kernel=wanted.kernel, follow=True))
    async for item in stream:
        assert isinstance(item, LogRecord)
        break

    await it.stop_kernel(wanted.kernel, grace_s=60)
    await it.stop_kernel(wanted.kernel, grace_s=0.2)

    ended = await it.ended(wanted.kernel)
    assert (ended.reason, ended.exit_code) == (Reason.USER, 137)
    await stream.close()


async def test_who_only_keeps_watch_is_no_visitor(it: NodeUnderTest) -> None:
    wanted = shell("echo ready; sleep 60")
    await it.want(wanted)
    kernel = wanted.kernel
    await it.running(kernel)

    async def first(request: ReadLog) -> tuple[int, int]:
        """Visits and clients while its first output is read."""
        stream = await it.open(request)
        async for item in stream:
            assert isinstance(item, LogRecord)
            activity = it.agent.kernels[kernel].report().activity
            assert activity is not None
            await stream.close()
            return activity.visits, activity.clients
        raise AssertionError("no output")

    assert await first(ReadLog(kernel=kernel, follow=True, visit=False)) == (0, 0)
    assert await first(ReadLog(kernel=kernel, follow=True)) == (1, 1)


async def test_what_is_stopped_before_it_started_never_starts(it: NodeUnderTest) -> None:
    wanted = shell("echo started > /tmp/x; sleep 60")
    await it.want(replace(wanted, wanted=Wanted.STOP, stop_reason="user", stop_text="changed mind"))

    ended = await it.ended(wanted.kernel)

    assert (ended.reason, ended.exit_code, ended.text) == (Reason.USER, None, "changed mind")
    assert it.reports[wanted.kernel].started_at is None


async def test_forgetting_a_running_kernel_removes_it(it: NodeUnderTest) -> None:
    wanted = shell("sleep 60")
    await it.want(wanted)
    await it.running(wanted.kernel)

    await it.forget(wanted.kernel)
    while it.agent.kernels:
        await it.agent.kernels_changed.wait()


async def test_a_program_that_does_not_exist_is_an_end_like_a_shell_s(it: NodeUnderTest) -> None:
    wanted = a_run("/no/such/program")
    await it.want(wanted)

    ended = await it.ended(wanted.kernel)

    assert ended.exit_code == 127
    assert "/no/such/program" in ended.text


async def test_many_kernels_at_once(it: NodeUnderTest) -> None:
    wanted = [shell(f"echo {number}") for number in range(8)]
    await it.want(*wanted)

    outputs = await asyncio.gather(*(it.output(each.kernel) for each in wanted))

    assert outputs == [f"{number}\n".encode() for number in range(8)]


# --- restarts


async def test_sessions_survive_the_agent(it: NodeUnderTest) -> None:
    wanted = shell("echo before; read line; echo got $line", stdin=True)
    await it.want(wanted)
    started = await it.running(wanted.kernel)

    await it.restart()

    again = await it.running(wanted.kernel)
    assert again.started_at == pytest.approx(started.started_at, abs=0.001)
    stdin = await it.open(Attach(kernel=wanted.kernel))
    await stdin.send(b"hello\n")
    assert await it.output(wanted.kernel) == b"before\ngot hello\n"
    await stdin.close()


async def test_an_end_while_the_agent_was_away_is_told(it: NodeUnderTest, tmp_path: Path) -> None:
    wanted = shell("read line; exit 7", stdin=True)
    await it.want(wanted)
    await it.running(wanted.kernel)
    stdin = await it.open(Attach(kernel=wanted.kernel))
    await stdin.send(b"go\n")
    await stdin.end()
    assert [item async for item in stdin] == []
    await it.stop()

    await it.start()

    assert (await it.ended(wanted.kernel)).exit_code == 7


async def test_what_ended_is_never_started_again(it: NodeUnderTest) -> None:
    wanted = shell("echo once")
    await it.want(wanted)
    first = await it.ended(wanted.kernel)

    await it.restart()
    await it.disconnect()
    await it.connect()

    assert await it.ended(wanted.kernel) == first
    assert await it.output(wanted.kernel) == b"once\n"


async def test_a_lost_journal_costs_no_session(it: NodeUnderTest, state: NodeFolder) -> None:
    running, over = shell("sleep 60"), shell("echo over")
    await it.want(running, over)
    started = await it.running(running.kernel)
    ended = await it.ended(over.kernel)
    await it.stop()
    for path in Path(state.folder, "server").glob("journal.db*"):
        path.unlink()

    await it.start()

    await it.until(lambda: len(it.hello.inventory if it.hello else "x") == 0)
    again = await it.running(running.kernel)
    assert again.started_at == pytest.approx(started.started_at, abs=0.001)
    assert (await it.ended(over.kernel)).exit_code == ended.exit_code


async def test_what_nobody_names_any_more_is_removed(it: NodeUnderTest) -> None:
    wanted = shell("sleep 60")
    await it.want(wanted)
    await it.running(wanted.kernel)
    await it.stop()
    it.wanted.clear()
    it.revision += 1

    await it.start()

    while it.agent.kernels:
        await it.agent.kernels_changed.wait()


async def test_an_older_full_list_ends_nothing(it: NodeUnderTest) -> None:
    wanted = shell("sleep 60")
    await it.want(wanted)
    await it.running(wanted.kernel)
    await it.disconnect()
    revision, it.revision = it.revision, 0
    everything, it.wanted = it.wanted, {}

    await it.connect()
    it.revision, it.wanted = revision, everything
    await it.tell_all()

    beats = it.heartbeats
    await it.until(lambda: it.heartbeats > beats + 1)
    assert it.is_in(wanted.kernel, KernelState.RUNNING)


async def test_another_attempt_starts_only_when_the_former_is_gone(it: NodeUnderTest) -> None:
    first = shell("trap '' TERM; echo 1; while :; do sleep 1; done")
    await it.want(first)
    await it.running(first.kernel)
    second = replace(
        first, kernel=KernelId(first.kernel.session, 2), nonce="2", spec=spec(SH, "-c", "echo 2")
    )

    await it.want(second)
    beats = it.heartbeats
    await it.until(lambda: it.heartbeats > beats + 1)
    assert not it.is_in(second.kernel, KernelState.RUNNING)
    await it.forget(first.kernel)

    assert await it.output(second.kernel) == b"2\n"


# --- working directories and files


async def put(blobs: BlobStore, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()

    async def chunks() -> AsyncIterator[bytes]:
        yield data

    await blobs.put(digest, len(data), chunks())
    return digest


async def test_the_working_directory_is_there_at_the_start(
    it: NodeUnderTest, blobs: BlobStore
) -> None:
    digests = [await put(blobs, b"%d" % number) for number in range(3)]
    files = tuple(
        WorkspaceFile(path=f"{number}.txt", kind="file", size_bytes=1, digest=digest)
        for number, digest in enumerate(digests)
    )
    digest = await blobs.put_manifest(WorkspaceManifest(files=files))
    wanted = shell("cat *.txt", workspace=digest)
    await it.want(wanted)

    assert await it.output(wanted.kernel) == b"012"
    await it.ended(wanted.kernel)
    assert "workspace" in it.reports[wanted.kernel].timings_ms


async def test_a_working_directory_that_is_not_there_fails_the_start(it: NodeUnderTest) -> None:
    wanted = shell("true", workspace="a" * 64)
    await it.want(wanted)

    ended = await it.ended(wanted.kernel)

    assert ended.reason is Reason.START_FAILED
    assert "not stored" in ended.text
    assert await it.output(wanted.kernel) == b""


async def test_files_go_in_and_out_while_it_runs_and_after(it: NodeUnderTest) -> None:
    wanted = shell("read line; cat sent; echo made > made", stdin=True)
    kernel = wanted.kernel
    await it.want(wanted)
    await it.running(kernel)
    stream = await it.open(WriteFile(kernel=kernel, path="sent"))
    await stream.send(b"content\n")
    await stream.end()
    assert [item async for item in stream] == [FilesWritten(files=1, bytes=8)]
    stdin = await it.open(Attach(kernel=kernel))
    await stdin.send(b"\n")

    assert await it.output(kernel) == b"content\n"
    await stdin.close()
    await it.ended(kernel)
    names = {
        i.path
        for i in await it.items(ListFiles(kernel=kernel, path="."))
        if isinstance(i, FileEntry)
    }
    assert names == {"sent", "made"}
    read = await it.items(ReadFile(kernel=kernel, path="made"))
    assert b"".join(part for part in read if isinstance(part, bytes)) == b"made\n"
    assert len(await it.items(ReadTar(kernel=kernel, path="."))) > 0
    with pytest.raises(PlatformError):
        await it.items(ReadFile(kernel=kernel, path="nothing"))


# --- streams


async def test_output_can_be_read_from_any_offset(it: NodeUnderTest) -> None:
    wanted = shell("for i in 1 2 3 4 5; do echo line $i; sleep 0.02; done")
    kernel = wanted.kernel
    await it.want(wanted)
    everything = [
        i for i in await it.items(ReadLog(kernel=kernel, follow=True)) if isinstance(i, LogRecord)
    ]

    for start in everything:
        rest = await it.items(ReadLog(kernel=kernel, offset=start.offset))
        assert rest == everything[everything.index(start) :]
    for tail in (1, 7, 14, 1000):
        rest = await it.items(ReadLog(kernel=kernel, tail_bytes=tail))
        data = b"".join(record.data for record in rest if isinstance(record, LogRecord))
        assert len(data) >= min(tail, 35)
    since = everything[2].at_us
    rest = await it.items(ReadLog(kernel=kernel, since_us=since))
    assert rest == everything[2:]
    assert await it.items(ReadLog(kernel=kernel, offset=10**9)) == []
    with pytest.raises(InvalidRequest):
        await it.items(ReadLog(kernel=kernel, offset=-1))


async def test_output_that_is_not_kept_any_more_is_a_gap(it: NodeUnderTest) -> None:
    wanted = shell(
        "dd if=/dev/zero bs=64k count=40 2>/dev/null; echo last", log_limit_bytes=300_000
    )
    await it.want(wanted)
    await it.ended(wanted.kernel)

    items = await it.items(ReadLog(kernel=wanted.kernel))

    assert isinstance(items[0], LogGap)
    assert items[0].start == 0
    at, data = items[0].end, b""
    for record in items[1:]:
        assert isinstance(record, LogRecord)
        assert record.offset == at
        at, data = record.end, record.data
    assert data.endswith(b"last\n")


async def test_a_reader_that_does_not_read_holds_up_nobody(it: NodeUnderTest) -> None:
    wanted = shell("dd if=/dev/zero bs=64k count=200 2>/dev/null; echo done")
    await it.want(wanted)
    lazy = await it.open(ReadLog(kernel=wanted.kernel, follow=True))

    assert (await it.output(wanted.kernel)).endswith(b"done\n")

    total = 0
    async for item in lazy:
        total += len(item.data) if isinstance(item, LogRecord) else 0
    assert total == 200 * 65536 + 5


async def test_many_follow_one_program(it: NodeUnderTest) -> None:
    wanted = shell("read line; echo $line", stdin=True)
    await it.want(wanted)
    await it.running(wanted.kernel)
    followers = [asyncio.create_task(it.output(wanted.kernel)) for _ in range(50)]
    stdin = await it.open(Attach(kernel=wanted.kernel))

    await stdin.send(b"hello\n")

    assert await asyncio.gather(*followers) == [b"hello\n"] * 50
    await stdin.close()


async def test_a_follower_that_goes_away_is_let_go(it: NodeUnderTest) -> None:
    wanted = shell("sleep 60")
    await it.want(wanted)
    await it.running(wanted.kernel)
    before = len(asyncio.all_tasks())

    streams = [await it.open(ReadLog(kernel=wanted.kernel, follow=True)) for _ in range(20)]
    while len(asyncio.all_tasks()) < before + 20:
        await asyncio.sleep(0)
    for stream in streams:
        await stream.close()

    async with asyncio.timeout(PATIENCE_S):
        while len(asyncio.all_tasks()) > before:
            await asyncio.sleep(0.01)


async def test_input_reaches_the_program_to_the_last_byte(it: NodeUnderTest) -> None:
    wanted = a_run("/usr/bin/sha256sum", stdin=True)
    await it.want(wanted)
    data = os.urandom(3_000_000)

    stdin = await it.open(Attach(kernel=wanted.kernel))
    for at in range(0, len(data), 50_000):
        await stdin.send(data[at : at + 50_000])
    await stdin.send(StdinEnd())
    await stdin.end()

    assert (await it.output(wanted.kernel)).split()[0] == hashlib.sha256(data).hexdigest().encode()


async def test_an_exec_runs_beside_the_program(it: NodeUnderTest) -> None:
    wanted = shell("sleep 60")
    kernel = wanted.kernel
    await it.want(wanted)
    await it.running(kernel)

    request = StartExec(kernel=kernel, spec=ExecSpec(argv=(SH, "-c", "echo exec; exit 5")))
    (started,) = await it.items(request)

    assert isinstance(started, ExecStarted)
    items = await it.items(ReadLog(kernel=kernel, exec_id=started.exec_id, follow=True))
    assert [i.data for i in items if isinstance(i, LogRecord)] == [b"exec\n"]
    assert isinstance(items[-1], Ended)
    assert items[-1].exit_code == 5
    assert it.is_in(kernel, KernelState.RUNNING)


async def test_a_signal_reaches_the_program(it: NodeUnderTest) -> None:
    wanted = shell("trap 'echo usr1; exit 4' USR1; echo ready; while :; do sleep 0.01; done")
    await it.want(wanted)
    async for _ in await it.open(ReadLog(kernel=wanted.kernel, follow=True)):
        break

    assert await it.items(SendSignal(kernel=wanted.kernel, signal=signal.SIGUSR1)) == []

    assert (await it.ended(wanted.kernel)).exit_code == 4
    with pytest.raises(SessionNotRunning):
        await it.items(SendSignal(kernel=wanted.kernel, signal=signal.SIGUSR1))


@pytest.mark.parametrize("exec_id", ["../main", "main/../../x", "", "a" * 100, "x\0y"])
async def test_an_exec_id_can_not_be_a_path(it: NodeUnderTest, exec_id: str) -> None:
    wanted = shell("sleep 60")
    await it.want(wanted)
    await it.running(wanted.kernel)

    for request in (
        ReadLog(kernel=wanted.kernel, exec_id=exec_id, follow=True),
        Attach(kernel=wanted.kernel, exec_id=exec_id),
        SendSignal(kernel=wanted.kernel, exec_id=exec_id, signal=9),
    ):
        with pytest.raises(InvalidRequest):
            await it.items(request)


async def test_streams_end_with_the_link(it: NodeUnderTest) -> None:
    wanted = shell("sleep 60")
    await it.want(wanted)
    await it.running(wanted.kernel)
    stream = await it.open(ReadLog(kernel=wanted.kernel, follow=True))

    await it.disconnect()

    with pytest.raises(ConnectionError):
        async for _ in stream:
            pass
    await it.connect()
    assert it.is_in(wanted.kernel, KernelState.RUNNING)


async def test_usage_comes_with_the_heartbeat(it: NodeUnderTest, state: NodeFolder) -> None:
    if state.launcher is None:
        pytest.skip("plain processes have no counters")
    wanted = shell("sleep 60")
    await it.want(wanted)

    def usage() -> bool:
        report = it.reports.get(wanted.kernel)
        return report is not None and report.usage is not None

    await it.until(usage)
    found = it.reports[wanted.kernel].usage
    assert found is not None
    assert (found.pids or 0) >= 1
