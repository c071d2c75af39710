"""A launcher of a test's own, and kernels in it: started, waited for, read, removed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import pytest

from madang.agent.keepers import SocketKeepers
from madang.agent.launcher import cgroups, main, mounts, nest, syscalls, warm
from madang.agent.launcher.offers import DOCKER, LACKS, LEAST, NEEDS_ROOT, PACKAGES, Least, find
from madang.agent.launcher.scratch import remove_tree
from madang.agent.runtime import layout
from madang.agent.runtime.contract import Prepared, Runtime, RuntimeFacts, Started
from madang.agent.runtime.native import NativeRuntime
from madang.kit.clock import SystemClock
from madang.testing import docker
from madang.testing.patience import PATIENCE_S
from madang.wire.kernel import NATIVE, ExecSpec, ImageMount, KernelId, KernelSpec
from madang.wire.log import unpack
from madang.wire.session import Ended
from madang.wire.size import MIB, Size

SMALL: Final = Size(cpu=1.0, mem_bytes=256 * MIB, pids=64, disk_bytes=16 * MIB)
HOST: Final = ImageMount(name="host", digest="", kind="host")
PYTHON: Final = ("/usr/bin/python3", "-I", "-S", "-c")
UIDS_EACH: Final = 100
WARM_UIDS_EACH: Final = 1000
_ranges: Final = itertools.count()

_LAUNCHER: Final = """
import json, signal, sys
from madang.agent.launcher import main, mounts, syscalls
mounts.NESTED_UID = int(sys.argv[2])
syscalls.die_with_parent(signal.SIGTERM)
config = json.loads(sys.argv[1])
if network := config.pop("network"):
    with open(network.pop("namespace")) as namespace:
        syscalls.setns(namespace.fileno(), syscalls.CLONE_NEWNET)
