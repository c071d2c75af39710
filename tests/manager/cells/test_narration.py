"""What a driver's output tells: pure, and the same however it is cut."""

from __future__ import annotations

import base64
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from madang.manager.cells.rules.bundles import METADATA, as_json
from madang.manager.cells.rules.frames import MAX_PAYLOAD, Frame, Frames
from madang.manager.cells.rules.memory import Recent
from madang.manager.cells.rules.narration import Narrator
from madang.manager.cells.types import CellRow, CellSettings
from madang.wire.cells import (
    CellEvent,
    CellStatus,
    Completions,
    EventKind,
    Inspection,
    InterpreterStatus,
)
from madang.wire.log import HEADER, LogGap, LogRecord, Stream

K = EventKind
NONCE = "0123456789abcdef"
OUT, ERR = Stream.STDOUT, Stream.STDERR


def frame(kind: str, id_: str = "-", arg: str = "-", payload: bytes | str = b"") -> bytes:
    data = payload.encode() if isinstance(payload, str) else payload
    return f"\x1e{NONCE} {kind} {id_} {arg} {len(data)}\n".encode() + data + b"\n"


def log(*pieces: tuple[Stream, bytes]) -> list[LogRecord]:
    found, offset = [], 0
    for number, (stream, data) in enumerate(pieces):
        found.append(LogRecord(offset, number * 1000, stream, data))
        offset = found[-1].end
    return found


def cell(id_: str, seq: int = 0, **more: object) -> CellRow:
    row = CellRow(
        interpreter_id="i",
        id=id_,
        seq=seq,
        at=0,
        code=f"code of {id_}",
        silent=False,
        store=True,
        stdin=True,
        stop_on_error=True,
        status="waiting",
        number=None,
        took_us=None,
        cpu_us=None,
        mem_bytes=None,
        error="",
    )
    return replace(row, **more)  # type: ignore[arg-type]


def tell(narrator: Narrator, *pieces: tuple[Stream, bytes]) -> list[CellEvent]:
    return [event for record in log(*pieces) for event in narrator.record(record)]


def ready(*cells: CellRow) -> Narrator:
    """An idle interpreter with waiting *cells*."""
    narrator = Narrator(NONCE, 0)
    for row in cells:
        narrator.accept(row)
    narrator.record(LogRecord(0, 0, OUT, frame("ready", payload="3.11")))
    return narrator


def run(id_: str, *inside: tuple[Stream, bytes], ok: bool = True) -> list[tuple[Stream, bytes]]:
    figures = "wall_us=1500\ncpu_us=7\nmem_bytes=9\nnoise\nx=-1"
    return [
        (OUT, frame("begin", id_)),
        *inside,
        (ERR, frame("fence", id_)),
        (OUT, frame("done", id_, "ok" if ok else "error", figures)),
    ]


def after(offset: int, records: list[LogRecord]) -> list[LogRecord]:
    return [replace(record, offset=record.offset + offset) for record in records]


def kinds(events: list[CellEvent]) -> list[str]:
    return [f"{e.kind}:{e.name or e.cell}" if e.kind is K.STATUS else str(e.kind) for e in events]


def test_a_cell_is_told_from_its_acceptance_to_its_end() -> None:
    narrator = Narrator(NONCE, 0)
    row, accepted = narrator.accept(cell("a"))
    assert (row.seq, accepted[0].seq, accepted[0].code) == (1, 1, "code of a")
    events = tell(
        narrator,
        (OUT, frame("ready", payload="3.11.2")),
        *run("a", (OUT, b"hi\n"), (ERR, b"oh"), (OUT, frame("result", "a", "text/plain", "4"))),
    )
    assert kinds(events) == [
        "status:IDLE",
        "running",
        "status:BUSY",
        "stream",
        "stream",
        "result",
        "done",
        "status:IDLE",
    ]
    assert narrator.version == "3.11.2"
    assert [(e.name, e.text, e.cell) for e in events if e.kind is K.STREAM] == [
        ("stdout", "hi\n", "a"),
        ("stderr", "oh", "a"),
    ]
    result, done = events[5], events[6]
    assert (result.data, result.count) == ({"text/plain": "4"}, 1)
    assert (done.status, done.took_s, done.cpu_s, done.mem_bytes) == (
        CellStatus.OK,
        0.0015,
        7e-6,
        9,
    )
    assert [e.seq for e in events] == sorted({e.seq for e in events})
    [outcome] = narrator.outcomes
    assert (outcome.cell, outcome.number, outcome.took_us) == ("a", 1, 1500)


