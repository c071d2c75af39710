"""Warm starts: which sessions get a fork of an interpreter, and which interpreters there are.

An interpreter (see ``nest``) belongs to one owner, one image, one number of processors and one
sandbox policy; no two of them share anything but files of the machine. It is made after the first
start that could have used one, and ends when it was not used for a while, when memory is short, or
when the budget is needed for another. A session that can't have one, for whatever reason, starts
cold: with the same words, the same view and the same limits.
"""

from __future__ import annotations

import math
import os
import selectors
import socket
import time
from base64 import b64encode
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from madang.agent.launcher import channel, pressure, seccomp
from madang.agent.launcher.cgroups import Group, Hierarchies
from madang.agent.launcher.failures import Failures
from madang.agent.launcher.mounts import Templates
from madang.agent.launcher.nest import OWN_UIDS
from madang.agent.launcher.order import Berth, Order, View
from madang.agent.launcher.processes import ProcessId, say
from madang.agent.launcher.registry import Uids
from madang.agent.launcher.slots import Slot, Slots
from madang.agent.launcher.timers import Timers
from madang.agent.launcher.workers import Workers
from madang.wire.errors import PlatformError
from madang.wire.image import ImageKind
from madang.wire.kernel import NATIVE, KernelSpec
from madang.wire.policy import Sandbox
from madang.wire.size import MIB, Size

PROGRAMS: Final = ("python", "python3")
FOREIGN: Final = (
    *("PYTHON", "LD_", "LC_", "LANG", "LOCPATH", "NLSPATH", "TZ", "MALLOC_", "GLIBC_", "PATH"),
    *("HOME", "TMP", "TEMP", "XDG_", "SSL_", "OPENSSL_", "OMP_", "GOMP_", "KMP_", "MKL_"),
    *("OPENBLAS_", "GOTO_", "BLIS_", "VECLIB_", "NUMEXPR_", "NPY_", "NUMPY_", "TORCH", "PYTORCH_"),
    *("ATEN_", "C10_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "HSA_", "NCCL_", "TRITON_", "TF_"),
    *("XLA_", "JAX_", "HF_", "TRANSFORMERS_", "MPL", "NUMBA_", "POLARS_", "ARROW_"),
)
"""Beginnings of variables that are read when an interpreter starts or a module is imported: a
session that sets one starts cold."""
IDLE_S: Final = 600.0
"""Who was not used for so long ends."""
IMPORT_S: Final = 60.0
"""Who has not imported everything by then is ended."""
MOST_READY: Final = 4
"""Forks made ahead for one interpreter."""
_RECENT_S: Final = 20.0
"""As many forks are kept ready as were used so lately, up to MOST_READY."""
_REFILL_S: Final = 0.03
_LOOK_S: Final = 5.0
_STRIKES: Final = 2
"""So many forks in a row that did not become programs, and the interpreter ends."""
_LEAST_BYTES: Final = 16 * MIB
"""What an interpreter of unknown size is taken to need."""
_PIDS: Final = 64
_BLOCKS: Final = 100
"""Into so many the uids are cut; half of them may be nests'."""
LEAST_UIDS: Final = 40

Key = tuple[str, str, tuple[str, ...], tuple[tuple[str, str], ...], tuple[str, ...], int, Any]


def key_of(spec: KernelSpec) -> Key | None:
    """Which interpreter can become the session's program; None: none can."""
    argv, policy = spec.argv, spec.sandbox
    if spec.runtime not in {"", NATIVE} or spec.network or policy.live or policy.writes:
        return None
    if spec.image.kind == ImageKind.ROOT:
        return None
    if spec.build or policy.widen or len(argv) < 2 or argv[0] not in PROGRAMS:
        return None
    if argv[1] in {"-c", "-m"}:
        if len(argv) < 3:
            return None
    elif argv[1].startswith("-") or not argv[1]:
        return None
    if any(name.startswith(FOREIGN) for name in spec.env):
        return None
    image, rules = spec.image, spec.sandbox.rules
    variables = tuple(sorted(image.env.items()))
    count = max(1, math.ceil(spec.size.cpu))
    return (spec.owner, image.kind, image.layers, variables, image.warm, count, rules)


def name_of(block: range) -> str:
    """Of a nest's group: it tells a later launcher which uids are its."""
    return f"n{block.start}-{len(block)}-{os.urandom(3).hex()}"


def block_of(name: str) -> range:
    first, count, _ = name.removeprefix("n").split("-")
    return range(int(first), int(first) + int(count))


@dataclass(eq=False, slots=True, kw_only=True)
class Nest:
    """One interpreter, its holder, and forks that wait."""

    key: Key
    name: str
    group: Group
    block: range
    holder_link: socket.socket
    link: socket.socket
    """To the interpreter: whatever comes from there is an image's word."""
    holder: ProcessId | None = None
    view: View
    """Of its image, whose template must stay mounted; as seen from the folder of kernels."""
    template: str
    namespaces: tuple[int, int] | None = None
    """Descriptors of the user and PID namespaces that its slots are made in."""
    ready: bool = False
    over: bool = False
    strikes: int = 0
    began: float = field(default_factory=time.monotonic)
    starts: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_READY))
    slots: list[Slot] = field(default_factory=list)
    pss_bytes: int = 0

    @property
    def used_at(self) -> float:
        return self.starts[-1] if self.starts else self.began

    @property
    def wanted(self) -> int:
        """Forks to keep ready."""
        now = time.monotonic()
        return max(1, sum(now - at < _RECENT_S for at in self.starts))

    def offer(self, hurry: bool, fds: Sequence[int]) -> None:
        """A slot's seat. Lost where it does not read: then the slot's init waits in vain."""
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        try:
            socket.send_fds(self.link, [b"h" if hurry else b"s"], list(fds), flags)
        except OSError:
            pass


