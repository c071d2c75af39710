"""What the launcher made ahead goes with it; what belongs to live sessions stays.

Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import Final

from madang.agent.launcher import cgroups, registry
from madang.agent.launcher import main as launcher
from madang.agent.launcher.network import rules, warden
from madang.agent.launcher.network.networks import NetworkConfig
from madang.agent.launcher.processes import ProcessId

PATIENCE_S: Final = 3.0


def waiting_sandboxes(launcher_pid: int, state: str) -> list[ProcessId]:
    """Processes below the launcher that are no session's."""
    records = live_records(state)
    live = {process.pid for record in records for process in _both(record)}
    live |= {warden.pid for r in records if (c := r.connection) and (warden := c.warden)}
    keepers = set(_children(launcher_pid)) - live
    pids = [*keepers, *(child for keeper in keepers for child in _children(keeper))]
    return [process for pid in pids if (process := ProcessId.of(pid))]


def sweep(sandboxes: list[ProcessId], state: str) -> None:
    """Wait until *sandboxes* have gone, each in its own time; remove their control groups,
    and the machine's rules for sessions unless one still needs them."""
    late = time.monotonic() + PATIENCE_S
    for process in sandboxes:
        if (fd := process.open()) is not None:
            select.select([fd], [], [], max(0.0, late - time.monotonic()))
            os.close(fd)
    groups = cgroups.detect(launcher._group_name(state))
    used = {record.slot for record in live_records(state)}
    unused = groups.names() - used
    while not all(groups.group(name).remove() for name in unused) and time.monotonic() < late:
        time.sleep(0.02)  # a group counts its dead until they are reaped
    if not used:
        groups.remove()
    if os.geteuid() == 0 and rules.nft_path() is not None:
        with contextlib.suppress(OSError):  # The next launcher tries again.
            warden.remove_table(NetworkConfig().site(state, launcher.mark_of(state)))


def live_records(state: str) -> list[registry.Record]:
    """Kernels of the state folder whose keeper or init lives."""
    try:
        found = [registry.load(path) for _, path in registry.folders(f"{state}/kernels")]
    except FileNotFoundError:
        return []
    return [record for record in found if record and _both(record)]


def kernel_processes(state: str) -> list[ProcessId]:
    """Keepers and inits of sessions that live; with either gone a session ends."""
    return [process for record in live_records(state) for process in _both(record)]


def _both(record: registry.Record) -> list[ProcessId]:
    pair = (record.keeper, record.init)
    return [process for process in pair if process and ProcessId.of(process.pid) == process]


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return [int(child) for child in file.read().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
