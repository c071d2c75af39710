"""How long a changed policy takes until a session that runs meets it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from madang.wire.log import LogRecord
from madang.wire.policies import PolicyDraft
from madang.wire.session import SessionSpec, SizeRequest
from rows import GAP_S, ROUNDS, Bench, Row, ms

FILE: Final = "/work/file"
_WATCH: Final = f"""
import time
open({FILE!r}, 'w').close()
was = None
while True:
    try:
        open({FILE!r}).close(); now = 1
    except PermissionError:
        now = 0
    if now != was:
        print(now, time.time(), flush=True); was = now
    time.sleep(0.0005)
"""
_OPEN: Final = "version = 1\n"
_SHUT: Final = f"version = 1\n[[files]]\ndeny = [{FILE!r}]\n"


def policy_edit(bench: Bench) -> Iterator[Row]:
    """From the call of the API to the first open that is refused, or passes again.

    The session tries to open a file every half millisecond and tells when that changes, by the
    clock of the machine, which is ours too.
    """
    client = bench.client
    run = client.run_spec(
        SessionSpec(
            argv=("/usr/bin/python3", "-c", _WATCH), size=SizeRequest(cpu=1, mem_bytes=64 * 2**20)
        )
    )
    said = _said(iter(run))
    assert next(said)[0]
    assert run.session is not None
    effects: list[float] = []
    answers: list[float] = []
    try:
        for number in range(ROUNDS):
            time.sleep(GAP_S)
            begun = time.time()
            client.apply_policy(PolicyDraft(text=_OPEN if number % 2 else _SHUT))
            answers.append(time.time() - begun)
            opens, at = next(said)
            assert opens is bool(number % 2), "the session met something else"
            effects.append(at - begun)
    finally:
        client.apply_policy(PolicyDraft(text=_OPEN))
        client.remove(run.session.id, force=True)
    most = max(effects) * 1000
    note = f"most {most:.1f} ms; the API's answer: {ms(answers):.1f} ms"
    yield Row(name="policy_edit", value=ms(effects), unit="ms", goal="≤ 100", note=note)


def _said(output: Iterator[object]) -> Iterator[tuple[bool, float]]:
    """(opens, when) as the session tells."""
    rest = b""
    for item in output:
        if not isinstance(item, LogRecord):
            continue
        rest += item.data
        while b"\n" in rest:
            line, _, rest = rest.partition(b"\n")
            opens, at = line.split()
            yield opens == b"1", float(at)
