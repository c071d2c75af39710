"""Output and input over WebSockets and plain HTTP."""

from __future__ import annotations

import asyncio
import io
import json
import struct
from typing import Any

import aiohttp
import pytest

from madang.kit.link import MemoryStream
from madang.manager.app import ManagerSettings
from madang.testing.manager import ManagerBox, ScriptedAgent, manager_box
from madang.testing.patience import PATIENCE_S
from madang.wire.errors import FileMissing
from madang.wire.kernel import Assignment, KernelReport, KernelState
from madang.wire.link import (
    Attach,
    ExecStarted,
    FileEntry,
    FilesWritten,
    ListFiles,
    ReadFile,
    ReadLog,
    Resize,
    Signal,
    StartExec,
    StdinEnd,
    StreamRequest,
    WriteFile,
)
from madang.wire.log import HEADER, LogGap, LogRecord, Stream, unpack
from madang.wire.policy import Refusal
from madang.wire.session import Ended, Reason


async def start(box: ManagerBox, agent: ScriptedAgent, **fields: Any) -> Assignment:
    session = await box.call("POST", "/v1/sessions", {"argv": ["x"], **fields})
    assignment = await agent.assigned(session["id"])
    await agent.running(assignment)
    await box.until(session["id"], "RUNNING")
    return assignment