@pytest.mark.parametrize("late", ["fence", "done"])
def test_a_cell_has_ended_once_both_streams_are_complete(late: str) -> None:
    narrator = ready(cell("a"))
    pieces = {
        "fence": (ERR, frame("fence", "a")),
        "done": (OUT, frame("done", "a", "ok")),
    }
    first = pieces["done" if late == "fence" else "fence"]
    records = after(1000, log((OUT, frame("begin", "a")), first, (ERR, b"more"), pieces[late]))
    told = [narrator.record(record) for record in records]
    assert [e.kind for e in told[2]] == [K.STREAM]
    assert told[2][0].cell == "a"
    assert [e.kind for e in told[3]] == [K.DONE, K.STATUS]


def test_a_fence_may_be_read_before_the_cell_has_begun() -> None:
    narrator = ready(cell("a"))
    records = after(1000, log((ERR, frame("fence", "a")), *run("a")[:1], run("a")[-1]))
    events = [e for record in records for e in narrator.record(record)]
    assert events[-2].kind is K.DONE


def test_an_error_drops_what_waits_unless_the_cell_says_otherwise() -> None:
    narrator = ready(cell("a"), cell("b"), cell("c"))
    error = (OUT, frame("error", "a", "3", "KeyError\n'x'\nline 1\nline 2"))
    events = [e for r in after(1000, log(*run("a", error, ok=False))) for e in narrator.record(r)]
    told = next(e.error for e in events if e.kind is K.ERROR)
    assert told is not None
    assert (told.name, told.text, told.line, told.traceback) == (
        "KeyError",
        "'x'",
        3,
        ("line 1", "line 2"),
    )
    ended = [(e.cell, e.status) for e in events if e.kind is K.DONE]
    assert ended == [
        ("a", CellStatus.ERROR),
        ("b", CellStatus.ABORTED),
        ("c", CellStatus.ABORTED),
    ]
    assert not narrator.waiting

    narrator = ready(cell("a", stop_on_error=False), cell("b"))
    for record in after(1000, log(*run("a", ok=False))):
        narrator.record(record)
    assert [row.id for row in narrator.waiting] == ["b"]


def test_a_silent_cell_has_neither_number_nor_result() -> None:
    narrator = ready(cell("a", silent=True), cell("b"))
    result = (OUT, frame("result", "a", "text/plain", "4"))
    records = after(1000, log(*run("a", result), *run("b")))
    events = [e for record in records for e in narrator.record(record)]
    assert not [e for e in events if e.kind is K.RESULT]
    assert [(e.cell, e.count) for e in events if e.kind is K.RUNNING] == [("a", None), ("b", 1)]


def test_parts_make_one_bundle_with_metadata_and_display() -> None:
    narrator = ready(cell("a"))
    png = bytes(range(256)) * 40
    pieces = [
        (OUT, frame("more", "a", payload=png[:5000])),
        (ERR, b"between"),
        (OUT, frame("part", "a", "image/png", png[5000:])),
        (OUT, frame("part", "a", METADATA, '{"w": 3}')),
        (OUT, frame("part", "a", "application/json", '{"k": [1]}')),
        (OUT, frame("display", "a", "text/plain;display=d1", "a picture")),
        (OUT, frame("update", "a", "text/plain;display=d1", "another")),
        (OUT, frame("clear", "a", "wait")),
    ]
    records = after(1000, log(*run("a", *pieces)))
    events = [e for record in records for e in narrator.record(record)]
    shown = next(e for e in events if e.kind is K.DISPLAY)
    assert shown.data == {
        "image/png": base64.b64encode(png).decode(),
        "application/json": {"k": [1]},
        "text/plain": "a picture",
    }
    assert (shown.metadata, shown.display) == ({"w": 3}, "d1")
    update = next(e for e in events if e.kind is K.UPDATE)
    assert (update.data, update.display) == ({"text/plain": "another"}, "d1")
    assert [e.wait for e in events if e.kind is K.CLEAR] == [True]