config["network"] = main.NetworkConfig(**network)
main.serve(main.LauncherConfig(**config))
"""


class Launcher:
    """A launcher process on a state folder. *uid*: who runs it, root or an ordinary user."""

    def __init__(
        self,
        state: Path,
        *,
        uids: int,
        nested_uid: int = mounts.NESTED_UID,
        warm_bytes: int = 0,
        network: dict[str, Any] | None = None,
        docker_socket: str = "",
    ) -> None:
        """*nested_uid*: what sessions of an ordinary user's launcher take themselves for.
        *network*: fields of ``NetworkConfig``, and the ``namespace`` that is its machine's."""
        self.docker_socket = docker_socket
        self.state = state
        self.nested_uid = nested_uid
        self.network = network or {}
        self.server_uid = uids if os.geteuid() == 0 else os.geteuid()
        self.base_uid = uids + 1
        self.uid_count = (WARM_UIDS_EACH if warm_bytes else UIDS_EACH) - 1
        self.warm_bytes = warm_bytes
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> str:
        return f"{self.state}/run/launcher.sock"

    def start(self) -> None:
        config = {
            "state": str(self.state),
            "server_uid": self.server_uid,
            "base_uid": self.base_uid,
            "uid_count": self.uid_count,
            "slots": 2,
            "warm_bytes": self.warm_bytes,
            "scratch_pool": 2,
            "scratch_default_bytes": SMALL.disk_bytes,
            "network": self.network,
            "docker_socket": self.docker_socket,
        }
        with open(f"{self.state}/launcher.log", "ab") as log:
            argv = [sys.executable, "-c", _LAUNCHER, json.dumps(config), str(self.nested_uid)]
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log, cwd="/")

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Nothing can be written under the state folder; see ``open_launcher(disk=…)``."""
        path = f"{self.state}/ballast"
        fd = os.open(path, os.O_CREAT | os.O_WRONLY)
        try:
            for piece in (1 << 22, 1 << 12):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(fd, os.fstat(fd).st_size, piece)
            yield
        finally:
            os.close(fd)
            os.unlink(path)

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None, "it was started"
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Leave nothing: the launcher, its slots, its groups."""
        assert self.process is not None, "it was started"
        self.process.terminate()
        self.process.wait()
        groups = cgroups.detect(main._group_name(str(self.state)))
        late = time.monotonic() + PATIENCE_S
        while not self._swept(groups):  # Slots see their launcher's end, each in its own time.
            assert time.monotonic() < late, f"groups are left: {groups.names()}"
            time.sleep(0.01)

    def _swept(self, groups: cgroups.Hierarchies) -> bool:
        """Whether nothing is left; ends what a failed test left running."""
        left = [groups.group(name) for name in groups.names()]
        for pid in (pid for group in left for pid in group.processes()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        removed = [group.remove() for group in left]
        if not all(removed) or self.processes():
            return False
        groups.remove()
        return True

    def processes(self) -> list[int]:
        """Processes that run as one of this launcher's session uids."""
        if os.geteuid() != 0:
            return []
        stop = self.base_uid + self.uid_count
        uids: Sequence[int] = range(self.base_uid, stop)
        if self.warm_bytes:  # A block's first two are its nest's own.
            uids = [u for u in uids if (u - stop) % warm.LEAST_UIDS >= nest.OWN_UIDS]
        return [pid for pid, uid in _owners() if uid in uids]

    def runtime(self) -> NativeRuntime:
        """For its sessions, which are warm where they can be if it keeps interpreters warm."""
        kind = WarmRuntime if self.warm_bytes else NativeRuntime
        return kind(self.socket, str(self.state), SystemClock())

    async def wait_clean(self) -> None:
        """Fails if sessions left something behind; the kernel's own clean-up takes its time."""
        late = time.monotonic() + PATIENCE_S
        while left := self.leftovers():
            assert time.monotonic() < late, left
            await asyncio.sleep(0.01)

    def leftovers(self) -> list[str]:
        """What sessions left behind; nothing, once all were removed."""
        found = [f"process {pid}" for pid in self.processes()]
        found += [str(path) for path in (self.state / "kernels").iterdir()]
        found += [f"loop device on {path}" for path in _loops() if f"{self.state}/kernels" in path]
        return found


def _owners() -> Iterator[tuple[int, int]]:
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                yield int(name), os.stat(f"/proc/{name}").st_uid


def _loops() -> Iterator[str]:
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            yield path.read_text().strip()


class ChosenRuntime(NativeRuntime):
    """A launcher whose every session is run by *chosen*."""

    def __init__(self, launcher: Launcher, chosen: str) -> None:
        super().__init__(launcher.socket, str(launcher.state), SystemClock())
        self.chosen = chosen

    async def prepare(self, kernel: KernelId, spec: KernelSpec) -> Prepared:
        return await super().prepare(kernel, replace(spec, runtime=self.chosen))

    async def start(self, kernel: KernelId, spec: KernelSpec) -> Started:
        return await super().start(kernel, replace(spec, runtime=self.chosen))

    async def run(self, kernel: KernelId, spec: KernelSpec) -> tuple[Prepared, Started]:
        return await super().run(kernel, replace(spec, runtime=self.chosen))


def choices() -> list[Any]:
    """Runtimes that can be tried here; the others are printed skips."""
    return [NATIVE, *oci_choices(), _choice(DOCKER, docker.missing())]


def oci_choices() -> list[Any]:
    root = os.geteuid() == 0
    return [_choice(name, find(name)[1] if root else NEEDS_ROOT) for name in PACKAGES]


def _choice(name: str, why: str) -> Any:
    return pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=why))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended and what it wrote."""

    ended: Ended
    out: bytes
    err: bytes

    @property
    def code(self) -> int | None:
        return self.ended.exit_code


@dataclass
class Sessions:
    """Kernels of one test in one runtime; all are removed at its end."""

    runtime: Runtime
    facts: RuntimeFacts
    launcher: Launcher | None = None
    keepers: SocketKeepers = field(default_factory=SocketKeepers)
    kernels: list[KernelId] = field(default_factory=list)

    @property
    def chosen(self) -> str:
        """Which of the launcher's runtimes it is."""
        return self.runtime.chosen if isinstance(self.runtime, ChosenRuntime) else NATIVE

    @property
    def least(self) -> Least:
        """What the runtime itself takes."""
        return LEAST.get(self.chosen, Least())

    def lacks(self, promise: str) -> str:
        """Why this runtime can't keep *promise*; empty: it does."""
        return LACKS.get(self.chosen, {}).get(promise, "")

    def holds(self, limit: str) -> bool:
        """Whether this runtime enforces *limit* on this machine."""
        return self.facts.enforced.get(limit, "none") not in {"none", "watch", "shared"}

    async def prepare(self, spec: KernelSpec) -> KernelId:
        kernel = KernelId(secrets.token_hex(8), 1)
        self.kernels.append(kernel)
        await self.runtime.prepare(kernel, spec)
        return kernel

    async def start(self, *argv: str, **more: Any) -> KernelId:
        """Start a program; see ``spec``."""
        asked = spec(*argv, **more)
        kernel = await self.prepare(asked)
        await self.runtime.start(kernel, asked)
        return kernel

    async def run(self, *argv: str, **more: Any) -> Outcome:
        """Start a program and see it end."""
        return await self.outcome(await self.start(*argv, **more))

    async def python(self, code: str, *arguments: str, **more: Any) -> Outcome:
        return await self.run(*PYTHON, code, *arguments, **more)

    async def exec(self, kernel: KernelId, name: str, *argv: str, **more: Any) -> Outcome:
        await self.runtime.exec(kernel, name, ExecSpec(argv=argv, **more))
        return await self.outcome(kernel, name)

    async def outcome(
        self, kernel: KernelId, name: str = "main", patience_s: float = PATIENCE_S
    ) -> Outcome:
        """Wait for the end of the program, or exec *name*; settles the kernel after main."""
        folder = self.io(kernel, name)
        async with asyncio.timeout(patience_s):
            await self.gone(kernel, name)
            if name == "main":
                await self.runtime.settle(kernel)
        ended = layout.read_ended(folder)
        assert ended is not None, f"{kernel} has no ended.json"
        return Outcome(ended, *read_output(folder))

    async def gone(self, kernel: KernelId, name: str = "main") -> None:
        """Wait until nobody keeps the program any more."""
        async for news in self.keepers.watch(self.io(kernel, name)):
            if news.ended:
                return

    async def until(self, kernel: KernelId, text: bytes, name: str = "main") -> bytes:
        """Wait until the program has written *text*; all that it has written."""
        folder = self.io(kernel, name)
        async with asyncio.timeout(PATIENCE_S):
            async with contextlib.aclosing(self.keepers.watch(folder)) as news:
                async for _ in news:
                    if text in (written := b"".join(read_output(folder))):
                        return written
        raise AssertionError(f"ended before {text!r}: {read_output(folder)!r}")

    def output(self, kernel: KernelId, name: str = "main") -> tuple[bytes, bytes]:
        """What it has written to stdout and stderr so far, as far as it is kept."""
        return read_output(self.io(kernel, name))

    def io(self, kernel: KernelId, name: str = "main") -> str:
        return f"{self.runtime.kernel_dir(kernel)}/io/{name}"

    async def close(self) -> None:
        async with asyncio.TaskGroup() as group:
            for kernel in self.kernels:
                group.create_task(self.runtime.remove(kernel))
        self.kernels.clear()


