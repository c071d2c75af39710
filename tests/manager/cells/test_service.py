"""The service over HTTP with an agent that plays a driver as the test says."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from madang.kit.link import MemoryStream
from madang.manager.app import ManagerSettings
from madang.manager.cells.types import CellSettings
from madang.testing.manager import ManagerBox, Output, ScriptedAgent, manager_box
from madang.wire.errors import LogGone
from madang.wire.kernel import KernelReport, KernelState
from madang.wire.link import Attach, ExecStarted, ReadLog, SendSignal, StartExec, StreamRequest
from madang.wire.log import LogRecord, Stream
from madang.wire.session import Ended, Reason


class Played:
    """Programs of execs: what they are told, and what they say."""

    def __init__(self, agent: ScriptedAgent) -> None:
        self.outputs: dict[str, Output] = {}
        self.nonces: dict[str, str] = {}
        self.told: dict[str, bytes] = {}
        self.signals: list[tuple[str, int]] = []
        self.changed = asyncio.Event()
        self._agent = agent
        agent.serve = self._serve

    @property
    def newest(self) -> str:
        return list(self.outputs)[-1]

    def say(self, kind: str, id_: str = "-", arg: str = "-", payload: str = "") -> None:
        exec_id = self.newest
        stream = Stream.STDERR if kind == "fence" else Stream.STDOUT
        size = len(payload.encode())
        self.write(f"\x1e{self.nonces[exec_id]} {kind} {id_} {arg} {size}\n{payload}\n", stream)

    def write(self, text: str, stream: Stream = Stream.STDOUT) -> None:
        output = self.outputs[self.newest]
        offset = output.records[-1].end if output.records else 0
        output.records.append(LogRecord(offset, 1_000_000, stream, text.encode()))
        output.notify()

    def end(self, code: int = 1) -> None:
        output = self.outputs[self.newest]
        output.ended = Ended(reason=Reason.EXIT, exit_code=code)
        output.notify()

    async def hears(self, wanted: bytes) -> None:
        async with asyncio.timeout(10):
            while wanted not in self.told.get(self.newest, b""):
                self.changed.clear()
                await self.changed.wait()

    async def _serve(self, request: StreamRequest, stream: MemoryStream) -> None:
        match request:
            case StartExec(spec=spec):
                exec_id = f"x{len(self.outputs)}"
                self.outputs[exec_id] = Output()
                found = re.search("MADANG_NONCE=([0-9a-f]+)", spec.argv[2])
                assert found is not None
                self.nonces[exec_id] = found[1]
                await stream.send(ExecStarted(exec_id=exec_id))
            case ReadLog(exec_id=str(exec_id)):
                await self._read(request, exec_id, stream)
            case Attach(exec_id=str(exec_id)):
                async for item in stream:
                    assert isinstance(item, bytes)
                    self.told[exec_id] = self.told.get(exec_id, b"") + item
                    self.changed.set()
            case SendSignal(exec_id=str(exec_id), signal=number):
                self.signals.append((exec_id, number))
                if number in {9, 15}:
                    self.end(143)
            case _:
                await self._agent._serve(request, stream)

    async def _read(self, request: ReadLog, exec_id: str, stream: MemoryStream) -> None:
        if exec_id not in self.outputs:
            raise LogGone("no such exec")
        output, at = self.outputs[exec_id], request.offset
        while True:
            changed = output.changed
            for record in [each for each in output.records if each.offset >= at]:
                await stream.send(record)
                at = record.end
            if not request.follow:
                return
            if output.ended is not None:
                await stream.send(output.ended)
                return
            await changed.wait()


@pytest.fixture
async def small_box(sqlite_url: str) -> AsyncIterator[ManagerBox]:
    cells = CellSettings(interpreters=2, waiting=3, code_bytes=100, busy_s=0.2, stop_s=0.05)
    async with manager_box(ManagerSettings(database_url=sqlite_url, cells=cells)) as box:
        yield box


async def running(box: ManagerBox) -> tuple[Played, str]:
    """A playing agent, and the path of a running session."""
    agent = await box.add_agent()
    made = await box.call("POST", "/v1/sessions", {"argv": ["true"]})
    assignment = await agent.assigned(made["id"])
    await agent.running(assignment)
    await box.until(made["id"], "RUNNING")
    return Played(agent), f"/v1/sessions/{made['id']}"


async def idle(box: ManagerBox) -> tuple[Played, str]:
    """With the path of an interpreter that waits for cells."""
    played, session = await running(box)
    made = await box.call("POST", session + "/interpreters", {})
    assert made["status"] == "STARTING"
    played.say("ready", payload="3.11")
    return played, f"{session}/interpreters/{made['id']}"


async def status_of(box: ManagerBox, path: str, wanted: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while (found := await box.call("GET", path))["status"] != wanted:
            await asyncio.sleep(0.01)
    assert isinstance(found, dict)
    return found


async def test_cells_are_given_one_at_a_time_and_bounded(small_box: ManagerBox) -> None:
    played, path = await idle(small_box)
    for name in ("a", "b", "c", "d"):
        await small_box.call("POST", path + "/cells", {"code": name, "id": name})
        await played.hears(b"run a 1\na")
        played.say("begin", "a")
        await status_of(small_box, path, "BUSY")
    body = {"code": "e", "id": "e"}
    refused = await small_box.call("POST", path + "/cells", body, status=409)
    assert refused["code"] == "interpreter.busy"
    assert b"run b" not in played.told[played.newest]
    played.say("fence", "a")
    played.say("done", "a", "ok")
    await played.hears(b"run b 1\nb")
    assert b"run c" not in played.told[played.newest]
    found = await small_box.call("GET", path + "/cells/a")
    assert (found["status"], found["count"]) == ("ok", 1)
    assert [e["kind"] for e in found["events"]][-1] == "done"


async def test_what_makes_no_sense_is_refused(small_box: ManagerBox) -> None:
    played, path = await idle(small_box)
    session = path.rpartition("/interpreters")[0]
    for body in (
        {"code": "x" * 101},
        {"code": "a\0b"},
        {"code": "a", "id": "../x"},
        {"code": "a", "id": "x" * 65},
        {"codes": "a"},
    ):
        await small_box.call("POST", path + "/cells", body, status=400)
    requests: tuple[dict[str, Any], ...] = (
        {"name": "../x"},
        {"name": "-x"},
        {"env": {"A=B": "1"}},
        {"cwd": "/\0"},
    )
    for request in requests:
        await small_box.call("POST", session + "/interpreters", request, status=400)
    await small_box.call("POST", session + "/interpreters", {"language": "klingon"}, status=404)
    await small_box.call("POST", path + "/complete", {"code": "a", "cursor": 2}, status=400)
    await small_box.call("POST", path + "/input", {"text": "a"}, status=409)
    assert list(played.outputs) == ["x0"]
    await small_box.call("POST", session + "/interpreters", {"name": "two"})
    full = await small_box.call("POST", session + "/interpreters", {}, status=409)
    assert "2 interpreters" in full["detail"]


async def test_a_question_waits_for_the_cell_but_not_for_ever(small_box: ManagerBox) -> None:
    played, path = await idle(small_box)
    await small_box.call("POST", path + "/cells", {"code": "a", "id": "a"})
    await played.hears(b"run a")
    played.say("begin", "a")
    busy = await small_box.call("POST", path + "/complete", {"code": "p"}, status=409)
    assert busy["code"] == "interpreter.busy"
    played.say("fence", "a")
    played.say("done", "a", "ok")
    await status_of(small_box, path, "IDLE")
    asked = asyncio.create_task(small_box.call("POST", path + "/complete", {"code": "pri"}))
    await played.hears(b"complete ")
    found = re.search(rb"complete (\S+) 5\n3\npri", played.told[played.newest])
    assert found is not None
    played.say("completions", found[1].decode(), "0,3", "print")
    assert await asked == {"matches": ["print"], "start": 0, "end": 3}


async def test_a_cell_without_input_is_told_that_nobody_answers(small_box: ManagerBox) -> None:
    played, path = await idle(small_box)
    await small_box.call("POST", path + "/cells", {"code": "a", "id": "a", "stdin": False})
    await played.hears(b"run a")
    played.say("begin", "a")
    played.say("input", "a", "prompt", "who? ")
    await played.hears(b"eof a 0\n")
    await small_box.call("POST", path + "/input", {"text": "me"}, status=409)


async def test_a_restart_aborts_what_waits_and_keeps_the_id(small_box: ManagerBox) -> None:
    played, path = await idle(small_box)
    for name in ("a", "b"):
        await small_box.call("POST", path + "/cells", {"code": name, "id": name})
    await played.hears(b"run a")
    played.say("begin", "a")
    await status_of(small_box, path, "BUSY")
    again = await small_box.call("POST", path + "/restart")
    assert (again["restarts"], again["status"]) == (1, "STARTING")
    assert played.signals == [("x0", 15)]
    assert played.newest == "x1"
    for name in ("a", "b"):
        assert (await small_box.call("GET", f"{path}/cells/{name}"))["status"] == "aborted"
    played.say("ready", payload="3.12")
    await status_of(small_box, path, "IDLE")
    await small_box.call("POST", path + "/cells", {"code": "c", "id": "c"})
    await played.hears(b"run c 1\nc")


async def test_a_program_that_ends_is_told_with_its_last_words(small_box: ManagerBox) -> None:
    played, session = await running(small_box)
    made = await small_box.call("POST", session + "/interpreters", {})
    path = f"{session}/interpreters/{made['id']}"
    played.write("sh: python3: not found\n", Stream.STDERR)
    played.end(127)
    ended = await status_of(small_box, path, "ENDED")
    assert "127" in ended["ended"]
    assert "python3: not found" in ended["ended"]
    refused = await small_box.call("POST", path + "/cells", {"code": "1"}, status=409)
    assert refused["code"] == "interpreter.ended"
    again = await small_box.call("POST", path + "/restart")
    assert again["status"] == "STARTING"


async def test_a_driver_that_never_fences_is_taken_at_its_word(small_box: ManagerBox) -> None:
    played, path = await idle(small_box)
    await small_box.call("POST", path + "/cells", {"code": "a", "id": "a"})
    await played.hears(b"run a")
    played.say("begin", "a")
    played.say("done", "a", "ok")
    async with asyncio.timeout(30):
        while (await small_box.call("GET", path + "/cells/a"))["status"] != "ok":
            small_box.manager._cell_keeper.wake()
            await asyncio.sleep(0.05)


async def test_a_new_server_knows_what_runs_and_gives_what_waits(sqlite_url: str) -> None:
    settings = ManagerSettings(database_url=sqlite_url)
    async with manager_box(settings) as box:
        played, path = await idle(box)
        for name in ("a", "b", "c"):
            await box.call("POST", path + "/cells", {"code": name, "id": name})
        await played.hears(b"run a")
        played.say("begin", "a")
        await status_of(box, path, "BUSY")
        before = await box.call("GET", path)
        agent = played._agent
        await box.stop_links()
    played.say("fence", "a")
    played.say("done", "a", "ok")
    played.told.clear()
    inventory = tuple(
        KernelReport(kernel=kernel, nonce=each.nonce, state=KernelState.RUNNING, started_at=1.0)
        for kernel, each in agent.wanted.items()
    )
    async with manager_box(settings) as box:
        told = len(agent.messages)
        box.connect(agent, inventory)
        await agent.until(lambda: len(agent.messages) > told)
        await played.hears(b"run b 1\nb")
        played.say("begin", "b")
        await status_of(box, path, "BUSY")
        after = await box.call("GET", path)
        assert after["id"] == before["id"]
        assert after["events"] > before["events"]
        assert b"run a" not in played.told[played.newest], "it has run"
        assert (await box.call("GET", path + "/cells/a"))["status"] == "ok"
        same = await box.call("POST", path + "/cells", {"code": "a", "id": "a"})
        assert same["status"] == "ok"
