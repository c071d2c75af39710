"""``./bench.sh [--json FILE] [NAME…]``: the figures of the design's table, each on a line."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
import trace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final

import cells
import machine
import madang
import rows
import traces
import warm
from policy_edit import policy_edit
from policy_import import policy_import, policy_import_files
from rows import Bench, Row
from soak import soak
from starts import start_exit


def _fgd(mix: str, _: Bench) -> Iterator[Row]:
    return traces.fgd(mix)


ROWS: Final[Mapping[str, Callable[[Bench], Iterator[Row]]]] = {
    "session_cold": rows.session_cold,
    "start_exit": start_exit,
    "run_command": rows.run_command,
    "cli_help": rows.cli_help,
    "idle_memory": rows.memory,
    "life_cpu": rows.life_cpu,
    "burst_20": lambda bench: rows.burst(bench, 20, "≤ 0.6"),
    "burst_100": lambda bench: rows.burst(bench, 100, "≤ 3"),
    "thaw": rows.thaw,
    "read_rate": rows.read_rate,
    "submit_rate": rows.submit_rate,
    "restart": rows.restart,
    "blas_truth": rows.blas_truth,
    "policy_import": policy_import,
    "policy_import_files": policy_import_files,
    "policy_connect": rows.policy_connect,
    "policy_edit": policy_edit,
    "session_warm": warm.session_warm,
    "session_warm_torch": warm.session_warm_torch,
    "burst_warm_100": lambda bench: warm.burst_warm(bench, 100),
    "warm_session_memory": warm.warm_session_memory,
    "cell": cells.cell,
    "cell_first": cells.cell_first,
    "path": trace.path,
    "soak": soak,
    "plan_pass_2000": lambda _: traces.plan_pass(2000),
    "plan_pass_62500": lambda _: traces.plan_pass(62_500),
    **{f"trace_fgd_{mix}": partial(_fgd, mix) for mix in traces.PUBLISHED},
    "trace_philly_fifo": lambda _: traces.philly_rows("fifo"),
    "trace_philly_short": lambda _: traces.philly_rows("short"),
}
TOGETHER: Final = {
    "docker_ratio": "session_cold",
    "torch_ratio": "session_warm_torch",
    "session_memory": "idle_memory",
    "agent_memory": "idle_memory",
    **{f"path_{step}": "path" for step in trace.STEPS},
}
"""Figures that come from another's run."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="./bench.sh", description=__doc__)
    names = ", ".join([*ROWS, *TOGETHER])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {names}")
    parser.add_argument("--json", metavar="FILE", help="write everything there, too")
    parser.add_argument("--markdown", metavar="FILE", help="a table for the documentation")
    options = parser.parse_args()
    unknown = set(options.names) - {*ROWS, *TOGETHER}
    if unknown:
        parser.error(f"no such figure: {', '.join(sorted(unknown))}; there are {names}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # docker and platform end with us
    wanted = {TOGETHER.get(name, name) for name in options.names} or everything()
    print(f"# {machine.describe()}; Python {sys.version.split()[0]}; {time.strftime('%Y-%m-%d')}")
    found, failed = measure([name for name in ROWS if name in wanted])
    if options.json:
        about = {"machine": machine.describe(), "version": madang.__version__, "at": time.time()}
        data = about | {"rows": [asdict(row) for row in found]}
        Path(options.json).write_text(json.dumps(data, indent=2) + "\n")
    if options.markdown:
        Path(options.markdown).write_text(markdown(found))
    if failed:
        print(f"\n✗ could not be measured: {', '.join(failed)}")
    return 1 if failed else 0


def everything() -> set[str]:
    """What is measured when nothing is named."""
    if traces.available():
        return set(ROWS)
    print(f"# without trace_*: they need {traces.FOLDER}, see bench/traces.py")
    return {name for name in ROWS if not name.startswith("trace_")}


def markdown(found: list[Row]) -> str:
    """The results as a page."""
    how = (
        f"Measured on {time.strftime('%Y-%m-%d')} by `./bench.sh`, Madang {madang.__version__}, "
        f"{machine.describe()}, Python {sys.version.split()[0]}. Medians of interleaved rounds, "
        "pauses of 50 ms between starts; the reference runs in the same rounds."
    )
    lines = [
        "# Figures",
        "",
        how,
        "",
        "| figure | value | goal | reference | ratio | how |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        reference = ratio = ""
        if row.reference_value is not None:
            reference = f"{row.reference}: {row.reference_value:.4g} {row.unit}"
            ratio = f"{row.reference_value / row.value:.3g}"
        value = f"{row.value:.4g} {row.unit}"
        lines.append(
            f"| `{row.name}` | {value} | {row.goal} | {reference} | {ratio} | {row.note} |"
        )
    return "\n".join(lines) + "\n"


def measure(names: list[str]) -> tuple[list[Row], list[str]]:
    """One after the other on one platform; a figure that fails does not end the rest."""
    found: list[Row] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="madang-bench-") as folder:
        Path(folder).chmod(0o755)
        bench = Bench(Path(folder))
        try:
            for name in names:
                try:
                    for row in ROWS[name](bench):
                        print(row.line() + (f"   ({row.note})" if row.note else ""), flush=True)
                        found.append(row)
                except Exception as exc:
                    print(f"{name} failed: {exc!r}", flush=True)
                    failed.append(name)
        finally:
            bench.close()
    return found, failed


if __name__ == "__main__":
    sys.exit(main())