class Talk:
    """A client's end of the stream protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.output = b""
        self.offsets: list[int] = []
        self.messages: list[dict[str, Any]] = []

    async def say(self, **message: Any) -> None:
        await self.socket.send_str(json.dumps(message))

    async def next(self) -> dict[str, Any] | LogRecord | None:
        message = await self.socket.receive(timeout=PATIENCE_S)
        if message.type is aiohttp.WSMsgType.TEXT:
            found: dict[str, Any] = json.loads(message.data)
            self.messages.append(found)
            return found
        if message.type is aiohttp.WSMsgType.BINARY:
            (offset,) = struct.unpack_from("<Q", message.data)
            (record,) = unpack(message.data[8:], offset)[0]
            self.output += record.data
            self.offsets.append(offset)
            return record
        return None

    async def until(self, op: str, status: str | None = None) -> dict[str, Any]:
        while (found := await self.next()) is not None:
            if not isinstance(found, dict) or found["op"] != op:
                continue
            if status is None or found["session"]["status"] == status:
                return found
        raise AssertionError(f"closed without {op} {status}: {self.messages[-1:]}")

    async def rest(self) -> dict[str, Any]:
        while await self.next() is not None:
            pass
        return self.messages[-1]


async def test_run_is_one_conversation(either_box: ManagerBox) -> None:
    agent = await either_box.add_agent()
    async with either_box.http.ws_connect("/v1/run") as socket:
        talk = Talk(socket)
        await talk.say(op="run", spec={"argv": ["x"], "stdin": True, "tty": True}, key="k")
        first = await talk.until("session")
        assert first["session"]["status"] == "PENDING"
        assignment = await agent.assigned(first["session"]["id"])
        await socket.send_bytes(b"early ")  # waits for the program
        await agent.running(assignment)
        await talk.until("session", "RUNNING")
        agent.write(assignment.kernel, b"out\xff\x00")
        agent.write(assignment.kernel, b"err", Stream.STDERR)
        record = await talk.next()
        assert isinstance(record, LogRecord)
        assert record.data == b"out\xff\x00"
        await socket.send_bytes(b"late")
        await talk.say(op="resize", rows=50, cols=100)
        await talk.say(op="signal", signal=2)
        await talk.say(op="stdin_end")
        await agent_received(agent, assignment, 5)
        agent.write(assignment.kernel, b"last")
        await agent.ended(assignment, Ended(reason=Reason.EXIT, exit_code=7))
        end = await talk.rest()
    assert agent.received[assignment.kernel] == [
        b"early ", b"late", Resize(rows=50, cols=100), Signal(signal=2), StdinEnd(),
    ]  # fmt: skip
    assert end["op"] == "end"
    assert end["ended"]["exit_code"] == 7
    assert end["session"]["status"] == "TERMINATED"
    assert talk.output == b"out\xff\x00errlast"
    statuses = [m["session"]["status"] for m in talk.messages if m["op"] == "session"]
    assert statuses[0] == "PENDING"
    assert statuses[-1] == "TERMINATED"


async def test_output_waits_for_no_report_that_the_program_runs(box: ManagerBox) -> None:
    agent = await box.add_agent()
    async with box.http.ws_connect("/v1/run") as socket:
        talk = Talk(socket)
        await talk.say(op="run", spec={"argv": ["x"]})
        first = await talk.until("session")
        assignment = await agent.assigned(first["session"]["id"])
        agent.write(assignment.kernel, b"at once")
        while not talk.output:
            await talk.next()
        statuses = {m["session"]["status"] for m in talk.messages if m["op"] == "session"}
        assert statuses <= {"PENDING", "SCHEDULED"}
        await agent.ended(assignment, Ended(reason=Reason.EXIT, exit_code=0))
        assert (await talk.rest())["ended"]["exit_code"] == 0
    assert talk.output == b"at once"


async def agent_received(agent: ScriptedAgent, assignment: Assignment, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while len(agent.received.get(assignment.kernel, ())) < count:
            await asyncio.sleep(0.01)


async def test_refusals_come_with_the_output_where_they_happen(box: ManagerBox) -> None:
    agent = await box.add_agent()
    refusal = Refusal(at=1.0, layer="site", line=3, what="connect", object="10.0.0.5:5432")

    async def serve(request: StreamRequest, stream: MemoryStream) -> None:
        if isinstance(request, ReadLog):
            assert request.refusals
            await stream.send(LogRecord(0, 1, Stream.STDOUT, b"before"))
            await stream.send(refusal)
            await stream.send(Ended(reason=Reason.EXIT, exit_code=0))

    agent.serve = serve
    assignment = await start(box, agent)
    async with box.http.ws_connect(f"/v1/sessions/{assignment.kernel.session}/attach") as socket:
        talk = Talk(socket)
        await talk.say(op="attach")
        found = await talk.until("refused")
        assert talk.output == b"before"
    assert found["refusal"]["object"] == "10.0.0.5:5432"


async def test_a_client_that_goes_away_stops_nothing_and_comes_back(box: ManagerBox) -> None:
    agent = await box.add_agent()
    async with box.http.ws_connect("/v1/run") as socket:
        talk = Talk(socket)
        await talk.say(op="run", spec={"argv": ["x"]})
        session = (await talk.until("session"))["session"]
        assignment = await agent.assigned(session["id"])
        await agent.running(assignment)
        agent.write(assignment.kernel, b"one")
        while not talk.output:
            await talk.next()
        place = talk.offsets[-1] + HEADER.size + 3
    agent.write(assignment.kernel, b"two")
    assert (await box.call("GET", f"/v1/sessions/{session['id']}"))["status"] == "RUNNING"
    async with box.http.ws_connect(f"/v1/sessions/{session['id']}/attach") as socket:
        talk = Talk(socket)
        await talk.say(op="attach", offset=place)
        await talk.until("session", "RUNNING")
        agent.write(assignment.kernel, b"three")
        await agent.ended(assignment)
        await talk.rest()
    assert talk.output == b"twothree"


async def test_output_goes_on_at_the_same_place_after_a_broken_link(box: ManagerBox) -> None:
    agent = await box.add_agent()
    assignment = await start(box, agent)
    async with box.http.ws_connect(f"/v1/sessions/{assignment.kernel.session}/attach") as socket:
        talk = Talk(socket)
        await talk.say(op="attach", offset=0)
        agent.write(assignment.kernel, b"before ")
        while not talk.output:
            await talk.next()
        await agent.disconnect()
        agent.write(assignment.kernel, b"between ")
        report = KernelReport(
            kernel=assignment.kernel, nonce=assignment.nonce, state=KernelState.RUNNING
        )
        box.connect(agent, (report,))
        agent.write(assignment.kernel, b"after")
        while not talk.output.endswith(b"after"):
            await talk.next()
        await agent.ended(assignment)
        await talk.rest()
    assert talk.output == b"before between after"


async def test_a_session_stopped_while_it_waits_ends_the_conversation(box: ManagerBox) -> None:
    async with box.http.ws_connect("/v1/run") as socket:
        talk = Talk(socket)
        await talk.say(op="run", spec={"argv": ["x"]})
        session = (await talk.until("session"))["session"]
        await box.call("POST", f"/v1/sessions/{session['id']}/stop", {})
        end = await talk.rest()
    assert end["op"] == "end"
    assert end["ended"]["reason"] == "user"


async def test_a_removed_session_ends_the_conversation_with_an_error(box: ManagerBox) -> None:
    agent = await box.add_agent()
    assignment = await start(box, agent)
    ref = assignment.kernel.session
    async with box.http.ws_connect(f"/v1/sessions/{ref}/attach") as socket:
        talk = Talk(socket)
        await talk.say(op="attach")
        await talk.until("session")
        await box.call("DELETE", f"/v1/sessions/{ref}?force=1")
        end = await talk.rest()
    assert end["op"] in {"error", "end"}


async def test_a_stopping_server_tells_its_streams(sqlite_url: str) -> None:
    async with manager_box(ManagerSettings(database_url=sqlite_url)) as box:
        async with box.http.ws_connect("/v1/run") as socket:
            talk = Talk(socket)
            await talk.say(op="run", spec={"argv": ["x"]})
            await talk.until("session")
            box.manager.feed.release()
            end = await talk.rest()
    assert end["op"] == "error"
    assert end["error"]["code"] == "server.stopping"


@pytest.mark.parametrize(
    "message",
    [
        '{"op":"attach"}',
        '{"op":"run"}',
        '{"op":"fly"}',
        "no json",
        '{"op":"run","spec":{"argv":["a\\u0000b"]}}',
        '{"op":"run","spec":{"argv":["x"],"image":"missing"}}',
        '{"op":"run","spec":{"argv":["x"],"size":{"cpu":1e30}}}',
        b"binary",
    ],
)
async def test_bad_first_messages_are_answered_in_words(
    box: ManagerBox, message: str | bytes
) -> None:
    async with box.http.ws_connect("/v1/run") as socket:
        talk = Talk(socket)
        if isinstance(message, bytes):
            await socket.send_bytes(message)
        else:
            await socket.send_str(message)
        end = await talk.rest()
    assert end["op"] == "error"
    assert end["error"]["detail"]
    assert end["error"]["request_id"]


async def test_bad_messages_later_end_the_conversation_not_the_session(box: ManagerBox) -> None:
    agent = await box.add_agent()
    assignment = await start(box, agent)
    ref = assignment.kernel.session
    for message in ('{"op":"run"}', '{"op":"resize","rows":0,"cols":5}', '{"op":"signal"}', "{"):
        async with box.http.ws_connect(f"/v1/sessions/{ref}/attach") as socket:
            talk = Talk(socket)
            await talk.say(op="attach")
            await talk.until("session")
            await socket.send_str(message)
            end = await talk.rest()
        assert end["op"] == "error", message
    assert (await box.call("GET", f"/v1/sessions/{ref}"))["status"] == "RUNNING"


async def test_plain_requests_to_a_websocket_are_told(box: ManagerBox) -> None:
    problem = await box.call("GET", "/v1/run", status=400)
    assert "WebSocket" in problem["detail"]


async def test_exec_runs_one_more_program(box: ManagerBox) -> None:
    agent = await box.add_agent()
    assignment = await start(box, agent)

    async def serve(request: StreamRequest, stream: MemoryStream) -> None:
        if isinstance(request, StartExec):
            assert request.spec.argv == ("ls", "-l")
            await stream.send(ExecStarted(exec_id="e1"))
        elif isinstance(request, ReadLog) and request.exec_id == "e1":
            await stream.send(LogRecord(0, 1, Stream.STDOUT, b"files"))
            await stream.send(LogGap(21, 40))
            await stream.send(Ended(reason=Reason.EXIT, exit_code=4))

    agent.serve = serve
    async with box.http.ws_connect(f"/v1/sessions/{assignment.kernel.session}/exec") as socket:
        talk = Talk(socket)
        await talk.say(op="exec", exec={"argv": ["ls", "-l"]})
        end = await talk.rest()
    assert talk.output == b"files"
    assert [m["op"] for m in talk.messages] == ["exec", "gap", "end"]
    assert end["ended"]["exit_code"] == 4
    assert end["exec_id"] == "e1"


async def test_exec_needs_a_running_session(box: ManagerBox) -> None:
    session = await box.call("POST", "/v1/sessions", {"argv": ["x"]})
    problem = await box.call("GET", f"/v1/sessions/{session['id']}/exec", status=409)
    assert problem["code"] == "session.not_running"


async def test_a_slow_reader_holds_up_nobody_and_fills_no_memory(box: ManagerBox) -> None:
    agent = await box.add_agent()
    assignment = await start(box, agent)
    chunk = b"x" * 65536
    sent = 0

    async def serve(request: StreamRequest, stream: MemoryStream) -> None:
        nonlocal sent
        if isinstance(request, ReadLog):
            for number in range(4000):
                await stream.send(LogRecord(number * (65536 + 16), 1, Stream.STDOUT, chunk))
                sent += 1
        elif isinstance(request, Attach):
            async for _ in stream:
                pass

    agent.serve = serve
    ref = assignment.kernel.session
    async with box.http.ws_connect(f"/v1/sessions/{ref}/attach", max_msg_size=0) as socket:
        await socket.send_str('{"op":"attach"}')
        before = -1
        while not sent or sent != before:  # what fits in between is sent
            before = sent
            await asyncio.sleep(0.5)
        assert sent < 1000
        assert (await box.call("GET", f"/v1/sessions/{ref}"))["status"] == "RUNNING"


async def test_logs_as_bytes_frames_and_single_streams(either_box: ManagerBox) -> None:
    agent = await either_box.add_agent()
    assignment = await start(either_box, agent)
    path = f"/v1/sessions/{assignment.kernel.session}/logs"
    agent.write(assignment.kernel, b"out\xff")
    agent.write(assignment.kernel, b"err", Stream.STDERR)
    assert await either_box.call("GET", path) == b"out\xfferr"
    assert await either_box.call("GET", f"{path}?stream=stderr") == b"err"
    frames = await either_box.call("GET", f"{path}?format=frames")
    (offset,) = struct.unpack_from("<Q", frames)
    records, _ = unpack(frames[8 : 8 + HEADER.size + 4], offset)
    assert records[0].data == b"out\xff"
    await agent.ended(assignment, log_end=39)
    await either_box.until(assignment.kernel.session, "TERMINATED")
    async with either_box.http.get(path) as response:
        assert await response.read() == b"out\xfferr"
        assert response.headers["Madang-Log-End"] == "39"


async def test_followed_logs_come_live_and_end_with_the_program(box: ManagerBox) -> None:
    agent = await box.add_agent()
    session = await box.call("POST", "/v1/sessions", {"argv": ["x"]})
    async with box.http.get(f"/v1/sessions/{session['id']}/logs?follow=1") as response:
        assignment = await agent.assigned(session["id"])
        await agent.running(assignment)
        agent.write(assignment.kernel, b"one")
        assert await response.content.readexactly(3) == b"one"
        agent.write(assignment.kernel, b"two")
        assert await response.content.readexactly(3) == b"two"
        await agent.ended(assignment)
        assert await response.content.read() == b""


async def test_logs_of_a_session_that_never_ran_are_gone(box: ManagerBox) -> None:
    session = await box.call("POST", "/v1/sessions", {"argv": ["x"]})
    assert await box.call("GET", f"/v1/sessions/{session['id']}/logs") == b""
    await box.call("POST", f"/v1/sessions/{session['id']}/stop", {})
    problem = await box.call("GET", f"/v1/sessions/{session['id']}/logs", status=410)
    assert problem["code"] == "log.gone"


async def test_files_go_both_ways_in_a_stream(box: ManagerBox) -> None:
    agent = await box.add_agent()
    assignment = await start(box, agent)
    content = bytes(range(256)) * 1000
    written: list[bytes] = []

    async def serve(request: StreamRequest, stream: MemoryStream) -> None:
        entry = FileEntry(
            path="f", kind="file", size_bytes=len(content), mode=0o640, modified_at=1.0
        )
        if isinstance(request, ListFiles):
            await stream.send(entry)
        elif isinstance(request, ReadFile):
            if request.path != "/work/f":
                raise FileMissing(f"no {request.path}")
            await stream.send(entry)
            stop = None if request.length is None else request.start + request.length
            await stream.send(content[request.start : stop])
        elif isinstance(request, WriteFile):
            async for item in stream:
                assert isinstance(item, bytes)
                written.append(item)
            await stream.send(FilesWritten(files=1, bytes=sum(map(len, written))))

    agent.serve = serve
    base = f"/v1/sessions/{assignment.kernel.session}"
    listed = await box.call("GET", f"{base}/files?path=/work")
    assert listed[0]["size_bytes"] == len(content)
    assert await box.call("GET", f"{base}/file?path=/work/f") == content
    for header, expected, shown in (
        ("bytes=10-19", content[10:20], "bytes 10-19/256000"),
        ("bytes=255990-", content[-10:], "bytes 255990-255999/256000"),
        ("bytes=-5", content[-5:], "bytes 255995-255999/256000"),
    ):
        headers = {"Range": header}
        async with box.http.get(f"{base}/file?path=/work/f", headers=headers) as response:
            assert response.status == 206
            assert await response.read() == expected
            assert response.headers["Content-Range"] == shown
    headers = {"Range": "bytes=999999-"}
    await box.call("GET", f"{base}/file?path=/work/f", headers=headers, status=416)
    problem = await box.call("GET", f"{base}/file?path=/work/none", status=404)
    assert problem["code"] == "file.missing"
    big = b"y" * 3_000_000
    answer = await box.call("PUT", f"{base}/file?path=/work/g", data=io.BytesIO(big))
    assert answer == {"files": 1, "bytes": len(big)}
    assert b"".join(written) == big


async def test_an_upload_that_the_machine_refuses_is_answered_at_once(box: ManagerBox) -> None:
    agent = await box.add_agent()
    assignment = await start(box, agent)

    async def serve(request: StreamRequest, stream: MemoryStream) -> None:
        raise FileMissing("no such folder")

    agent.serve = serve
    path = f"/v1/sessions/{assignment.kernel.session}/file?path=/nope/f"
    problem = await box.call("PUT", path, data=io.BytesIO(b"x" * 2_000_000), status=404)
    assert problem["detail"] == "no such folder"


async def test_signals_go_to_running_sessions_only(box: ManagerBox) -> None:
    agent = await box.add_agent()
    assignment = await start(box, agent)
    path = f"/v1/sessions/{assignment.kernel.session}/signal"
    await box.call("POST", path, {"signal": 10}, status=204)
    await box.call("POST", path, {"signal": 99}, status=400)
    await agent.ended(assignment)
    await box.until(assignment.kernel.session, "TERMINATED")
    await box.call("POST", path, {"signal": 10}, status=409)


async def test_a_machine_that_is_away_is_said(box: ManagerBox) -> None:
    agent = await box.add_agent()
    assignment = await start(box, agent)
    await agent.disconnect()
    async with asyncio.timeout(PATIENCE_S):
        while box.manager.fleet.online():
            await asyncio.sleep(0.01)
    path = f"/v1/sessions/{assignment.kernel.session}/files?path=/work"
    problem = await box.call("GET", path, status=503)
    assert problem["code"] == "node.unavailable"


async def test_events_are_streamed_and_continued(either_box: ManagerBox) -> None:
    box = either_box
    async with box.http.get("/v1/events") as response:
        assert (await response.content.readline()).startswith(b": connected")
        session = await box.call("POST", "/v1/sessions", {"argv": ["x"]})
        event = await next_event(response)
        assert event["kind"] == "session.moved"
        assert event["object"] == session["id"]
    await box.call("POST", f"/v1/sessions/{session['id']}/stop", {})
    headers = {"Last-Event-ID": str(event["id"])}
    async with box.http.get("/v1/events", headers=headers) as response:
        while event["payload"].get("target") != "TERMINATED":
            event = await next_event(response)


async def next_event(response: aiohttp.ClientResponse) -> dict[str, Any]:
    while True:
        line = await asyncio.wait_for(response.content.readline(), PATIENCE_S)
        assert line, "the stream ended"
        if line.startswith(b"data: "):
            found: dict[str, Any] = json.loads(line[6:])
            return found
