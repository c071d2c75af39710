"""Where the time of a start goes: one warm and one cold Python session in turn, step by step.

Nothing is added to what runs: each step ends with a time that the platform keeps anyway, or that
the program itself prints. All clocks are one machine's.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Final

from rows import GAP_S, ROUNDS, Bench, Row

NOW: Final = ("-c", "import time; print(time.time())")
STEPS: Final = {
    "request": "the client's call, to the session's row",
    "place": "the row, to the node that the scheduler chose",
    "prepare": "the choice, to a slot that has the order: agent, launcher, scratch disk, limits",
    "enter": "the order, to the program's first statement: sandbox, and interpreter or fork",
    "output": "the first statement, to its output at the keeper",
    "return": "the keeper's record, to the client",
}
"""Each from the end of the one before."""


def path(bench: Bench) -> Iterator[Row]:
    """Medians of each step; they need not add up to the median of the whole."""
    bench.first_output_s("python3", *NOW)
    time.sleep(2)
    warm: list[list[float]] = []
    cold: list[list[float]] = []
    for number in range(ROUNDS + 1):
        for program, found in (("python3", warm), ("/usr/bin/python3", cold)):
            time.sleep(GAP_S)
            steps = _steps_s(bench, program)
            if number:
                found.append(steps)
    for name, ours, theirs in zip(STEPS, zip(*warm, strict=True), zip(*cold, strict=True),
                                  strict=True):  # fmt: skip
        yield Row(name=f"path_{name}", value=statistics.median(ours) * 1000, unit="ms",
                  reference="cold", reference_value=statistics.median(theirs) * 1000,
                  note=STEPS[name])  # fmt: skip


def _steps_s(bench: Bench, program: str) -> list[float]:
    """How long each of ``STEPS`` took."""
    begin = time.time()
    run = bench.client.run([program, *NOW], cpu=1, mem="512m")
    record = next(iter(run))
    end = time.time()
    session = run.wait()
    bench.client.remove(session.id)
    placed = next(phase.ended_at for phase in session.phases if phase.name == "queue")
    assert placed is not None and session.started_at is not None
    times = [
        *(begin, session.created_at, placed, session.started_at),
        *(float(record.data), record.at_us / 1e6, end),
    ]
    return [after - before for before, after in itertools.pairwise(times)]
