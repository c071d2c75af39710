"""Cells on a real platform: Python's driver in real sessions, through the client."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from madang.client import Cells, Client
from madang.client.cellstory import text_of
from madang.wire.cells import Cell, CellStatus, EventKind
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