def test_what_is_too_large_is_named_instead() -> None:
    frames = Frames(NONCE)
    size = MAX_PAYLOAD + 5
    found = frames.feed(frame("part", "a", "image/png", b"x" * size) + b"text")
    assert found[0][1] == Frame("part", "a", "image/png", b"", size)
    assert found[1][1] == b"text"
    narrator = ready(cell("a"))
    chunk = frame("more", "a", payload=b"y" * (4 << 20))
    records = log((OUT, frame("begin", "a")), (OUT, chunk), (OUT, chunk), (OUT, chunk))
    last = (OUT, frame("display", "a", "image/png", b"z"))
    events = [e for r in after(1000, [*records]) for e in narrator.record(r)]
    [record] = after(10**9, log(last))
    [shown] = narrator.record(record)
    assert shown.data == {"text/plain": f"[image/png of {(12 << 20) + 1} bytes: too large to show]"}
    assert len(events) == 2


def test_requests_for_input_and_their_answers() -> None:
    narrator = ready(cell("a"))
    asked = (OUT, frame("input", "a", "password", "pin: "))
    begun, request = after(1000, log((OUT, frame("begin", "a")), asked))
    narrator.record(begun)
    events = narrator.record(request)
    assert [(e.kind, e.text, e.secret) for e in events] == [(K.INPUT, "pin: ", True)]
    assert narrator.asking
    assert [e.kind for e in narrator.answered(1.0)] == [K.ANSWERED]
    assert not narrator.asking


def test_questions_are_answered_without_an_event() -> None:
    narrator = ready()
    pieces = [
        (OUT, frame("completions", "q1", "2,4", "print\nproperty")),
        (OUT, frame("inspection", "q2", "found", "it is")),
        (OUT, frame("completions", "q3", "x,4", "print")),
    ]
    events = [e for r in after(1000, log(*pieces)) for e in narrator.record(r)]
    assert events == []
    assert [reply.value for reply in narrator.replies] == [
        Completions(matches=("print", "property"), start=2, end=4),
        Inspection(found=True, data={"text/plain": "it is"}),
        Completions(matches=(), start=0, end=0),
    ]


def test_a_gap_ends_what_was_in_the_middle() -> None:
    narrator = ready(cell("a"), cell("b"))
    records = log(
        (OUT, frame("begin", "a")), (OUT, frame("part", "a", "image/png", b"1" * 50)[:60])
    )
    for record in after(1000, records):
        narrator.record(record)
    [gap] = narrator.gap(LogGap(5000, 90_000))
    assert gap.kind is K.GAP
    events = [e for r in after(90_000, log(*run("b"))) for e in narrator.record(r)]
    assert [(e.cell, e.status) for e in events if e.kind is K.DONE] == [
        ("a", CellStatus.ERROR),
        ("b", CellStatus.OK),
    ]


def test_the_end_of_the_program_ends_its_cells() -> None:
    narrator = ready(cell("a"), cell("b"))
    for record in after(1000, log((OUT, frame("begin", "a")))):
        narrator.record(record)
    events = narrator.end(5.0, "killed")
    assert [(e.kind, e.cell) for e in events[:2]] == [(K.DONE, "a"), (K.DONE, "b")]
    assert events[-1].name == InterpreterStatus.ENDED
    assert events[-1].text == "killed"


