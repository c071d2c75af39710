"""Control groups of version 1, 2, or both at once: limits, counters, freezing.

Each slot has a group of its own, ``BASE/SLOT`` in every hierarchy used. The processes join by
themselves (``join``): a join waits for an RCU grace period on an idle machine, and so it happens
before a session wants to start.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass, field
from typing import Final

from madang.wire.size import Size

WANTED: Final = ("memory", "cpu", "cpuacct", "cpuset", "pids", "freezer")
UNIFIED: Final = "unified"
"""Not a controller: beside version 1, the hierarchy of version 2 has a group for each slot too. No
limit is set there, but programs that judge addresses can be attached (``fence``)."""
_V2: Final[tuple[str, ...]] = ("memory", "cpu", "cpuset", "pids")
_PERIOD_US: Final = 100_000
_PART: Final = 64 * 1024


def read(path: str) -> str:
    """The content of a control file, empty where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    data = b""
    try:
        while part := os.read(fd, _PART):
            data += part
    except OSError:
        return ""
    finally:
        os.close(fd)
    return data.decode("ascii", "replace").strip()


def write(path: str, value: object) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)


def try_write(path: str, value: object) -> bool:
    try:
        write(path, value)
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What a group has used; None where the kernel doesn't tell."""

    cpu_s: float | None = None
    mem_bytes: int | None = None
    mem_peak_bytes: int | None = None
    oom_kills: int = 0
    pids: int | None = None
    pids_denied: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One session's group. ``paths``: controller → folder; all the same folder in version 2."""

    version: int
    paths: dict[str, str] = field(default_factory=dict)
    own: int = 1
    """How many processes of ours are in it, beside the session's: its init, or two."""

    @property
    def folders(self) -> list[str]:
        return sorted(set(self.paths.values()))

    @property
    def net_folder(self) -> str | None:
        """The folder of version 2; None where there is none."""
        return next(iter(self.folders), None) if self.version == 2 else self.paths.get(UNIFIED)

    def join(self, pid: int = 0) -> None:
        """Move a process in, by default the one that calls."""
        for folder in self.folders:
            write(f"{folder}/cgroup.procs", pid)

    def limit(self, size: Size, cpus: list[int]) -> None:
        """Write the limits. Raises OSError if a controller that we have refuses."""
        (self._limit_v2 if self.version == 2 else self._limit_v1)(size)
        if "cpuset" in self.paths and cpus:
            write(f"{self.paths['cpuset']}/cpuset.cpus", ",".join(map(str, cpus)))
        if "pids" in self.paths:
            write(f"{self.paths['pids']}/pids.max", size.pids + self.own)

    def _limit_v1(self, size: Size) -> None:
        if memory := self.paths.get("memory"):
            write(f"{memory}/memory.limit_in_bytes", size.mem_bytes)
            if not try_write(f"{memory}/memory.memsw.limit_in_bytes", size.mem_bytes):
                try_write(f"{memory}/memory.swappiness", 0)
        if cpu := self.paths.get("cpu"):
            write(f"{cpu}/cpu.cfs_period_us", _PERIOD_US)
            write(f"{cpu}/cpu.cfs_quota_us", _quota(size.cpu))

    def _limit_v2(self, size: Size) -> None:
        if memory := self.paths.get("memory"):
            write(f"{memory}/memory.max", size.mem_bytes)
            try_write(f"{memory}/memory.swap.max", 0)
        if cpu := self.paths.get("cpu"):
            write(f"{cpu}/cpu.max", f"{_quota(size.cpu)} {_PERIOD_US}")

    def counters(self) -> Counters:
        """Cheap; works as an ordinary user."""
        pids = self.paths.get("pids", "")
        common = {
            "pids": _number(read(f"{pids}/pids.current"), -self.own),
            "pids_denied": _entry(read(f"{pids}/pids.events"), "max"),
        }
        folder = self.paths.get("memory", "")
        if self.version == 2:
            usage = _entry(read(f"{self.paths.get('cpu', '')}/cpu.stat"), "usage_usec", None)
            return Counters(
                cpu_s=None if usage is None else usage / 1e6,
                mem_bytes=_number(read(f"{folder}/memory.current")),
                mem_peak_bytes=_number(read(f"{folder}/memory.peak")),
                oom_kills=_entry(read(f"{folder}/memory.events"), "oom_kill") or 0,
                pids=common["pids"],
                pids_denied=common["pids_denied"] or 0,
            )
        used = _number(read(f"{self.paths.get('cpuacct', '')}/cpuacct.usage"))
        return Counters(
            cpu_s=None if used is None else used / 1e9,
            mem_bytes=_number(read(f"{folder}/memory.usage_in_bytes")),
            mem_peak_bytes=_number(read(f"{folder}/memory.max_usage_in_bytes")),
            oom_kills=_entry(read(f"{folder}/memory.oom_control"), "oom_kill") or 0,
            pids=common["pids"],
            pids_denied=common["pids_denied"] or 0,
        )

    def processes(self) -> list[int]:
        found: set[int] = set()
        for folder in self.folders:
            found.update(map(int, read(f"{folder}/cgroup.procs").split()))
        return sorted(found)

    def freeze(self) -> bool:
        """False where there is no freezer."""
        return self._set_frozen("FROZEN", 1)

    def thaw(self) -> bool:
        return self._set_frozen("THAWED", 0)

    def _set_frozen(self, v1: str, v2: int) -> bool:
        file = self._freezer
        return file is not None and try_write(file, v2 if self.version == 2 else v1)

    @property
    def frozen(self) -> bool:
        """Whether it is frozen, or about to be."""
        file = self._freezer
        return file is not None and read(file) in {"FROZEN", "FREEZING", "1"}

    @property
    def can_freeze(self) -> bool:
        return self._freezer is not None

    @property
    def _freezer(self) -> str | None:
        if self.version == 2:
            return next((f"{folder}/cgroup.freeze" for folder in self.folders), None)
        freezer = self.paths.get("freezer")
        return None if freezer is None else f"{freezer}/freezer.state"

    def remove(self) -> bool:
        """Whether nothing is left; False: processes are still in it, try again."""
        left = [folder for folder in self.folders if not _remove_folder(folder)]
        return not left


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchies:
    """Where groups can be made on this machine. ``version`` 0: nowhere."""

    version: int
    bases: dict[str, str] = field(default_factory=dict)
    """Controller → our folder, parent of all groups."""
    inherits: bool = True
    """New groups have their parent's processors; else (some of version 1) we must write them."""

    def group(self, name: str) -> Group:
        paths = {controller: f"{base}/{name}" for controller, base in self.bases.items()}
        return Group(version=self.version, paths=paths)

    def make(self, name: str) -> Group:
        """A new, empty group. One cpuset for all cpus until it is limited."""
        group = self.group(name)
        for folder in group.folders:
            os.mkdir(folder)
        if not self.inherits:
            _inherit_cpuset(self.bases["cpuset"], group.paths["cpuset"])
        return group

    def names(self) -> set[str]:
        """Groups that exist, ours and only ours."""
        found: set[str] = set()
        for base in set(self.bases.values()):
            with contextlib.suppress(FileNotFoundError), os.scandir(base) as entries:
                found.update(entry.name for entry in entries if entry.is_dir())
        return found

    def remove(self) -> None:
        """Remove our parent folders, if empty."""
        for base in set(self.bases.values()):
            _remove_folder(base)


