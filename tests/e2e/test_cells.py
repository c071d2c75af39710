"""Cells on a real platform: Python's driver in real sessions, through the client."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from madang.client import AsyncClient, Cells, Client, cellcalls
from madang.client.cellstory import text_of
from madang.testing.platform import Platform, start
from madang.wire.cells import (
    Cell,
    CellEvent,
    CellRequest,
    CellStatus,
    EventKind,
    InterpreterRequest,
    InterpreterStatus,
)
from madang.wire.errors import Conflict, InterpreterEnded, PlatformError, ServerUnreachable
from madang.wire.session import Session, SessionSpec, SessionStatus, SizeRequest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sessions of several users"),
]
PATIENCE_S = 30.0


@pytest.fixture
def session(client: Client) -> Session:
    size = SizeRequest(cpu=0.5, mem_bytes=256 << 20)
    made = client.create_session(SessionSpec(size=size))
    return client.wait_session(made.id, until=[SessionStatus.RUNNING], timeout_s=PATIENCE_S)


@pytest.fixture
def cells(client: Client, session: Session) -> Iterator[Cells]:
    with client.cells(session.id) as cells:
        yield cells


def result(cell: Cell) -> object:
    found = [event.data for event in cell.events if event.kind is EventKind.RESULT]
    return found[0]["text/plain"] if found else None


def test_cells_have_state_output_and_errors_with_their_line(cells: Cells) -> None:
    assert result(cells.run("x = 20\nx + 1")) == "21"
    said = cells.run("import sys\nprint('hä', x)\nprint('oh', file=sys.stderr)")
    assert text_of(said) == "hä 20\n"
    wrong = cells.run("y = 1\n1/0")
    assert wrong.status is CellStatus.ERROR
    assert wrong.error is not None
    assert (wrong.error.name, wrong.error.line) == ("ZeroDivisionError", 2)
    assert wrong.count == 3
    assert wrong.mem_bytes and wrong.mem_bytes > 1 << 20


def test_input_is_answered_and_completions_come(cells: Cells) -> None:
    asked: list[tuple[str, bool]] = []

    def answer(prompt: str, hidden: bool) -> str:
        asked.append((prompt, hidden))
        return "ädä"

    cell = cells.run(
        "import getpass\nwho = input('who? ') + getpass.getpass('pin: ')\nwho", answer=answer
    )
    assert result(cell) == "'ädäädä'"
    assert asked == [("who? ", False), ("pin: ", True)]
    assert cells.run("input()").error is not None, "nobody answers"
    assert "who" in cells.complete("wh").matches
    assert "prompt" in cells.inspect("getpass.getpass").data["text/plain"]
    with pytest.raises(Conflict):
        cells.input("nobody asked")


def test_interrupt_and_restart_leave_the_session(client: Client, session: Session) -> None:
    with client.cells(session.id) as cells:
        cells.run("kept = 1")
        cell = cells.execute("print('go', flush=True)\nwhile True: pass")
        waiting = cells.execute("kept + 1")
        until(cells, lambda e: e.kind is EventKind.STREAM and e.cell == cell)
        cells.interrupt()
        done = until(cells, lambda e: e.kind is EventKind.DONE and e.cell == cell)
        assert done.status is CellStatus.ERROR
        dropped = until(cells, lambda e: e.kind is EventKind.DONE and e.cell == waiting)
        assert dropped.status is CellStatus.ABORTED
        assert result(cells.run("kept")) == "1"

        stubborn = "import signal\nsignal.signal(2, signal.SIG_IGN)\nprint('go', flush=True)\n"
        cell = cells.execute(stubborn + "while True: pass")
        until(cells, lambda e: e.kind is EventKind.STREAM and e.cell == cell)
        cells.interrupt()
        remark = until(cells, lambda e: e.kind is EventKind.STATUS and "restart" in e.text)
        assert remark.name == "BUSY"
        cells.restart()
        done = until(cells, lambda e: e.kind is EventKind.DONE and e.cell == cell)
        assert done.status is CellStatus.ABORTED
        lost = cells.run("kept")
        assert lost.error is not None
        assert lost.error.name == "NameError"
        assert lost.count == 1
        seen = client.call(cellcalls.interpreter(session.id, "python"))
        assert (seen.restarts, seen.status) == (1, InterpreterStatus.IDLE)
    assert client.get_session(session.id).status is SessionStatus.RUNNING


def test_two_clients_hear_the_same_and_a_late_one_all(client: Client, session: Session) -> None:
    with client.cells(session.id, after=0) as one, client.cells(session.id, after=0) as two:
        assert one.interpreter.id == two.interpreter.id
        cell = one.execute("x = input('who? ')\nprint(x)")
        until(two, lambda e: e.kind is EventKind.INPUT)
        two.input("two")
        until(one, lambda e: e.kind is EventKind.DONE and e.cell == cell)
        with client.cells(session.id, after=0) as late:
            told = [e for e in upto(late, cell) if e.kind is not EventKind.STATUS or e.text == ""]
        assert [e.kind for e in told if e.cell == cell] == [
            EventKind.ACCEPTED,
            EventKind.RUNNING,
            EventKind.STATUS,
            EventKind.INPUT,
            EventKind.ANSWERED,
            EventKind.STREAM,
            EventKind.DONE,
        ]
    again = client.call(cellcalls.cell(session.id, "python", cell, 0))
    assert again.status is CellStatus.OK
    assert text_of(again) == "two\n"


def test_the_same_cell_runs_once_and_history_has_it(client: Client, session: Session) -> None:
    client.call(cellcalls.start(session.id, InterpreterRequest(name="mine")))
    request = CellRequest(code="import os\nprint('ran')", id="c-1")
    for _ in range(3):
        cell = client.call(cellcalls.execute(session.id, "mine", request, 20.0))
        assert cell.status is CellStatus.OK
        assert text_of(cell) == "ran\n"
    with pytest.raises(Conflict):
        other = CellRequest(code="2", id="c-1")
        client.call(cellcalls.execute(session.id, "mine", other, 0.0))
    client.call(cellcalls.execute(session.id, "mine", CellRequest(code="1/0", silent=True), 20.0))
    [kept] = client.call(cellcalls.history(session.id, "mine", limit=10, before=None))
    assert (kept.id, kept.code, kept.status, kept.count) == ("c-1", request.code, CellStatus.OK, 1)
    assert kept.took_s is not None


def test_the_end_of_program_or_session_is_told(client: Client, session: Session) -> None:
    with client.cells(session.id) as cells:
        cells.execute("import os\nos._exit(7)")
        ended = until(cells, lambda e: e.kind is EventKind.STATUS and e.name == "ENDED")
        assert "7" in ended.text
        with pytest.raises(InterpreterEnded):
            cells.run("1")
    with pytest.raises(InterpreterEnded):
        client.call(cellcalls.execute(session.id, "python", CellRequest(code="1"), 0.0))
    with client.cells(session.id) as cells:
        assert result(cells.run("2")) == "2"
        client.stop(session.id, grace_s=0)
        ended = until(cells, lambda e: e.kind is EventKind.STATUS and e.name == "ENDED")
        assert ended.text
    client.wait_session(session.id, timeout_s=PATIENCE_S)
    found = client.call(cellcalls.interpreters(session.id))
    assert [each.status for each in found] == [InterpreterStatus.ENDED] * 2
    assert client.call(cellcalls.interpreters(None)) == []


async def test_asyncio_programs_have_the_same(platform: Platform, session: Session) -> None:
    async with AsyncClient(platform.url, platform.token) as client:
        cells = await client.cells(session.id, after=0)
        async with cells:

            async def answer(prompt: str, hidden: bool) -> str:
                assert (prompt, hidden) == ("who? ", False)
                return "ada"

            cell = await cells.run("who = input('who? ')\nwho + '!'", answer=answer)
            assert result(cell) == "'ada!'"
            assert (await cells.complete("wh")).matches[0].startswith("wh")
            assert not (await cells.inspect("nothing_of_it")).found
            many = await asyncio.gather(*(cells.run(f"{n} * 2") for n in range(5)))
            assert [result(each) for each in many] == [str(n * 2) for n in range(5)]
            long = await cells.execute("print('go', flush=True)\nwhile True: pass")
            async for event in cells:
                if event.kind is EventKind.STREAM:
                    await cells.interrupt()
                if event.kind is EventKind.DONE and event.cell == long:
                    break
            with pytest.raises(Conflict):
                await cells.input("nobody asked")
            await cells.restart()
            lost = await cells.run("who")
            assert lost.error is not None


def test_what_is_not_there_is_said_in_words(client: Client, session: Session) -> None:
    with pytest.raises(PlatformError, match="no language"):
        client.call(cellcalls.start(session.id, InterpreterRequest(language="klingon")))
    request = InterpreterRequest(env={"PATH": "/nowhere"})
    made = client.call(cellcalls.start(session.id, request))
    with client.cells(session.id, name=made.name, after=0) as cells:
        ended = until(cells, lambda e: e.kind is EventKind.STATUS and e.name == "ENDED")
    assert "Python is not in this image" in ended.text


def test_lots_of_output_is_kept_and_told_again(client: Client, session: Session) -> None:
    with client.cells(session.id, after=0) as cells:
        lines = 200_000
        cell = cells.run(f"for n in range({lines}): print(n)")
        said = text_of(cell)
        assert said == "".join(f"{n}\n" for n in range(lines))
        with client.cells(session.id, after=0) as late:
            told = "".join(e.text for e in upto(late, cell.id) if e.kind is EventKind.STREAM)
        assert told == said, "memory holds less than that; the log is read again"


def test_hostile_frames_hurt_their_own_session_alone(client: Client, session: Session) -> None:
    forge = (
        "import gc, os, sys\n"
        "pipes = next(o for o in gc.get_objects() if type(o).__name__ == 'Pipes')\n"
        "def frame(text): os.write(1, pipes.mark + text)\n"
        "frame(b'done nobody ok 3\\nabc\\n')\n"
        "frame(b'error x 99999999999999999999 2\\n\\xff\\xfe\\n')\n"
        "frame(b'display x ../../etc;display=' + b'y' * 900 + b' 1\\nz\\n')\n"
        "frame(b'part x application/json 20000\\n' + b'[' * 20000 + b'\\n')\n"
        "frame(b'display x image/png 999999999999\\n')\n"
        "os.write(1, b'x' * 100000)\n"
    )
    with client.cells(session.id) as cells:
        cells.execute(forge)
        cells.pump(timeout_s=2)
        cells.restart()
        assert result(cells.run("1 + 1")) == "2"


def test_kill_of_server_and_launcher_loses_nothing(tmp_path: Path) -> None:
    with start(tmp_path, environment={"MADANG_NODE_CPU_OVERCOMMIT": "50"}) as platform:
        with platform.client() as client:
            size = SizeRequest(cpu=0.5, mem_bytes=256 << 20)
            session = client.create_session(SessionSpec(size=size))
            client.wait_session(session.id, until=[SessionStatus.RUNNING], timeout_s=PATIENCE_S)
            with client.cells(session.id, after=0) as cells:
                cells.run("kept = 'kept'\nimport time")
                slow = cells.execute("for n in range(40): print(n, flush=True); time.sleep(0.05)")
                behind = cells.execute("kept")
                until(cells, lambda e: e.kind is EventKind.STREAM and e.cell == slow)
                platform.kill("server")
                told = upto(cells, behind)
                seqs = [event.seq for event in told]
                assert seqs == sorted(set(seqs)), "each event once"
                said = "".join(e.text for e in told if e.kind is EventKind.STREAM)
                words = said.split()
                assert words == [str(n) for n in range(40)][-len(words) :]
                assert len(words) >= 30
                [value] = [e.data["text/plain"] for e in told if e.kind is EventKind.RESULT]
                assert value == "'kept'"

                with client.cells(session.id, after=0) as late:
                    again = upto(late, behind)
                said = "".join(e.text for e in again if e.kind is EventKind.STREAM)
                assert said.split() == [str(n) for n in range(40)]
                assert [e.cell for e in again if e.kind is EventKind.RUNNING][1:] == [slow, behind]

                platform.kill("launcher")
                assert result(cells.run("kept")) == "'kept'"
                platform.kill("server")
                platform.kill("launcher")
                assert result(cells.run("kept + '!'")) == "'kept!'"
                asks = cells.execute("input('still? ')")
                until(cells, lambda e: e.kind is EventKind.INPUT)
                platform.kill("server")
                seen = client.call(cellcalls.cell(session.id, "python", asks, 0))
                assert seen.status is CellStatus.RUNNING
                retry(lambda: cells.input("yes"))
                done = until(cells, lambda e: e.kind is EventKind.DONE and e.cell == asks)
                assert done.status is CellStatus.OK


def until(cells: Cells, wanted: Callable[[CellEvent], bool]) -> CellEvent:
    """The next event that is wanted; those before it are dropped."""
    for event in cells:
        if wanted(event):
            return event
    raise AssertionError(f"the interpreter has ended: {cells.ended}")


def upto(cells: Cells, cell: str) -> list[CellEvent]:
    """All events until the cell's end."""
    told = []
    for event in cells:
        told.append(event)
        if event.kind is EventKind.DONE and event.cell == cell:
            break
    return told


def retry(do: Callable[[], None]) -> None:
    """Questions do not survive a break of the connection: whoever asks, asks again."""
    try:
        do()
    except ServerUnreachable:
        do()
