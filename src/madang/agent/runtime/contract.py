"""What every runtime does; the conformance suite in ``madang.testing`` holds each to it.

A runtime names everything that it makes after the kernel, is idempotent, and survives the death of
any of its processes: after a restart ``adopt`` says what is there.

Files. ``kernel_dir`` of a kernel is readable by the agent and holds one folder for each process,
``io/main`` and
``io/EXEC_ID``: ``log/`` (segments, ``wire.log``), ``keeper.sock`` (see ``launcher.keeper``) while
it
runs, and ``ended.json`` (a ``wire.session.Ended`` as JSON, written atomically) once it has ended.
Session files (work, outputs, home, tmp) belong to the session's own uid; the agent reaches them
only through ``files``.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from madang.wire.kernel import Capacity, ExecSpec, KernelId, KernelSpec, WarmLoad
from madang.wire.policy import Sandbox
from madang.wire.session import Ended, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeFacts:
    """What this runtime can hold on this machine."""

    name: str
    rootless: bool
    enforced: Mapping[str, str]
    """``cpu mem pids disk time network uid seccomp`` → ``cgroup quota watch seccomp none …``

    A kernel's own also has ``policy``, the layers of its sandbox policy, if there are any.
    """
    warnings: tuple[str, ...] = ()
    """In words, each with the mend."""
    capacity: Capacity | None = None
    runtimes: tuple[str, ...] = ()
    """What sessions may choose (``KernelSpec.runtime``), its own choice first; none: just this."""
    networks: tuple[str, ...] = ("none",)
    """Modes of networks that sessions may have."""
    keeps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For each that sessions may choose, the kinds of rules (``policy_kept``) that it keeps."""
    accepts_unkept: bool = False
    """Whether sessions start here, with a warning, though a rule of theirs can't be kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A kernel's files exist, its limits are reserved; nothing runs yet."""

    enforced: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The program was executed (or the idle kernel is ready)."""

    at: float
    timings_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What ``adopt`` sees of one kernel."""

    kernel: KernelId
    prepared: bool
    running: bool
    started_at: float | None = None
    ended: Ended | None = None
    execs: tuple[str, ...] = ()
    enforced: dict[str, str] = field(default_factory=dict)
    """As ``Prepared`` told it."""
    frozen: bool = False
    """Its programs stand still; see ``Runtime.freeze``."""


class Runtime(Protocol):
    """All calls raise RuntimeFailed, LauncherUnavailable, HostLacks or StorageFull, in words."""

    name: str

    async def open(self) -> RuntimeFacts:
        """Connect; say what can be held. Called once, before anything else."""
        ...

    async def close(self) -> None:
        """Let go without stopping anything."""
        ...

    async def prepare(self, kernel: KernelId, spec: KernelSpec) -> Prepared:
        """Make scratch space and reserve. Doing it again changes nothing."""
        ...

    async def start(self, kernel: KernelId, spec: KernelSpec) -> Started:
        """Run ``spec.argv`` as the main program, or idle. Doing it again changes nothing."""
        ...

    async def run(self, kernel: KernelId, spec: KernelSpec) -> tuple[Prepared, Started]:
        """``prepare`` and ``start`` in one: what most kernels need. Doing it again is the same."""
        ...

    async def exec(self, kernel: KernelId, exec_id: str, spec: ExecSpec) -> Started:
        """One more program in a running kernel; SessionNotRunning if it does not run."""
        ...

    async def kill(self, kernel: KernelId) -> None:
        """SIGKILL everything in the kernel, now. No error if nothing runs."""
        ...

    async def freeze(self, kernel: KernelId) -> None:
        """All its programs stand still: they use no CPU and hear nothing, not even SIGTERM.

        Outlives agent and launcher; ``adopt`` tells it. Doing it again changes nothing. Conflict if
        it does not run, HostLacks where this machine can't.
        """
        ...

    async def thaw(self, kernel: KernelId) -> None:
        """Let them go on. Doing it again, or to what was never frozen, changes nothing."""
        ...

    async def guard(self, kernel: KernelId, sandbox: Sandbox) -> tuple[str, ...]:
        """Have the live rules of *sandbox* count for a running kernel, instead of those it has.

        They are in force on return, all or none. Returns the places of those that count only for
        kernels that start from now on. Doing it again changes nothing. Conflict if it does not run,
        PolicyUnkept or HostLacks where this can't be held here: then the former ones still are in
        force.
        """
        ...

    async def usage(self, kernel: KernelId) -> Usage:
        """Of a running kernel; cheap."""
        ...

    async def warmth(self) -> WarmLoad | None:
        """What is kept ready for warm starts; None: nothing ever is."""
        ...

    async def files(self, kernel: KernelId) -> socket.socket:
        """A socket to a file worker that sees the kernel's files with the session's own rights.

        Works while it runs and after it ended, until ``remove``; also between ``prepare`` and
        ``start``.
        Protocol: ``launcher.files``.
        """
        ...

    async def changes(self, kernel: KernelId) -> socket.socket:
        """The same, to a worker that tells what the kernel changed in its root.

        Conflict where it has no root of its own. See ``launcher.changes``.
        """
        ...

    async def adopt(self) -> list[Found]:
        """Everything of ours on this machine, dead or alive."""
        ...

    async def settle(self, kernel: KernelId) -> Ended:
        """After the end: end left-overs, free limits, mounts and network, keep files and output.

        Returns how the main program ended (``ended.json``), or a LOST if nobody saw it.
        """
        ...

    async def remove(self, kernel: KernelId) -> None:
        """End it if it runs; remove all that is left of it. Doing it again changes nothing."""
        ...

    def kernel_dir(self, kernel: KernelId) -> str: ...

    async def wait_change(self) -> None:
        """Returns when some kernel or exec may have started or ended (a hint, may be spurious)."""
        ...