def spec(*argv: str, **more: Any) -> KernelSpec:
    """A small kernel. Fields of Size may be given too: ``pids=8``."""
    sizes = {key: more.pop(key) for key in Size.__dataclass_fields__ if key in more}
    return KernelSpec(argv=argv, size=replace(SMALL, **sizes), **({"image": HOST} | more))


EXECUTE: Final = """
import os, signal, sys
for number in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


class WarmRuntime(NativeRuntime):
    """Every program that can be is a fork of a warm interpreter, or executed by one."""

    async def open(self) -> RuntimeFacts:
        facts = await super().open()
        async with asyncio.timeout(PATIENCE_S):
            while (warm := await self.warmth()) is not None and not warm.ready:
                asked = spec("python3", "-c", "pass")
                kernel = KernelId(secrets.token_hex(8), 1)
                await self.prepare(kernel, asked)
                await self.start(kernel, asked)
                await self.remove(kernel)
        return facts

    async def prepare(self, kernel: KernelId, spec: KernelSpec) -> Prepared:
        return await super().prepare(kernel, _warmed(spec))

    async def start(self, kernel: KernelId, spec: KernelSpec) -> Started:
        return await super().start(kernel, _warmed(spec))

    async def run(self, kernel: KernelId, spec: KernelSpec) -> tuple[Prepared, Started]:
        return await super().run(kernel, _warmed(spec))


async def warm_starts(runtime: Runtime) -> int:
    """How many there were."""
    found = await runtime.warmth()
    assert found is not None, "nothing is kept warm here"
    return found.starts


def _warmed(spec: KernelSpec) -> KernelSpec:
    argv = spec.argv
    if argv and argv[0] == PYTHON[0]:
        argv = ("python3", *(word for word in argv[1:] if word not in PYTHON[1:3]))
    elif argv and argv[0].startswith("/bin/") and os.path.isfile(argv[0]):
        argv = ("python3", "-c", EXECUTE, *argv)
    return replace(spec, argv=argv)


def numpy_image(state: Path) -> ImageMount:
    """An image with this interpreter's numpy in one layer, for the machine's own Python.

    Raises LookupError, in words, where there is none or it is made for another version.
    """
    try:
        import numpy as np
    except ImportError as exc:
        raise LookupError("numpy is not installed") from exc
    own = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if os.path.basename(os.path.realpath(PYTHON[0])) != own:
        raise LookupError(f"numpy is installed for {own}, which is not the machine's Python")
    packages = Path(np.__file__).parent.parent
    digest = hashlib.sha256(b"numpy").hexdigest()
    target = state / "layers" / digest / "site-packages"
    for name in ("numpy", "numpy.libs"):
        if not (target / name).exists():
            shutil.copytree(packages / name, target / name, copy_function=_link)
    env = {"PYTHONPATH": "/env/site-packages"}
    return ImageMount(name="numpy", digest=digest, kind="layers", layers=(digest,), env=env)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_output(folder: str) -> tuple[bytes, bytes]:
    """What a program wrote to stdout and stderr, as far as it is kept."""
    streams = {1: bytearray(), 2: bytearray()}
    for path in sorted(Path(folder, "log").iterdir()):
        records, _ = unpack(path.read_bytes(), int(path.name))
        for record in records:
            streams[record.stream] += record.data
    return bytes(streams[1]), bytes(streams[2])


@asynccontextmanager
async def sessions(runtime: Runtime, launcher: Launcher | None = None) -> AsyncIterator[Sessions]:
    """Kernels for a test; afterwards nothing of them is left."""
    found = Sessions(runtime, await runtime.open(), launcher)
    try:
        yield found
    finally:
        await found.close()
        await runtime.close()
    if launcher is not None:
        await launcher.wait_clean()


def own_uids(*, warm: bool = False) -> int:
    """First uid of a range that no launcher of this or another test process uses."""
    if warm:
        return 2_040_000_000 + os.getpid() % 10_000 * 10_000 + next(_ranges) % 10 * WARM_UIDS_EACH
    return 2_000_100_000 + os.getpid() % 20_000 * 1_000 + next(_ranges) % 10 * UIDS_EACH


@contextlib.contextmanager
def open_launcher(
    *,
    disk: str | None = None,
    nested_uid: int = mounts.NESTED_UID,
    warm_bytes: int = 0,
    network: dict[str, Any] | None = None,
    docker_socket: str = "",
) -> Iterator[Launcher]:
    """A launcher on a new state folder that others may pass: keepers and sessions are others.

    Not in pytest's own folders: every run of it closes them. *disk*: on a disk of that size
    (``400m``), for root. *network*: see ``Launcher``.
    """
    folder = Path(tempfile.mkdtemp(prefix="madang-test-"))
    folder.chmod(0o711)
    try:
        with _small_disk(folder, disk):
            for name in ("kernels", "layers", "tools", "run"):
                (folder / "state" / name).mkdir(0o755, parents=True)
            launcher = Launcher(
                folder / "state",
                uids=own_uids(warm=warm_bytes > 0),
                nested_uid=nested_uid,
                warm_bytes=warm_bytes,
                network=network,
                docker_socket=docker_socket,
            )
            launcher.start()
            try:
                yield launcher
            finally:
                launcher.stop()
    finally:
        remove_tree(str(folder))


@contextlib.contextmanager
def _small_disk(folder: Path, size: str | None) -> Iterator[None]:
    if size is None:
        yield
        return
    target = os.fsencode(folder)
    syscalls.mount(b"tmpfs", target, b"tmpfs", 0, f"size={size},mode=711".encode())
    try:
        yield
    finally:
        syscalls.umount(target)