NOWHERE: Final = Hierarchies(version=0)


def detect(
    name: str, mounts: str = "/proc/self/mounts", own: str = "/proc/self/cgroup"
) -> Hierarchies:
    """Find the hierarchies and make our folder *name* in them."""
    v1, v2 = _mounted(read(mounts))
    if v1:
        bases = {c: base for c, root in v1.items() if (base := _make_base_v1(c, root, name))}
        if "memory" in bases or "cpu" in bases:
            cpuset = bases.get("cpuset")
            inherits = not cpuset or try_write(f"{cpuset}/cgroup.clone_children", 1)
            if v2 and (beside := _make_folder(f"{v2}/{name}")):
                bases[UNIFIED] = beside
            return Hierarchies(version=1, bases=bases, inherits=inherits)
    if v2:
        parent = v2 if os.geteuid() == 0 and is_init_user_namespace() else v2 + _own_v2(read(own))
        return _make_base_v2(parent.rstrip("/"), name)
    return NOWHERE


def has_v2() -> bool:
    """Whether version 2 is mounted, alone or beside version 1."""
    return _mounted(read("/proc/self/mounts"))[1] is not None


def _mounted(text: str) -> tuple[dict[str, str], str | None]:
    v1: dict[str, str] = {}
    v2: str | None = None
    for line in text.splitlines():
        _source, target, kind, options = line.split()[:4]
        if kind == "cgroup":
            v1.update({c: target for c in options.split(",") if c in WANTED and c not in v1})
        elif kind == "cgroup2" and v2 is None:
            v2 = target
    return v1, v2


def is_init_user_namespace() -> bool:
    return read("/proc/self/uid_map").split() == ["0", "0", "4294967295"]


def _own_v2(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("0::")]
    return lines[0][3:] if lines else ""


def _make_base_v1(controller: str, root: str, name: str) -> str | None:
    base = f"{root}/{name}"
    try:
        os.makedirs(base, exist_ok=True)
        if controller == "cpuset":
            _inherit_cpuset(root, base)
    except OSError:
        return None
    return base


def _inherit_cpuset(parent: str, child: str) -> None:
    for file in ("cpuset.cpus", "cpuset.mems"):
        if not read(f"{child}/{file}"):
            write(f"{child}/{file}", read(f"{parent}/{file}"))


def _make_folder(path: str) -> str | None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError:
        return None
    return path


def _make_base_v2(parent: str, name: str) -> Hierarchies:
    base = f"{parent}/{name}"
    try:
        os.makedirs(base, exist_ok=True)
    except OSError:
        return NOWHERE
    for folder in (parent, base):
        for controller in _V2:
            try_write(f"{folder}/cgroup.subtree_control", f"+{controller}")
    has = read(f"{base}/cgroup.subtree_control").split()
    bases = {controller: base for controller in _V2 if controller in has}
    return Hierarchies(version=2, bases=bases) if bases else NOWHERE


def _remove_folder(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return True
    except OSError as exc:
        if exc.errno not in {errno.EBUSY, errno.ENOTEMPTY}:
            raise
        return False
    return True


def _quota(cpu: float) -> int:
    return max(1000, round(cpu * _PERIOD_US))


def _number(text: str, add: int = 0) -> int | None:
    return max(0, int(text) + add) if text.isdecimal() else None


def _entry(text: str, key: str, default: int | None = 0) -> int | None:
    """``key value`` lines."""
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdecimal():
            return int(value)
    return default
