"""Figures of cells: one more in a running interpreter, and the first of a new one."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Final

from madang.client import Cells
from madang.wire.cells import CellStatus
from madang.wire.session import Session, SessionSpec, SessionStatus, SizeRequest
from rows import START_S, Bench, Row, interleaved, ms

CELLS: Final = 200
FIRST: Final = 30


def _session(bench: Bench) -> Session:
    size = SizeRequest(cpu=0.5, mem_bytes=512 << 20)
    made = bench.client.create_session(SessionSpec(size=size))
    return bench.client.wait_session(made.id, until=[SessionStatus.RUNNING], timeout_s=START_S)


def _timed(cells: Cells) -> float:
    begin = time.perf_counter()
    cell = cells.run("1 + 1")
    took = time.perf_counter() - begin
    assert cell.status is CellStatus.OK
    return took


def cell(bench: Bench) -> Iterator[Row]:
    """A cell through the API to its end, beside ipykernel without any server."""
    session = _session(bench)
    with ExitStack() as stack:
        cells = stack.enter_context(bench.client.cells(session.id))
        own: list[float] = []

        def ours() -> float:
            found = cells.run("1 + 1")
            assert found.took_s is not None
            own.append(found.took_s)
            return _timed(cells)

        theirs = _ipykernel(stack)
        measures = [ours] if theirs is None else [ours, theirs]
        for measure in measures:
            measure()
        times = interleaved(CELLS, *measures)
        own.sort()
        note = (
            f"p90 {sorted(times[0])[int(len(times[0]) * 0.9)] * 1000:.2f} ms, "
            f"of which the driver {own[len(own) // 2] * 1000:.2f} ms, {CELLS} rounds"
        )
        yield Row(
            name="cell",
            value=ms(times[0]),
            unit="ms",
            goal="≤ 3",
            reference="ipykernel alone" if theirs is not None else "",
            reference_value=ms(times[1]) if theirs is not None else None,
            note=note,
        )
    bench.client.stop(session.id, grace_s=0)


def cell_first(bench: Bench) -> Iterator[Row]:
    """In a running session: start an interpreter → the result of its first cell."""
    session = _session(bench)

    def first() -> float:
        begin = time.perf_counter()
        with bench.client.cells(session.id, new=True) as cells:
            assert cells.run("1 + 1").status is CellStatus.OK
            took = time.perf_counter() - begin
            cells.execute("import os; os._exit(0)")
            for _ in cells:
                pass
        return took

    first()
    (times,) = interleaved(FIRST, first)
    note = f"p90 {sorted(times)[int(len(times) * 0.9)] * 1000:.1f} ms, {FIRST} rounds"
    yield Row(name="cell_first", value=ms(times), unit="ms", goal="≤ 40", note=note)
    bench.client.stop(session.id, grace_s=0)


def _ipykernel(stack: ExitStack) -> Callable[[], float] | None:
    """A cell in a local ipykernel, by its own blocking client; None where it is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("ipykernel", "jupyter_client")):
        return None
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    stack.callback(manager.shutdown_kernel, now=True)
    stack.callback(client.stop_channels)

    def theirs() -> float:
        begin = time.perf_counter()
        client.execute_interactive("1 + 1", output_hook=lambda _: None, timeout=START_S)
        return time.perf_counter() - begin

    return theirs
