"""From events of cells to Jupyter's messages: which, in which order, whose."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from madang.manager.jupyter.rules.catching_up import MAX_HELD, CatchingUp
from madang.manager.jupyter.rules.frames import Message
from madang.manager.jupyter.rules.messages import (
    MAX_PARENTS,
    Parent,
    Parents,
    Translator,
    Writer,
    cell_id,
    utc,
)
from madang.wire.cells import CellError, CellEvent, CellStatus, EventKind, InterpreterStatus

K = EventKind


class Story:
    """Events in their order, as an interpreter tells them."""

    def __init__(self) -> None:
        self._seq = 0

    def tell(self, kind: EventKind, cell: str = "", **fields: Any) -> CellEvent:
        self._seq += 7
        return CellEvent(
            seq=self._seq, at=1_700_000_000.0 + self._seq, kind=kind, cell=cell, **fields
        )


def translator(client: str = "me", *cells: str) -> Translator:
    parents = Parents()
    for cell in cells:
        header = {"msg_id": cell, "msg_type": "execute_request", "session": client}
        parents.add(cell, Parent(header, client))
    return Translator(Writer("kernel", "connection"), parents, client)


def shown(messages: list[Message]) -> list[tuple[str, str]]:
    return [(m.channel, m.content.get("execution_state", m.kind)) for m in messages]


def told(view: Translator, events: list[CellEvent]) -> list[Message]:
    return [message for event in events for message in view.messages(event)]


def one_cell(story: Story, cell: str = "c") -> list[CellEvent]:
    return [
        story.tell(K.ACCEPTED, cell, code="1+1"),
        story.tell(K.RUNNING, cell, code="1+1", count=3),
        story.tell(K.STATUS, name=InterpreterStatus.BUSY),
        story.tell(K.STREAM, cell, name="stdout", text="hi"),
        story.tell(K.RESULT, cell, data={"text/plain": "2"}),
        story.tell(K.DONE, cell, status=CellStatus.OK),
        story.tell(K.STATUS, name=InterpreterStatus.IDLE),
    ]


def test_a_cell_is_told_in_the_order_that_ipykernel_has() -> None:
    found = told(translator("me", "c"), one_cell(Story()))
    assert shown(found) == [
        ("iopub", "busy"),
        ("iopub", "execute_input"),
        ("iopub", "stream"),
        ("iopub", "execute_result"),
        ("shell", "execute_reply"),
        ("iopub", "idle"),
    ]
    assert {m.parent["msg_id"] for m in found} == {"c"}
    assert {m.parent["session"] for m in found} == {"me"}
    assert found[1].content == {"code": "1+1", "execution_count": 3}
    assert found[3].content["execution_count"] == 3
    assert found[4].content["execution_count"] == 3
    assert found[4].content["status"] == "ok"
    assert len({m.id for m in found}) == len(found)


def test_another_client_sees_the_cell_but_gets_no_reply_to_it() -> None:
    mine = translator("me", "c")
    other = Translator(Writer("kernel", "connection"), mine._parents, "other")
    found = told(other, [*one_cell(Story()), Story().tell(K.INPUT, "c", text="?")])
    assert ("shell", "execute_reply") not in shown(found)
    assert ("stdin", "input_request") not in shown(found)
    assert {m.parent["session"] for m in found} == {"me"}


def test_a_cell_of_nobody_that_is_known_is_answered_to_everybody() -> None:
    found = told(translator("me"), one_cell(Story()))
    assert ("shell", "execute_reply") in shown(found)
    assert found[0].parent["msg_id"] == "c"


def test_an_error_has_a_traceback_and_ends_the_cell_with_it() -> None:
    story = Story()
    error = CellError(name="ZeroDivisionError", text="division by zero", line=1)
    found = told(
        translator("me", "c"),
        [
            story.tell(K.RUNNING, "c", code="1/0", count=1),
            story.tell(K.ERROR, "c", error=error),
            story.tell(K.DONE, "c", status=CellStatus.ERROR),
        ],
    )
    assert shown(found)[2:] == [("iopub", "error"), ("shell", "execute_reply"), ("iopub", "idle")]
    for message in found[2:4]:
        assert message.content["ename"] == "ZeroDivisionError"
        assert message.content["traceback"] == ["ZeroDivisionError: division by zero"]


def test_an_aborted_cell_that_never_ran_is_answered_between_busy_and_idle() -> None:
    found = told(translator("me", "c"), [Story().tell(K.DONE, "c", status=CellStatus.ABORTED)])
    assert shown(found) == [("iopub", "busy"), ("shell", "execute_reply"), ("iopub", "idle")]
    assert found[1].content["status"] == "aborted"


def test_json_stands_as_a_value_and_pictures_as_base64() -> None:
    data = {"application/json": '{"a": 1}', "image/png": "iVBO", "application/vnd.x+json": "[1]"}
    event = Story().tell(K.DISPLAY, "c", data=data, metadata={"m": 1}, display="d1")
    (found,) = translator("me", "c").messages(event)
    assert found.content["data"] == {
        "application/json": {"a": 1},
        "image/png": "iVBO",
        "application/vnd.x+json": [1],
    }
    assert found.content["transient"] == {"display_id": "d1"}
    assert found.content["metadata"] == {"m": 1}


def test_what_claims_to_be_json_and_is_not_stays_text() -> None:
    event = Story().tell(K.DISPLAY, "c", data={"application/json": "{nope"})
    (found,) = translator("me", "c").messages(event)
    assert found.content["data"] == {"application/json": "{nope"}


@given(st.lists(st.sampled_from(list(K)), max_size=12))
def test_any_story_is_told_and_every_done_ends_in_idle(kinds: list[EventKind]) -> None:
    story, view = Story(), translator("me", "c")
    for kind in kinds:
        found = view.messages(story.tell(kind, "c", name="stdout"))
        assert all(m.header["msg_type"] and m.header["session"] == "kernel" for m in found)
        if kind is K.DONE:
            assert shown(found)[-1] == ("iopub", "idle")


def test_requests_are_remembered_up_to_a_bound() -> None:
    parents = Parents()
    for number in range(MAX_PARENTS + 10):
        parents.add(f"c{number}", Parent({"msg_id": f"c{number}"}, "me"))
    assert len(parents.known) == MAX_PARENTS
    assert parents.of("c0").owner == ""
    assert parents.of(f"c{MAX_PARENTS}").owner == "me"


@given(st.text(min_size=1, max_size=200))
def test_the_same_request_makes_the_same_cell_and_no_strange_id(msg_id: str) -> None:
    cell = cell_id(msg_id)
    assert cell == cell_id(msg_id)
    assert 1 <= len(cell) <= 64
    assert cell.isascii()
    assert not set(cell) & set(" /\n\0")


def test_times_have_a_fraction_even_at_a_full_second() -> None:
    assert utc(0) == "1970-01-01T00:00:00.000000Z"


def test_a_cell_that_was_over_before_is_not_told_again() -> None:
    story = Story()
    events = one_cell(story)
    catching_up = CatchingUp(events[-1].at + 1, 0)
    assert [each for event in events for each in catching_up.take(event)] == []


def test_a_cell_that_may_have_been_missed_is_told_from_its_beginning_after_a_clear() -> None:
    events = one_cell(Story())
    catching_up = CatchingUp(events[-2].at, 0)
    found = [each for event in events for each in catching_up.take(event)]
    kinds = [each.kind for each in found]
    assert kinds == [
        K.ACCEPTED, K.RUNNING, K.CLEAR, K.STREAM, K.RESULT, K.DONE, K.STATUS,
    ]  # fmt: skip


@given(since=st.integers(-1, 80), cells=st.integers(1, 3))
def test_whatever_happened_since_is_told_once_and_in_its_order(since: int, cells: int) -> None:
    story = Story()
    events = [event for number in range(cells) for event in one_cell(story, f"c{number}")]
    begin = 1_700_000_000.0 + since
    catching_up = CatchingUp(begin + 60, 60)
    found = [each for event in events for each in catching_up.take(event)]
    told = [each for each in found if each.kind is not K.CLEAR]
    for cell in {each.cell for each in told}:
        seqs = [each.seq for each in told if each.cell == cell]
        assert seqs == sorted(set(seqs))
    assert {event.seq for event in events if event.at >= begin} <= {each.seq for each in told}
    assert not catching_up.holds


def test_what_is_held_of_a_cell_is_bounded() -> None:
    story, catching_up = Story(), CatchingUp(2e9, 60)
    for _ in range(MAX_HELD * 2):
        catching_up.take(story.tell(K.STREAM, "c", name="stdout", text="x"))
    assert len(catching_up._held["c"]) == MAX_HELD
