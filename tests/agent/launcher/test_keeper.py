"""Keepers: clients that lie, flood or don't read; output without end; stops, time, ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from madang.agent.keepers import SocketKeepers
from madang.agent.runtime import layout
from madang.agent.runtime.process import ProcessRuntime
from madang.kit.ids import new_id
from madang.testing.patience import PATIENCE_S
from madang.testing.sessions import Sessions, read_output, spec
from madang.wire.errors import Conflict, InvalidRequest, SessionNotRunning
from madang.wire.kernel import ExecSpec, KernelId
from madang.wire.log import unpack
from madang.wire.session import Reason
from madang.wire.size import KIB, MIB


@pytest.fixture
async def sessions(tmp_path: Path) -> AsyncIterator[Sessions]:
    """Keepers are the same in every runtime; this one runs anywhere."""
    runtime = ProcessRuntime(str(tmp_path))
    found = Sessions(runtime, await runtime.open())
    yield found
    await found.close()
    await runtime.close()


class Line:
    """One connection to ``keeper.sock``, line by line."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.loop = asyncio.get_running_loop()
        self._buffer = b""

    @classmethod
    async def open(cls, sessions: Sessions, kernel: KernelId, name: str = "main") -> Line:
        return cls(await layout.connect(f"{sessions.io(kernel, name)}/keeper.sock"))

    async def send(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.sock, data)

    async def say(self, **message: Any) -> None:
        await self.send(json.dumps(message).encode() + b"\n")

    async def hear(self) -> dict[str, Any] | None:
        """The next line; None: the keeper hung up."""
        async with asyncio.timeout(PATIENCE_S):
            while b"\n" not in self._buffer:
                try:
                    data = await self.loop.sock_recv(self.sock, 65536)
                except ConnectionResetError:
                    return None
                if not data:
                    return None
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
async def idle(sessions: Sessions) -> KernelId:
    return await sessions.start()


