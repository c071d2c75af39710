"""The end of try.sh: what the training session did, and what to type next."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import tomllib
from pathlib import Path

from madang.client import Client
from madang.wire.log import LogRecord
from madang.wire.session import Session
from madang.wire.size import format_bytes, format_duration

PROBES = 5


def main() -> None:
    home = Path(sys.argv[1])
    where = tomllib.loads((home / "client.toml").read_text())
    token = Path(where["token_file"]).read_text().strip()
    with Client(where["url"], token) as client:
        session = last_training(client)
        answers = [first_output_s(client) for _ in range(PROBES)]
        output = next(r for r in client.logs(session.id) if isinstance(r, LogRecord))
    started, ended = session.started_at, session.ended
    assert started is not None and ended is not None
    metrics = json.loads((home / "outputs" / "metrics.json").read_text())
    lines = {
        "accuracy": f"{metrics['accuracy']:.1%} on digits it had not seen",
        "duration": f"{format_duration(ended.duration_s)}, CPU {ended.cpu_s or 0:.1f} s",
        "peak memory": f"{format_bytes(ended.mem_peak_bytes or 0)} of 1 GiB",
        "request to running": f"{format_duration(started - session.created_at)}; its first line "
        f"came after {format_duration(output.at_us / 1e6 - session.created_at)} "
        "(most of it is the import of scikit-learn)",
        "request to output": f"{format_duration(statistics.median(answers))} for `echo` in a "
        f"new session (median of {PROBES})",
    }
    print()
    for name, text in lines.items():
        print(f"  {name:20}{text}")
    here = os.path.relpath(home)
    print(f"  {'files':20}{here}/outputs/: {', '.join(sorted(os.listdir(home / 'outputs')))}")
    print(f"\n✓ A real model was trained in session {session.name}. Type next:\n")
    for command, meaning in (
        (f"{here}/madang run -- python3 -c 'print(6 * 7)'", "anything else"),
        (f"{here}/madang run -t -- bash", "look around inside"),
        (f"{here}/madang logs {session.name}", "the output is kept"),
        (f"{here}/madang ps --all", "all sessions"),
        (f"{os.path.dirname(here) or '.'}/try.sh --down", "stop and remove everything"),
    ):
        print(f"  {command:52} # {meaning}")


def last_training(client: Client) -> Session:
    """The newest session of the image ``digits`` that has ended."""
    found = [s for s in client.list_sessions(ended=True) if s.image == "digits" and s.ended]
    return max(found, key=lambda session: session.created_at)


def first_output_s(client: Client) -> float:
    """Seconds from the call until the first output is here."""
    begin = time.perf_counter()
    run = client.run(["echo", "hello"], cpu=0.1, mem="64m")
    next(iter(run))
    seconds = time.perf_counter() - begin
    client.remove(run.wait().id)
    return seconds


if __name__ == "__main__":
    main()
