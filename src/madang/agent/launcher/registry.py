"""What the launcher knows of each kernel: ``kernel.json``, uids, processors.

The files are written before the acts that they tell of, so that a new launcher finds whatever an
older one made. They are not synced: after a crash of the machine no process of theirs lives.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from madang.agent.launcher import syscalls
from madang.agent.launcher.cgroups import Group
from madang.agent.launcher.processes import ProcessId, boot_id
from madang.wire.errors import HostLacks, RuntimeFailed
from madang.wire.kernel import NATIVE, KernelId

FILE: Final = "kernel.json"
NETWORK_USE: Final = "network.json"
"""A ``wire.network.NetworkUse``, if the kernel has a network; see ``network.warden``."""

VERSION: Final = 1
"""Of ``Record``. It grows with each change that an older launcher would not understand."""
PREPARED, STARTED, SETTLED = "prepared", "started", "settled"


@dataclass(slots=True, kw_only=True)
class Connection:
    """The network that a kernel was given: what another warden of it must know."""

    number: int
    """Tells interface and addresses."""
    mode: str
    allow: list[str]
    bandwidth_bits: int | None = None
    warden: ProcessId | None = None


@dataclass(slots=True, kw_only=True)
class Record:
    """One kernel, as the next launcher must know it."""

    kernel: str
    uid: int
    state: str = PREPARED
    scratch_enforced: str = "watch"
    cpu: float = 0.0
    cpus: list[int] = field(default_factory=list)
    slot: str = ""
    nest: str = ""
    """Name of the nest that it lives in, if it started warm: see ``warm``."""
    group: Group | None = None
    keeper: ProcessId | None = None
    init: ProcessId | None = None
    guard: ProcessId | None = None
    template: str = ""
    policy: str = ""
    """The layers of the policy that it runs under, for showing."""
    runtime: str = NATIVE
    connection: Connection | None = None
    started_at: float | None = None
    boot: str = ""
    version: int = VERSION

    def save(self, folder: str) -> None:
        temporary = f"{folder}/{FILE}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(temporary, flags, 0o644)
        try:
            os.write(fd, json.dumps(asdict(self)).encode())
        finally:
            os.close(fd)
        os.rename(temporary, f"{folder}/{FILE}")


def load(folder: str) -> Record | None:
    """None if the file is missing or torn by a crash of the machine.

    Raises HostLacks if a newer Madang wrote it: what it means is not for us to guess.
    """
    try:
        with open(f"{folder}/{FILE}", encoding="ascii") as file:
            value = json.load(file)
        _check_version(value, folder)
        return _parse(value)
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _check_version(value: dict[str, Any], folder: str) -> None:
    version = value.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        name = os.path.basename(folder)
        text = f"session {name} was started by a newer Madang, and is left alone"
        raise HostLacks(f"{text}. Start that version again, and end its sessions before this one.")


def refuse_newer(kernels: str) -> None:
    """Raises HostLacks if there is a kernel of a newer Madang; before anything is touched."""
    with contextlib.suppress(FileNotFoundError):
        for _, folder in folders(kernels):
            load(folder)


def _parse(value: dict[str, Any]) -> Record:
    group, keeper, init = value.pop("group"), value.pop("keeper"), value.pop("init")
    connection = value.pop("connection", None)
    guard = value.pop("guard", None)
    record = Record(**value)
    record.group = Group(**group) if group else None
    if record.boot == boot_id():
        record.keeper = ProcessId(**keeper) if keeper else None
        record.init = ProcessId(**init) if init else None
        record.connection = _connection(connection) if connection else None
        record.guard = ProcessId(**guard) if guard else None
    return record


def _connection(value: dict[str, Any]) -> Connection:
    warden = value.pop("warden")
    return Connection(warden=ProcessId(**warden) if warden else None, **value)


def folders(kernels: str) -> Iterator[tuple[KernelId, str]]:
    """Every kernel's id and folder."""
    with os.scandir(kernels) as entries:
        for entry in entries:
            try:
                yield KernelId.parse(entry.name), entry.path
            except ValueError:
                continue


def rejoin(kernels: str, namespace: int) -> bool:
    """Enter the namespace (CLONE_NEW…) that an older launcher left its keepers in, if there is one.

    In another mount namespace, every scratch disk of the older launcher would stay mounted, deleted
    or not, until the last of its keepers left; in another user namespace we would have no power
    over its sessions.
    """
    with contextlib.suppress(FileNotFoundError):
        for _, folder in folders(kernels):
            record = load(folder)
            if (
                record is not None
                and record.keeper is not None
                and _enter(record.keeper, namespace)
            ):
                return True
    return False


def _enter(process: ProcessId, namespace: int) -> bool:
    name = {syscalls.CLONE_NEWNS: "mnt", syscalls.CLONE_NEWUSER: "user"}[namespace]
    try:
        fd = os.open(f"/proc/{process.pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if ProcessId.of(process.pid) != process:
            return False
        syscalls.setns(fd, namespace)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


class Uids:
    """One uid for each kernel whose files exist."""

    def __init__(self, first: int, count: int) -> None:
        self._range = range(first, first + count)
        self._taken: set[int] = set()
        self._blocks: set[range] = set()
        """Kept out of ``take``."""
        self._next = first

    def __len__(self) -> int:
        return len(self._range)

    def take(self) -> int:
        """The next free one, in turn: a uid that was given back is used again late."""
        for _ in self._range:
            uid = self._next
            self._next = uid + 1 if uid + 1 in self._range else self._range.start
            if uid not in self._taken and not any(uid in block for block in self._blocks):
                self._taken.add(uid)
                return uid
        raise RuntimeFailed("every uid for sessions is in use. Remove ended sessions: `madang rm`.")

    def take_from(self, block: range) -> int | None:
        """One of a block's own; None: all are in use."""
        uid = next((uid for uid in block if uid not in self._taken), None)
        if uid is not None:
            self._taken.add(uid)
        return uid

    def take_block(self, count: int) -> range | None:
        """So many that are given to nobody else; None: there are none. Never more than half."""
        for first in range(
            self._range.stop - count, self._range.start + len(self._range) // 2, -count
        ):
            block = range(first, first + count)
            if not self._taken.isdisjoint(block) or any(
                block.start < other.stop and other.start < block.stop for other in self._blocks
            ):
                continue
            self.reserve(block)
            return block
        return None

    def reserve(self, block: range) -> None:
        self._blocks.add(block)

    def give_back(self, block: range) -> None:
        """Those of it that are in use stay so, each until it is freed."""
        self._blocks.discard(block)

    def adopt(self, uid: int) -> None:
        self._taken.add(uid)

    def free(self, uid: int) -> None:
        self._taken.discard(uid)


class Processors:
    """Gives each session the least-loaded processors, as many as its size rounds up to."""

    def __init__(self, available: Iterable[int]) -> None:
        self._load: dict[int, float] = dict.fromkeys(sorted(available), 0.0)

    def take(self, cpu: float) -> list[int]:
        count = min(math.ceil(cpu), len(self._load))
        chosen = sorted(sorted(self._load, key=lambda number: self._load[number])[:count])
        self.adopt(cpu, chosen)
        return chosen

    def adopt(self, cpu: float, chosen: Sequence[int]) -> None:
        for number in chosen:
            if number in self._load:
                self._load[number] += cpu / len(chosen)

    def free(self, cpu: float, chosen: Sequence[int]) -> None:
        for number in chosen:
            if number in self._load:
                self._load[number] -= cpu / len(chosen)