@pytest.mark.parametrize(
    "line",
    [
        *(b"\n", b"nope\n", b"[]\n", b"7\n", b'{"op": 7}\n', b'{"op": "explode"}\n', b"{}\n"),
        *(b'{"op": ["watch"]}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n"),
        *(b'{"op": "signal"}\n', b'{"op": "signal", "signal": 0}\n'),
        *(b'{"op": "signal", "signal": 65}\n', b'{"op": "signal", "signal": true}\n'),
        *(b'{"op": "stop", "reason": "boredom"}\n', b'{"op": "stop", "grace_s": -1}\n'),
        *(b'{"op": "stop", "grace_s": "x"}\n', b'{"op": "stop", "grace_s": NaN}\n'),
        *(b'{"op": "exec"}\n', b'{"op": "exec", "exec": "../x", "spec": {}}\n'),
        b'{"op": "exec", "exec": "e", "spec": {"argv": []}}\n',
        b'{"op": "exec", "exec": "main", "spec": {"argv": ["true"]}}\n',
        b'{"op": "exec", "exec": "e", "spec": {"argv": ["true"], "cwd": "/\\ud800"}}\n',
    ],
)
async def test_a_bad_line_is_refused_in_words(
    sessions: Sessions, idle: KernelId, line: bytes
) -> None:
    link = await Line.open(sessions, idle)
    await link.send(line)
    answer = await link.hear()
    link.close()

    assert answer is not None
    assert answer["error"] == "request.invalid"
    assert (await sessions.exec(idle, "after", "/bin/echo", "well")).out == b"well\n"


async def test_a_line_without_end_is_hung_up_on(sessions: Sessions, idle: KernelId) -> None:
    link = await Line.open(sessions, idle)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            await link.send(b"x" * MIB)
    link.close()
    assert (await sessions.exec(idle, "e", "/bin/true")).code == 0


@pytest.mark.parametrize(
    "frame",
    [
        *(b"\x09\0\0\0\0", b"\0\xff\xff\xff\xff", b"\x02\1\0\0\0x", b"\x03\1\0\0\0\x00"),
        b"\x03\0\0\0\0",
    ],
)
async def test_a_bad_frame_on_stdin_is_hung_up_on(
    sessions: Sessions, idle: KernelId, frame: bytes
) -> None:
    link = await Line.open(sessions, idle)
    await link.say(op="stdin")
    await link.send(frame)
    answer = await link.hear()
    assert answer is not None
    assert answer["error"] == "request.invalid"
    assert await link.hear() is None
    link.close()


async def test_a_watcher_that_does_not_read_stalls_nobody(sessions: Sessions) -> None:
    script = "sleep 0.2; for n in $(seq 300); do head -c 10000 /dev/zero; done"
    kernel = await sessions.start("/bin/sh", "-c", script)
    deaf = [await Line.open(sessions, kernel) for _ in range(20)]
    for link in deaf:
        await link.say(op="watch")
    done = await sessions.outcome(kernel)
    for link in deaf:
        link.close()

    assert len(done.out) == 3_000_000


async def test_stdin_waits_for_a_program_that_does_not_read(sessions: Sessions) -> None:
    """The writer is held back; the keeper takes in a bounded amount."""
    kernel = await sessions.start("/bin/sh", "-c", "read go; exec sleep 1000", stdin=True)
    link = await Line.open(sessions, kernel)
    await link.say(op="stdin")
    await link.send(b"\0" + struct.pack("<I", 3) + b"go\n")
    chunk = b"\0" + struct.pack("<I", 64 * KIB) + b"x" * (64 * KIB)
    sent = 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            while True:
                await link.loop.sock_sendall(link.sock, chunk)
                sent += 64 * KIB
    assert sent < 8 * MIB
    link.close()
    await sessions.keepers.stop(sessions.io(kernel), reason="user", text="", grace_s=0)
    await sessions.outcome(kernel)


async def test_several_clients_may_type(sessions: Sessions) -> None:
    kernel = await sessions.start("/bin/cat", stdin=True)
    links = [await Line.open(sessions, kernel) for _ in range(5)]
    for number, link in enumerate(links):
        await link.say(op="stdin")
        await link.send(b"\0" + struct.pack("<I", 7) + b"line %d\n" % number)
        await sessions.until(kernel, b"line %d\n" % number)
    await links[0].send(b"\x01\0\0\0\0")
    done = await sessions.outcome(kernel)
    for link in links:
        link.close()

    assert done.out == b"".join(b"line %d\n" % number for number in range(5))


async def test_a_client_that_leaves_does_not_end_the_input(sessions: Sessions) -> None:
    kernel = await sessions.start("/bin/cat", stdin=True)
    first = await Line.open(sessions, kernel)
    await first.say(op="stdin")
    await first.send(b"\0" + struct.pack("<I", 4) + b"one\n")
    await sessions.until(kernel, b"one")
    first.close()
    second = await Line.open(sessions, kernel)
    await second.say(op="stdin")
    await second.send(b"\0" + struct.pack("<I", 4) + b"two\n" + b"\x01\0\0\0\0")
    done = await sessions.outcome(kernel)
    second.close()

    assert done.out == b"one\ntwo\n"


async def test_output_far_beyond_its_limit_is_bounded_on_disk(sessions: Sessions) -> None:
    """1 GiB in the small: 64 MiB against a limit of 1 MiB."""
    kernel = await sessions.start(
        "/bin/sh", "-c", "head -c 64M /dev/zero; echo last", log_limit_bytes=MIB
    )
    done = await sessions.outcome(kernel)
    kept = sum(path.stat().st_size for path in Path(sessions.io(kernel), "log").iterdir())

    assert kept <= MIB
    assert kept > MIB // 2
    assert done.out.endswith(b"last\n")
    names = sorted(int(path.name) for path in Path(sessions.io(kernel), "log").iterdir())
    assert names[0] > 60 * MIB


async def test_records_are_whole_and_offsets_continue_over_segments(sessions: Sessions) -> None:
    kernel = await sessions.start("/bin/sh", "-c", "seq 1 300000", log_limit_bytes=1 * MIB)
    await sessions.outcome(kernel)
    end = None
    for path in sorted(Path(sessions.io(kernel), "log").iterdir()):
        data = path.read_bytes()
        start = int(path.name)
        assert end in {None, start}
        _, end = unpack(data, start)
        assert end == start + len(data)


async def test_a_full_disk_under_the_log_loses_output_not_the_program(
    tmp_path: Path,
) -> None:
    """The program goes on; its end is written down, with how much was lost."""
    if os.geteuid() != 0:
        pytest.skip("needs root: mounts a small file system")
    small = tmp_path / "small"
    small.mkdir()
    os.system(f"mount -t tmpfs -o size=3m none {small}")
    try:
        runtime = ProcessRuntime(str(small))
        found = Sessions(runtime, await runtime.open())
        kernel = await found.start("/bin/sh", "-c", "head -c 8M /dev/zero; exit 3")
        done = await found.outcome(kernel)
        await found.close()
        await runtime.close()
    finally:
        os.system(f"umount {small}")

    assert (done.code, done.ended.reason) == (3, Reason.EXIT)
    assert "output were lost" in done.ended.text


async def test_the_first_stop_gives_the_reason_and_the_shortest_grace_wins(
    sessions: Sessions,
) -> None:
    kernel = await sessions.start("/bin/sh", "-c", "trap '' TERM; echo on; sleep 1000 & wait")
    await sessions.until(kernel, b"on")
    folder = sessions.io(kernel)
    await sessions.keepers.stop(folder, reason="user", text="first", grace_s=1000)
    await sessions.keepers.stop(folder, reason="timeout", text="second", grace_s=0.1)
    done = await sessions.outcome(kernel)

    assert (done.ended.reason, done.ended.text) == (Reason.USER, "first")


async def test_an_idle_session_can_be_stopped(sessions: Sessions, idle: KernelId) -> None:
    await sessions.keepers.stop(sessions.io(idle), reason="user", text="enough", grace_s=0.1)
    done = await sessions.outcome(idle)
    assert (done.ended.reason, done.ended.text) == (Reason.USER, "enough")


async def test_a_terminal_session_is_hung_up_on_when_stopped(sessions: Sessions) -> None:
    """An interactive shell ignores SIGTERM."""
    shell = ("/bin/bash", "--norc", "-i")
    kernel = await sessions.start(*shell, tty=True, stdin=True, env={"PS1": "ready>"})
    await sessions.until(kernel, b"ready>")
    await sessions.keepers.stop(sessions.io(kernel), reason="user", text="", grace_s=20)
    done = await sessions.outcome(kernel)
    assert done.ended.duration_s < 10


async def test_an_exec_id_runs_once(sessions: Sessions, idle: KernelId) -> None:
    asked = ExecSpec(argv=("/bin/sh", "-c", "echo once; sleep 1000"))
    first = await sessions.runtime.exec(idle, "e1", asked)
    await sessions.until(idle, b"once", "e1")
    again = await sessions.runtime.exec(idle, "e1", asked)
    assert again.at == first.at

    done = await sessions.exec(idle, "e2", "/bin/echo", "x")
    assert done.out == b"x\n"
    with pytest.raises(Conflict, match="before"):
        await sessions.runtime.exec(idle, "e2", asked)
    with pytest.raises(InvalidRequest):
        await sessions.runtime.exec(idle, "../e3", asked)


async def test_an_exec_is_over_though_a_background_process_holds_its_output(
    sessions: Sessions, idle: KernelId
) -> None:
    async with asyncio.timeout(PATIENCE_S):
        done = await sessions.exec(idle, "e", "/bin/sh", "-c", "sleep 1000 & echo done; exit 6")
    assert (done.out, done.code) == (b"done\n", 6)


async def test_a_signal_reaches_the_whole_group_of_one_program(
    sessions: Sessions, idle: KernelId
) -> None:
    script = "trap 'echo got; exit 9' USR1; echo on; sleep 1000 & while :; do wait; done"
    await sessions.runtime.exec(idle, "e", ExecSpec(argv=("/bin/bash", "-c", script)))
    await sessions.until(idle, b"on", "e")
    await sessions.keepers.signal(sessions.io(idle, "e"), signal.SIGUSR1)
    done = await sessions.outcome(idle, "e")
    assert (done.out, done.code) == (b"on\ngot\n", 9)


async def test_everything_written_before_the_end_is_kept(sessions: Sessions) -> None:
    """Both streams, at once, by a program that is gone before the keeper has read."""
    code = (
        "import os, threading\n"
        "def w(fd):\n"
        " for n in range(200): os.write(fd, b'%d' % fd * 5000)\n"
        "t = [threading.Thread(target=w, args=(n,)) for n in (1, 2)]\n"
        "[x.start() for x in t]; [x.join() for x in t]; os._exit(0)"
    )
    for _ in range(5):
        kernel = await sessions.start("python3", "-c", code)
        done = await sessions.outcome(kernel)
        assert (done.out, done.err) == (b"1" * 1_000_000, b"2" * 1_000_000)


async def test_a_socket_path_of_any_length_works(tmp_path: Path) -> None:
    runtime = ProcessRuntime(str(tmp_path / ("x" * 120) / ("y" * 120)))
    found = Sessions(runtime, await runtime.open(), keepers=SocketKeepers())
    done = await found.run("/bin/echo", "deep")
    await found.close()
    await runtime.close()
    assert done.out == b"deep\n"


async def test_nobody_answers_after_the_end(sessions: Sessions) -> None:
    kernel = KernelId(new_id(), 1)
    asked = spec("/bin/true")
    sessions.kernels.append(kernel)
    await sessions.runtime.prepare(kernel, asked)
    with pytest.raises(SessionNotRunning):
        await sessions.runtime.exec(kernel, "e", ExecSpec(argv=("true",)))
    await sessions.runtime.start(kernel, asked)
    await sessions.outcome(kernel)
    with pytest.raises(SessionNotRunning):
        await sessions.runtime.exec(kernel, "e", ExecSpec(argv=("true",)))
    assert read_output(sessions.io(kernel)) == (b"", b"")