PIECES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([OUT, ERR]), st.binary(max_size=20)),
        st.builds(lambda text: (OUT, text.encode()), st.text(max_size=8)),
        st.builds(
            lambda kind, id_, arg, payload: (OUT, frame(kind, id_, arg, payload)),
            st.sampled_from(
                "ready begin part display result update clear error input done completions "
                "inspection more fence nonsense".split()
            ),
            st.sampled_from(["a", "b", "c", "-"]),
            st.sampled_from(["-", "ok", "error", "text/plain", "image/png;display=x", "1,2", "3"]),
            st.binary(max_size=30),
        ),
        st.builds(lambda id_: (ERR, frame("fence", id_)), st.sampled_from(["a", "b", "c"])),
        st.just((OUT, f"\x1e{NONCE}".encode())),
    ),
    max_size=25,
)


@given(PIECES)
@settings(max_examples=200, deadline=None)
def test_a_second_reader_tells_the_same_with_the_same_numbers(
    pieces: list[tuple[Stream, bytes]],
) -> None:
    live = Narrator(NONCE, 0)
    told: list[CellEvent] = []
    rows: list[CellRow] = []
    for number, record in enumerate(log(*pieces)):
        if number % 5 == 2:
            row, events = live.accept(cell("abc"[len(rows) % 3] if len(rows) < 3 else f"n{number}"))
            rows.append(row)
            told += events
        told += live.record(record)
    again = Narrator(NONCE, 0, rows)
    retold = [event for record in log(*pieces) for event in again.record(record)]
    retold += again.caught_up()
    key = [(e.seq, e.kind, e.cell, e.text, e.data) for e in told]
    assert [(e.seq, e.kind, e.cell, e.text, e.data) for e in retold] == key
    assert [e.seq for e in told] == sorted({e.seq for e in told})


@given(st.binary(max_size=200), st.lists(st.integers(0, 400), max_size=6))
def test_how_output_is_cut_changes_nothing_but_where_text_is(noise: bytes, cuts: list[int]) -> None:
    whole = noise + frame("display", "a", "text/plain", noise) + noise + frame("done", "a", "ok")
    places = [0, *sorted(cut % (len(whole) + 1) for cut in cuts), len(whole)]
    frames = Frames(NONCE)
    found = [item for start, end in pairwise(places) for _, item in frames.feed(whole[start:end])]
    assert [f for f in found if isinstance(f, Frame)] == [
        Frame("display", "a", "text/plain", noise),
        Frame("done", "a", "ok", b""),
    ]
    assert b"".join(f for f in found if isinstance(f, bytes)) == noise + noise


@given(st.binary(max_size=300))
def test_garbage_is_text_and_never_an_error(data: bytes) -> None:
    narrator = Narrator(NONCE, 0)
    mark = f"\x1e{NONCE} ".encode()
    for record in log(
        (OUT, data), (OUT, mark + data), (ERR, mark + data), (OUT, mark + b"x" * 900)
    ):
        narrator.record(record)


def test_what_no_json_can_carry_is_still_told() -> None:
    assert as_json("application/json", b"{broken") == "{broken"
    assert as_json("application/json", b'"\\ud800"') == '"\\ud800"'
    assert as_json("text/html", b"\xff") == "\ufffd"
    assert as_json("image/svg+xml", b"<svg/>") == "<svg/>"
    assert as_json("image/png", b"abc") == "YWJj"
    assert as_json("application/x-it", b"\xff") == "/w=="


def test_memory_is_bounded_and_knows_what_it_lacks() -> None:
    recent = Recent(CellSettings(kept_events=10))
    events = [CellEvent(seq=n, at=0.0, kind=K.CLEAR) for n in range(1, 30)]
    for event in events:
        recent.add([event])
    kept = recent.after(recent.gone)
    assert kept is not None
    assert 5 <= len(kept) <= 10
    assert kept[-1].seq == recent.newest == 29
    assert recent.after(recent.gone - 1) is None
    assert recent.after(28) == events[-1:]
    recent.add([CellEvent(seq=30, at=0.0, kind=K.STREAM, text="x" * (5 << 20))])
    assert [e.seq for e in recent.after(29) or []] == [30]


def test_a_record_place_is_counted_from_the_log() -> None:
    narrator = Narrator(NONCE, 0)
    [event] = narrator.record(LogRecord(100, 0, OUT, b"abc"))
    assert event.seq == (100 + HEADER.size + 3) * 1024