class Warmth:
    """All nests of this launcher, and the groups of those that older ones left."""

    def __init__(
        self,
        *,
        state: str,
        budget_bytes: int,
        uids: Uids | None,
        cpus: Sequence[int],
        hierarchies: Hierarchies,
        templates: Templates,
        slots: Slots,
        workers: Workers,
        selector: selectors.BaseSelector,
        timers: Timers,
    ) -> None:
        """*uids* None, or no budget: never warm."""
        self._state = state
        self._budget_bytes = budget_bytes if uids is not None else 0
        self._uids = uids
        self._cpus = sorted(cpus)
        self._hierarchies = hierarchies
        self._templates = templates
        self._slots = slots
        self._workers = workers
        self._selector = selector
        self._timers = timers
        self._nests: dict[Key, Nest] = {}
        self._sessions: Counter[str] = Counter()
        """Name of a nest → sessions that live in it, so that its holder must."""
        self._failures: Failures[Key] = Failures()
        self._sizes: dict[Key, int] = {}
        self._starts = 0
        self._looking = False
        self._measuring = False

    # -- sessions ----------------------------------------------------------------------------

    def take_uid(self, spec: KernelSpec) -> int | None:
        """One that the session's interpreter can give it; None: any will do."""
        nest = self._find(spec)
        if nest is None or self._uids is None:
            return None
        uid = self._uids.take_from(nest.block[OWN_UIDS:])
        if uid is None:  # Ended sessions have theirs until they are removed.
            self._retire(nest)
        return uid

    def take(self, spec: KernelSpec, uid: int) -> Slot | None:
        """A slot in which a fork waits, or will soon. None: the session starts cold."""
        nest = self._find(spec)
        if nest is None or not nest.ready or uid not in nest.block:
            return None
        try:
            slot = nest.slots.pop(0) if nest.slots else self._make(nest, hurry=True)
        except PlatformError as exc:
            say(f"launcher: {exc.text}")
            return None
        slot.pool = None
        self._starts += 1
        return slot

    def _find(self, spec: KernelSpec) -> Nest | None:
        key = key_of(spec) if self._budget_bytes else None
        return None if key is None else self._nests.get(key)

    def note_start(self, spec: KernelSpec) -> None:
        """A session has started: the next one like it may be warm."""
        key = key_of(spec) if self._budget_bytes else None
        if key is None:
            return
        nest = self._nests.get(key)
        if nest is None:
            self._timers.after(_REFILL_S, partial(self._begin, key, spec))
        else:
            nest.starts.append(time.monotonic())
            self._timers.after(_REFILL_S, partial(self._fill, nest))

    def join(self, name: str) -> None:
        """A session lives in the nest *name*; an older launcher's, perhaps."""
        if self._uids is not None and not self._sessions[name]:
            self._uids.reserve(block_of(name))
        self._sessions[name] += 1

    def leave(self, name: str) -> None:
        """One of its sessions has ended, and nothing of it is left."""
        self._sessions[name] -= 1
        self._sweep(name)

    def _sweep(self, name: str) -> None:
        """End the holder that nobody needs."""
        if self._sessions[name] > 0 or any(nest.name == name for nest in self._nests.values()):
            return
        del self._sessions[name]

        def gone(empty: bool) -> None:
            if empty and self._uids is not None and not self._sessions[name]:
                self._uids.give_back(block_of(name))

        self._slots.clear_group(self._hierarchies.group(name), gone)

    def templates(self) -> set[str]:
        """Those in use."""
        return {nest.template for nest in self._nests.values()}

    # -- nests -------------------------------------------------------------------------------

    def _begin(self, key: Key, spec: KernelSpec) -> None:
        """Make an interpreter, if there is room and none failed lately."""
        if key in self._nests or self._uids is None:
            return
        if self._failures.holds(key) or pressure.is_short():
            return
        if not self._make_room(self._sizes.get(key, _LEAST_BYTES)):
            return
        block = self._uids.take_block(max(LEAST_UIDS, len(self._uids) // _BLOCKS))
        if block is None:
            self._end_oldest()  # For the next start.
            return
        try:
            self._nests[key] = self._found(key, spec, block)
        except (OSError, PlatformError) as exc:
            self._failures.note(key)
            self._uids.give_back(block)
            say(f"launcher: no interpreter can be kept warm: {exc}")
        self._look_later()

    def _found(self, key: Key, spec: KernelSpec, block: range) -> Nest:
        name = name_of(block)
        group = self._hierarchies.make(name)
        holder_link, theirs = channel.pair()
        link, interpreter = channel.pair()
        try:
            with theirs, interpreter:
                order = self._order(spec, block, group)
                memory = channel.to_memory(order.to_json())
                try:
                    child = self._slots.fork_nest(theirs, interpreter, memory)
                finally:
                    os.close(memory)
        except BaseException:
            holder_link.close()
            link.close()
            self._slots.clear_group(group, lambda _: None)
            raise
        self._bury(os.pidfd_open(child))
        assert order.view is not None
        nest = Nest(
            key=key,
            name=name,
            group=group,
            block=block,
            holder_link=holder_link,
            link=link,
            view=order.view,
            template=self._templates.template(spec.image.kind, spec.image.layers),
        )
        nest.starts.append(nest.began)
        for sock, heard in ((holder_link, self._hear_holder), (link, self._hear_interpreter)):
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ, partial(heard, nest))
        self._timers.after(IMPORT_S, partial(self._check_begun, nest))
        return nest

    def _order(self, spec: KernelSpec, block: range, group: Group) -> Order:
        """What the interpreter sees: a session's view, of a session with nothing in it."""
        count = max(1, math.ceil(spec.size.cpu))
        cpus = self._cpus[:count]
        size = Size(cpu=count, mem_bytes=self._budget_bytes, pids=_PIDS, disk_bytes=16 * MIB)
        group.limit(size, cpus)
        mounts = f"{self._state}/mounts"
        shown = KernelSpec(argv=(), image=spec.image, size=size)
        view = self._templates.view(shown, f"{mounts}/empty")
        rules = Sandbox(rules=spec.sandbox.rules, widen=("enter-namespaces",))
        return Order(
            kernel="warm",
            spec=shown,
            io="",
            scratch="../mounts/warm",
            scratch_enforced="watch",
            group=group,
            cpus=cpus,
            uid=block.start + 1,
            nest_uids=len(block),
            program=b64encode(seccomp.program(sandbox=rules)).decode(),
            view=view.relative(self._state),
        )

    def _hear_holder(self, nest: Nest, _events: int) -> None:
        message, fds = channel.receive(nest.holder_link)
        for fd in fds:
            os.close(fd)
        if message is None:
            self._retire(nest, "its holder was killed")
        elif "failed" in message:
            self._retire(nest, str(message["failed"])[:500])
        else:
            self._know_holder(nest, int(message["holder"]))

    def _know_holder(self, nest: Nest, pid: int) -> None:
        nest.holder = ProcessId.of(pid)
        fd = nest.holder.open() if nest.holder is not None else None
        if fd is None:
            self._retire(nest, "its holder was killed")
            return
        self._bury(fd)
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            user = os.open(f"/proc/{pid}/ns/user", flags)
            nest.namespaces = (user, os.open(f"/proc/{pid}/ns/pid", flags))
        except OSError as exc:
            self._retire(nest, str(exc))
            return
        if ProcessId.of(pid) != nest.holder:
            self._retire(nest, "its holder was killed")

    def _hear_interpreter(self, nest: Nest, _events: int) -> None:
        """Ready, or the end: anything else is the end too."""
        try:
            said = nest.link.recv(1000)  # Descriptors that come along are dropped.
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if said == b"R" and not nest.ready and nest.namespaces is not None:
            nest.ready = True
            self._fill(nest)
            self._look_later()
        elif said.startswith(b"F"):
            self._retire(nest, repr(said[1:500].decode("utf-8", "replace")))
        else:
            self._retire(nest, "its interpreter ended" if not said else "it talks nonsense")

    def _check_begun(self, nest: Nest) -> None:
        if not nest.ready and not nest.over:
            self._retire(nest, f"it has not imported everything after {IMPORT_S:.0f} s")

    def _retire(self, nest: Nest, why: str = "") -> None:
        """Sessions in it go on; *why*: it failed, and is not made again at once."""
        if nest.over:
            return
        nest.over, nest.ready = True, False
        if why:
            wait_s = self._failures.note(nest.key)
            say(f"launcher: image {nest.key[1]}: no warm starts for {wait_s:.0f} s: {why}")
        del self._nests[nest.key]
        for sock in (nest.holder_link, nest.link):
            self._selector.unregister(sock)
            sock.close()
        for fd in nest.namespaces or ():
            os.close(fd)
        nest.namespaces = None
        for slot in nest.slots:
            self._slots.drop(slot)
        nest.slots.clear()
        self._sweep(nest.name)

    def _bury(self, fd: int) -> None:
        """Our child by descriptor, once it has died."""

        def dead(_events: int) -> None:
            self._selector.unregister(fd)
            try:
                os.waitid(os.P_PIDFD, fd, os.WEXITED)
            except ChildProcessError:
                pass
            os.close(fd)

        self._selector.register(fd, selectors.EVENT_READ, dead)

    # -- forks made ahead --------------------------------------------------------------------

    def _make(self, nest: Nest, *, hurry: bool = False) -> Slot:
        """*hurry*: a session waits for it."""
        assert nest.namespaces is not None
        berth = Berth(*nest.namespaces, nest.view, hurry)
        offer, miss = partial(nest.offer, hurry), partial(self._miss, nest)
        slot = self._slots.make(nest.slots, berth, offer, miss)
        slot.nest = nest.name
        slot.became = partial(self._trust, nest)
        return slot

    def _trust(self, nest: Nest) -> None:
        """One of its forks has become a program: what failed before was a slow machine's fault."""
        nest.strikes = 0
        self._failures.forgive(nest.key)

    def _miss(self, nest: Nest) -> None:
        nest.strikes += 1
        if nest.strikes >= _STRIKES:
            self._timers.after(0.0, partial(self._retire, nest, "its interpreter does not fork"))

    def _fill(self, nest: Nest) -> None:
        """One at a time, so that requests in between are not kept waiting."""
        if not nest.ready or len(nest.slots) >= nest.wanted:
            return
        try:
            nest.slots.append(self._make(nest))
        except PlatformError as exc:
            say(f"launcher: {exc.text}")
            return
        self._timers.after(_REFILL_S, partial(self._fill, nest))

    # -- memory ------------------------------------------------------------------------------

    def report(self) -> dict[str, int]:
        """Figures of what is kept; ``starts`` were warm since this launcher began."""
        nests = self._nests.values()
        return {
            "budget_bytes": self._budget_bytes,
            "used_bytes": sum(nest.pss_bytes for nest in nests),
            "interpreters": len(nests),
            "ready": sum(nest.ready for nest in nests),
            "forks": sum(len(nest.slots) for nest in nests),
            "starts": self._starts,
        }

    def _look_later(self) -> None:
        if not self._looking and self._nests:
            self._looking = True
            self._timers.after(_LOOK_S, self._look)

    def _look(self) -> None:
        self._looking = False
        now = time.monotonic()
        for nest in list(self._nests.values()):
            if now - nest.used_at > IDLE_S:
                self._retire(nest)
            elif len(nest.slots) > nest.wanted:
                self._slots.drop(nest.slots.pop())
        if pressure.is_short():
            self._end_oldest()
        self._measure()
        self._look_later()

    def _measure(self) -> None:
        if self._measuring or not self._nests:
            return
        self._measuring = True
        nests = list(self._nests.values())
        pids = [
            [*nest.group.processes(), *(pid for slot in nest.slots for pid in slot.processes())]
            for nest in nests
        ]

        def measured(result: Any) -> None:
            self._measuring = False
            if not isinstance(result, PlatformError):
                for nest, found in zip(nests, result, strict=True):
                    nest.pss_bytes = self._sizes[nest.key] = found
                self._make_room(0)

        self._workers.run("measure", pids, done=measured)

    def _make_room(self, more_bytes: int) -> bool:
        """End those that were not used for longest; whether *more_bytes* fit then."""
        while self.report()["used_bytes"] + more_bytes > self._budget_bytes:
            if not self._end_oldest():
                return False
        return True

    def _end_oldest(self) -> bool:
        oldest = min(self._nests.values(), key=lambda nest: nest.used_at, default=None)
        if oldest is not None:
            self._retire(oldest)
        return oldest is not None
