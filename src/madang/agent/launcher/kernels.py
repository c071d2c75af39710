"""The life of kernels in the launcher: prepare, start, settle, remove; one step after the other.

Each kernel has a queue: a request waits until the one before it has been answered. Nothing here
waits itself: keepers answer through the selector, slow work is done by helpers.
"""

from __future__ import annotations

import errno
import os
import selectors
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from madang.agent.launcher import channel, guards, processes, registry, scratch
from madang.agent.launcher.boxes import Boxes, Word
from madang.agent.launcher.cgroups import Hierarchies
from madang.agent.launcher.filters import Filters
from madang.agent.launcher.guard import Post
from madang.agent.launcher.guards import Guards
from madang.agent.launcher.helpers import Helpers
from madang.agent.launcher.mounts import Templates, clone_folders
from madang.agent.launcher.network.networks import NetworkConfig, Networks
from madang.agent.launcher.offers import DOCKER, Offers, machine_size
from madang.agent.launcher.order import Order
from madang.agent.launcher.processes import ProcessId, say
from madang.agent.launcher.program import CLAIMED, ENDED
from madang.agent.launcher.registry import PREPARED, SETTLED, STARTED, Connection, Record
from madang.agent.launcher.rootfs import UPPER
from madang.agent.launcher.slots import Slot, Slots
from madang.agent.launcher.timers import Timers
from madang.agent.launcher.warm import Warmth
from madang.agent.launcher.workers import Workers
from madang.wire.errors import (
    Conflict,
    HostLacks,
    NotFound,
    PlatformError,
    RuntimeFailed,
    StorageFull,
)
from madang.wire.kernel import NATIVE, KernelId, KernelSpec
from madang.wire.policy import NO_SANDBOX, Sandbox

Answer = Callable[[Any], None]
"""Called once, with a result (a JSON object) or a PlatformError."""

START_S: Final = 30.0
"""A start that takes longer is given up."""
END_S: Final = 15.0
"""A keeper that has not left so long after its init was killed is killed."""
_MAX_FILE_WORKERS: Final = 32
"""At once, for one kernel."""


@dataclass(eq=False, slots=True, kw_only=True)
class Kernel:
    folder: str
    record: Record
    keeper_fd: int = -1
    init_fd: int = -1
    slot: Slot | None = None
    queue: deque[Callable[[], None]] = field(default_factory=deque)
    busy: bool = False
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """Called once the keeper has left."""
    workers: set[int] = field(default_factory=set)
    """pidfds of file workers."""

    @property
    def running(self) -> bool:
        return self.keeper_fd >= 0

    @property
    def io(self) -> str:
        return f"{self.folder}/io"


class Kernels:
    """All kernels of this state folder."""

    def __init__(
        self,
        *,
        state: str,
        owner: tuple[int, int],
        uids: registry.Uids | None,
        ready_slots: int,
        hierarchies: Hierarchies,
        templates: Templates,
        pool: scratch.Pool,
        selector: selectors.BaseSelector,
        timers: Timers,
        filters: Filters,
        offers: Offers,
        network: NetworkConfig,
        mark: str,
        rootless: bool,
        warm_bytes: int,
        changed: Callable[[str], None],
    ) -> None:
        """*owner*: uid and gid of the server. *uids* None: there is one uid only, ours. *mark*:
        tells this state folder from others. *warm_bytes*: the most that interpreters may use, 0 for
        none at all; see ``warm``.
        """
        self._state = state
        self._folder = f"{state}/kernels"
        self._owner = owner
        self._uids = uids
        self._hierarchies = hierarchies
        self._templates = templates
        self._pool = pool
        self._selector = selector
        self._timers = timers
        self._filters = filters
        self._offers = offers
        self._changed = changed
        self._helpers = Helpers(selector)
        self._workers = Workers(
            {
                "take": lambda *order: pool.take(*order).enforced,
                "mount": lambda folder: pool.mount_again(folder).path,
                "unmount": pool.release,
                "delete": self._delete,
                "refill": pool.refill,
                "measure": lambda some: [sum(map(processes.pss_bytes, pids)) for pids in some],
            },
            selector,
        )
        self._networks = Networks(
            network,
            state=state,
            mark=mark,
            rootless=rootless,
            selector=selector,
            timers=timers,
            helpers=self._helpers,
        )
        self._boxes = Boxes(state, mark, self._helpers, offers.programs.get(DOCKER))
        cpus = os.sched_getaffinity(0) if "cpuset" in hierarchies.bases else ()
        self._processors = registry.Processors(cpus)
        self._kernels: dict[KernelId, Kernel] = {}
        self._slots = Slots(
            folder=self._folder,
            owner=owner,
            wanted=ready_slots,
            hierarchies=hierarchies,
            disks=pool,
            workers=self._workers,
            selector=selector,
            timers=timers,
        )
        self._guards = Guards(self._slots, selector, timers)
        self._warmth = Warmth(
            state=state,
            budget_bytes=warm_bytes if offers.default == NATIVE else 0,
            uids=uids,
            cpus=sorted(cpus),
            hierarchies=hierarchies,
            templates=templates,
            slots=self._slots,
            workers=self._workers,
            selector=selector,
            timers=timers,
        )
        self._boot = processes.boot_id()

    # -- what is there -----------------------------------------------------------------------

    def open(self) -> None:
        """Take over what an older launcher left; sweep what nobody owns."""
        os.makedirs(self._folder, 0o711, exist_ok=True)
        os.makedirs(self._pool.folder, 0o700, exist_ok=True)
        self._templates.open()
        for kernel_id, folder in registry.folders(self._folder):
            self._adopt(kernel_id, folder)
        records = [kernel.record for kernel in self._kernels.values()]
        kept = {name for r in records for name in (r.slot, r.nest) if name}
        for name in self._hierarchies.names() - kept:
            self._slots.clear_group(self._hierarchies.group(name), lambda _: None)
        self._helpers.run(self._pool.sweep, lambda _: self._slots.refill())
        self._boxes.open(lambda: [each.record.slot for each in self._kernels.values()])
        self._networks.sweep()

    def _adopt(self, kernel_id: KernelId, folder: str) -> None:
        record = registry.load(folder)
        if record is None:
            self._sweep_folder(folder)
            return
        kernel = self._kernels[kernel_id] = Kernel(folder=folder, record=record)
        if self._uids is not None:
            self._uids.adopt(record.uid)
        if record.state == STARTED:
            kernel.keeper_fd = _open(record.keeper)
            if self._never_ran(kernel):
                _forget_start(record)
        if record.nest:
            self._warmth.join(record.nest)
        if record.state == STARTED:
            self._processors.adopt(record.cpu, record.cpus)
            kernel.init_fd = _open(record.init)
            if kernel.running:
                self._watch_keeper(kernel, child=False)
                self._adopt_network(kernel)
                if record.guard is not None:
                    self._guards.watch(record.guard, partial(self._guard_left, kernel), child=False)
            elif kernel.init_fd >= 0:
                processes.kill(kernel.init_fd)

    def _adopt_network(self, kernel: Kernel) -> None:
        record = kernel.record
        if record.connection is not None and record.init is not None and kernel.init_fd >= 0:
            self._networks.adopt(
                record.kernel,
                record.connection,
                folder=kernel.folder,
                uid=record.uid,
                init=record.init,
                init_fd=kernel.init_fd,
                noted=partial(_save, kernel),
            )

    def _sweep_folder(self, folder: str) -> None:
        """A folder that was never finished, or torn by a crash: nothing in it is of use."""
        self._workers.run("delete", folder, done=lambda _: None)

    def list(self) -> list[dict[str, Any]]:
        return [self._describe(kernel) for kernel in self._kernels.values()]

    def warmth(self) -> dict[str, int]:
        """What is kept warm."""
        return self._warmth.report()

    def _describe(self, kernel: Kernel) -> dict[str, Any]:
        record = kernel.record
        group = record.group
        return {
            "kernel": record.kernel,
            "state": record.state,
            "running": kernel.running,
            "started_at": record.started_at,
            "scratch_enforced": record.scratch_enforced,
            "policy": record.policy,
            "runtime": record.runtime,
            "network": "nftables" if record.connection else "namespace",
            "frozen": kernel.running and group is not None and group.frozen,
            "group": {"version": group.version, "paths": group.paths} if group else None,
        }

    # -- requests ----------------------------------------------------------------------------

    def prepare(self, kernel_id: KernelId, spec: KernelSpec, answer: Answer) -> None:
        kernel = self._kernels.get(kernel_id)
        if kernel is None:
            try:
                kernel = self._make_folder(kernel_id, spec)
            except OSError as exc:
                answer(_explain(str(kernel_id), exc))
                return
        self._queue(kernel, answer, partial(self._take_scratch, kernel, spec))

    def run(self, kernel_id: KernelId, spec: KernelSpec, answer: Answer) -> None:
        """Prepare and start in one request."""
        kernel = self._kernels.get(kernel_id)
        if kernel is None:
            try:
                kernel = self._make_folder(kernel_id, spec)
            except OSError as exc:
                answer(_explain(str(kernel_id), exc))
                return
        self._queue(kernel, answer, partial(self._run, kernel, spec))

    def start(self, kernel_id: KernelId, spec: KernelSpec, answer: Answer) -> None:
        if kernel := self._find(kernel_id, answer):
            self._queue(kernel, answer, partial(self._start, kernel, spec))

    def guard(self, kernel_id: KernelId, sandbox: Sandbox, answer: Answer) -> None:
        """Other live rules for a session that runs; ``later``: those that it can't have."""
        if kernel := self._find(kernel_id, answer):
            self._queue(kernel, answer, partial(self._renew_rules, kernel, sandbox))

    def settle(self, kernel_id: KernelId, answer: Answer) -> None:
        if kernel := self._find(kernel_id, answer):
            self._queue(kernel, answer, partial(self._settle, kernel))

    def remove(self, kernel_id: KernelId, answer: Answer) -> None:
        kernel = self._kernels.get(kernel_id)
        if kernel is None:
            answer({})
            return
        self._end_workers(kernel)
        self._queue(kernel, answer, partial(self._settle_and_remove, kernel_id, kernel))

    def kill(self, kernel_id: KernelId, answer: Answer) -> None:
        if kernel := self._kernels.get(kernel_id):
            self._kill(kernel)
        answer({})

    def freeze(self, kernel_id: KernelId, answer: Answer, *, frozen: bool) -> None:
        kernel = self._find(kernel_id, answer)
        if kernel is None:
            return
        group = kernel.record.group
        if not kernel.running:
            answer(Conflict(f"{kernel_id} does not run."))
        elif group is None or not group.can_freeze:
            text = (
                "sessions can't be frozen here: no control groups with a freezer. Stop it instead."
            )
            answer(HostLacks(text) if frozen else {})
        elif group.freeze() if frozen else group.thaw():
            answer({})
        else:
            answer(RuntimeFailed(f"{kernel_id}: its control group takes no order to freeze."))

    def files(self, kernel_id: KernelId, answer: Answer) -> None:
        """Answers with a socket."""
        if kernel := self._find(kernel_id, answer):
            self._queue(kernel, answer, partial(self._with_worker, kernel, self._open_files))

    def changes(self, kernel_id: KernelId, answer: Answer) -> None:
        """Answers with a socket, by which it tells what it changed in its root."""
        if kernel := self._find(kernel_id, answer):
            self._queue(kernel, answer, partial(self._with_worker, kernel, self._open_changes))

    # -- one after the other -----------------------------------------------------------------

    def _find(self, kernel_id: KernelId, answer: Answer) -> Kernel | None:
        kernel = self._kernels.get(kernel_id)
        if kernel is None:
            answer(NotFound(f"{kernel_id} is not on this machine."))
        return kernel

    def _queue(self, kernel: Kernel, answer: Answer, step: Callable[[Answer], None]) -> None:
        """Do *step* when the ones before it are done; errors it raises are its answer."""

        def finish(result: Any) -> None:
            kernel.busy = False
            answer(result)
            self._next(kernel)

        kernel.queue.append(partial(_attempt, kernel, finish, step))
        self._next(kernel)

    @staticmethod
    def _next(kernel: Kernel) -> None:
        if kernel.queue and not kernel.busy:
            kernel.busy = True
            kernel.queue.popleft()()

    # -- prepare -----------------------------------------------------------------------------

    def _take_uid(self, spec: KernelSpec) -> int:
        if self._uids is None:
            return os.geteuid()
        warm = self._warmth.take_uid(spec)
        return self._uids.take() if warm is None else warm

    def _make_folder(self, kernel_id: KernelId, spec: KernelSpec) -> Kernel:
        folder = f"{self._folder}/{kernel_id}"
        uid = self._take_uid(spec)
        try:
            if os.path.lexists(folder):
                raise FileExistsError(f"{folder} is being removed")
            os.mkdir(folder, 0o755)
            for name in ("io", "service"):
                os.mkdir(f"{folder}/{name}", 0o755)
                os.chown(f"{folder}/{name}", *self._owner)
        except OSError:
            if self._uids is not None:
                self._uids.free(uid)
            raise
        record = Record(kernel=str(kernel_id), uid=uid, boot=self._boot)
        kernel = self._kernels[kernel_id] = Kernel(folder=folder, record=record)
        return kernel

    def _run(self, kernel: Kernel, spec: KernelSpec, answer: Answer) -> None:
        began = time.monotonic()

        def prepared(result: Any) -> None:
            if isinstance(result, PlatformError):
                answer(result)
                return
            spent = round((time.monotonic() - began) * 1000, 3)
            _attempt(kernel, partial(started, result, spent), partial(self._start, kernel, spec))

        def started(found: dict[str, Any], spent: float, result: Any) -> None:
            if not isinstance(result, PlatformError):
                timings = {"prepare": spent} | result.get("timings_ms", {})
                result = found | result | {"timings_ms": timings}
            answer(result)

        self._take_scratch(kernel, spec, prepared)

    def _take_scratch(self, kernel: Kernel, spec: KernelSpec, answer: Answer) -> None:
        if kernel.record.state == SETTLED:
            raise Conflict(f"{kernel.record.kernel} has ended.")
        label, warnings = self._policy_of(kernel.record, spec)
        runtime = self._runtime_of(kernel.record, spec)
        self._networks.check(spec.network)
        order = kernel.folder, spec.size.disk_bytes, kernel.record.uid

        def took(result: Any) -> None:
            if isinstance(result, PlatformError):
                answer(result)
                return
            kernel.record.scratch_enforced = result
            try:
                kernel.record.save(kernel.folder)
            except OSError as exc:
                answer(_explain(kernel.record.kernel, exc))
                return
            enforced = {"disk": result, "runtime": runtime, "network": _network_of(spec)}
            answer({"enforced": enforced, "policy": label, "warnings": warnings})

        if self._pool.images and not self._at_hand(kernel, spec):
            self._workers.run("take", *order, done=took)
        else:
            took(self._pool.take(*order).enforced)

    def _policy_of(self, record: Record, spec: KernelSpec) -> tuple[str, tuple[str, ...]]:
        """(its label, what is not kept of it). What runs already has the one it began with."""
        if record.state == STARTED:
            return record.policy, ()
        return spec.sandbox.label, self._filters.of(
            spec.sandbox, self._offers.of(spec).name, spec.root
        ).warnings

    def _runtime_of(self, record: Record, spec: KernelSpec) -> str:
        """What runs already has the one it began with."""
        return record.runtime if record.state == STARTED else self._offers.of(spec).name

    def _at_hand(self, kernel: Kernel, spec: KernelSpec) -> bool:
        if scratch.is_mounted(f"{kernel.folder}/{scratch.MOUNT}"):
            return True
        ready = self._pool.missing() < self._pool.ready
        return ready and spec.size.disk_bytes == self._pool.default_bytes

    # -- start -------------------------------------------------------------------------------

    def _start(self, kernel: Kernel, spec: KernelSpec, answer: Answer) -> None:
        record = kernel.record
        if record.state == STARTED:
            answer({"at": record.started_at or 0.0})
            return
        if record.state == SETTLED:
            raise Conflict(f"{record.kernel} has ended.")
        self._with_scratch(kernel, answer, partial(self._claim, kernel, spec))

    def _never_ran(self, kernel: Kernel) -> bool:
        """A launcher died between writing the record and handing the session over."""
        main = f"{kernel.io}/main"
        return not kernel.running and not any(
            os.path.exists(f"{main}/{name}") for name in (CLAIMED, ENDED)
        )

    def _with_scratch(self, kernel: Kernel, answer: Answer, step: Callable[[Answer], None]) -> None:
        """*step* once the scratch space is mounted in our namespace."""
        if not self._pool.images or scratch.is_mounted(f"{kernel.folder}/{scratch.MOUNT}"):
            step(answer)
            return

        def mounted(result: Any) -> None:
            if isinstance(result, PlatformError):
                answer(result)
            else:
                _attempt(kernel, answer, step)

        self._workers.run("mount", kernel.folder, done=mounted)

    def _claim(self, kernel: Kernel, spec: KernelSpec, answer: Answer) -> None:
        record = kernel.record
        runtime = self._offers.of(spec)
        found = self._filters.of(spec.sandbox, runtime.name, spec.root)
        self._networks.check(spec.network)
        view = self._templates.view(spec, f"{kernel.folder}/service")
        warm = self._warmth.take(spec, record.uid)
        slot = warm or self._slots.take()
        cpus = self._processors.take(spec.size.cpu)
        record.cpu, record.cpus = spec.size.cpu, cpus
        record.slot, record.group, record.template = slot.name, slot.group, view.template
        record.policy, record.runtime = spec.sandbox.label, runtime.name
        record.nest = slot.nest
        if record.nest:
            self._warmth.join(record.nest)
        kernel.slot = slot
        begin = _Begin(kernel=kernel, slot=slot, answer=answer)
        begin.timer = self._timers.after(START_S, partial(self._give_up, begin))
        boxed = runtime.name == DOCKER
        if boxed:
            record.group = slot.group = replace(slot.group, own=2)
            slot.admit = partial(self._admit, begin)
        order = Order(
            kernel=record.kernel,
            spec=spec,
            io=f"{record.kernel}/io",
            scratch=f"{record.kernel}/{scratch.MOUNT}",
            scratch_enforced=record.scratch_enforced,
            group=slot.group,
            cpus=cpus,
            uid=record.uid,
            nested=self._uids is None,
            program=found.program,
            deadly=found.deadly,
            runtime=runtime.name,
            runtime_program=runtime.program,
            profile=runtime.profile,
            box=self._boxes.name(slot.name) if boxed else "",
            writes=[list(rule.folders) for rule in found.kept.writes],
            guarded=bool(found.kept.live),
            handed_over=sorted(found.kept.handed_over),
            view=view.relative(self._state) if warm else view,
        )
        begin.order = order
        begin.kept = found.kept
        self._selector.modify(slot.link, selectors.EVENT_READ, partial(self._starting, begin))
        if slot.ready:
            self._ready(begin)

    def _ready(self, begin: _Begin) -> None:
        """Its slot is; a box gets its network later, see ``_admit``."""
        assert begin.order is not None
        hand_over = partial(self._hand_over, begin)
        hand_over() if begin.order.box else self._connect(begin, hand_over)

    def _admit(self, begin: _Begin, guest: int, told: int) -> None:
        """The session's box is there, and waits for what Docker could not give it."""
        kernel, order = begin.kernel, begin.order
        assert order is not None

        def admitted(result: Any) -> None:
            if isinstance(result, PlatformError) and not begin.done:
                begin.slot.failure = result.text.rstrip(".")
                begin.slot.abandon()
            elif not begin.done:
                self._connect(begin, connected)

        def connected() -> None:
            _save(kernel)
            assert begin.word is not None
            begin.word.give()

        begin.word = self._boxes.admit(order, guest, told, admitted)

    def _connect(self, begin: _Begin, then: Callable[[], None]) -> None:
        """Its network is there before any program of it runs."""
        kernel, slot, order = begin.kernel, begin.slot, begin.order
        assert order is not None
        if not order.spec.network:
            then()
            return
        assert slot.init is not None

        def connected(result: Connection | PlatformError) -> None:
            if begin.done:
                return
            if isinstance(result, PlatformError):
                slot.failure = result.text.rstrip(".")
                slot.abandon()
            else:
                kernel.record.connection = result
                then()

        try:
            self._networks.attach(
                kernel.record.kernel,
                order.spec.network,
                folder=kernel.folder,
                uid=kernel.record.uid,
                init=slot.init,
                init_fd=slot.init_fd,
                noted=partial(_save, kernel),
                done=connected,
            )
        except RuntimeFailed as exc:
            connected(exc)
        except OSError as exc:
            connected(RuntimeFailed(f"its network can't be made: {exc}"))

    def _hand_over(self, begin: _Begin) -> None:
        kernel, slot, order = begin.kernel, begin.slot, begin.order
        assert order is not None
        record = kernel.record
        try:
            slot.group.limit(machine_size(order.runtime, order.spec.size), order.cpus)
            record.keeper, record.init, record.state = slot.keeper, slot.init, STARTED
            record.started_at = time.time()
            if order.guarded:
                self._start_guarded(begin, order)
                return
            record.save(kernel.folder)
            if slot.nest:
                self._claim_with_folders(kernel, slot, order)
            else:
                slot.claim(order)
        except OSError as exc:
            slot.failure = f"limits can't be set: {exc}"
            slot.abandon()
        except RuntimeFailed as exc:
            slot.failure = exc.text
            slot.abandon()

    @staticmethod
    def _claim_with_folders(kernel: Kernel, slot: Slot, order: Order) -> None:
        """Its init is in another mount namespace, as long as it lives."""
        found = clone_folders(f"{kernel.folder}/{scratch.MOUNT}", f"{kernel.folder}/service")
        folders: list[int] = []
        try:
            folders.extend(found)
            slot.claim(order, folders=folders)
        finally:
            for fd in folders:
                os.close(fd)

    def _start_guarded(self, begin: _Begin, order: Order) -> None:
        kernel = begin.kernel
        ours, theirs = channel.pair()
        with ours, theirs:
            post = self._post(kernel, begin.kept, hostname=order.spec.hostname)
            post = replace(post, mem_bytes=order.spec.size.mem_bytes)
            kernel.record.guard = self._guards.post(post, ours, partial(self._guard_left, kernel))
            kernel.record.save(kernel.folder)
            begin.slot.claim(order, [theirs.fileno()])

    def _post(self, kernel: Kernel, sandbox: Sandbox, *, hostname: str = "") -> Post:
        """Without a host name: of a session that runs."""
        record = kernel.record
        assert record.init is not None and record.keeper is not None and record.group is not None
        return Post(
            folder=kernel.folder,
            init=record.init,
            keeper=record.keeper,
            sandbox=sandbox,
            hostname=hostname,
            group=record.group,
            late=not hostname,
        )

    # -- while it runs -----------------------------------------------------------------------

    def _renew_rules(self, kernel: Kernel, sandbox: Sandbox, answer: Answer) -> None:
        record = kernel.record
        if record.state != STARTED or not kernel.running:
            raise Conflict(f"{record.kernel} does not run.")
        kept = self._filters.of(sandbox, record.runtime).kept
        if record.guard is not None:
            self._guards.replace(kernel.folder, kept, answer)
        elif not (kept.files or kept.nets or kept.watches):
            answer({"later": [rule.place for rule in kept.live]})
        else:
            left = partial(self._guard_left, kernel)
            posted = partial(self._posted, kernel)
            self._guards.post_late(self._post(kernel, kept), kernel.io, left, posted, answer)

    @staticmethod
    def _posted(kernel: Kernel, guard: ProcessId) -> None:
        kernel.record.guard = guard
        _save(kernel)

    def _guard_left(self, kernel: Kernel, guard: ProcessId) -> None:
        """It is the last to leave; before, the session must end. Its keeper says why."""
        if kernel.record.guard == guard and kernel.running:
            self._kill(kernel)

    def _starting(self, begin: _Begin, _events: int) -> None:
        """A message of a claimed slot: ready at last, started, failed, or gone."""
        message = begin.slot.hear()
        if message is None:
            self._selector.unregister(begin.slot.link)
            begin.slot.link.close()
            if not begin.done:
                ran = os.path.exists(f"{begin.kernel.io}/main/{ENDED}")
                (self._started if ran else self._start_failed)(begin)
        elif "ready" in message:
            self._ready(begin) if begin.slot.ready else begin.slot.abandon()
        elif "started" in message and not begin.done:
            if message.get("missed"):
                begin.slot.missed()
            elif begin.slot.warm:
                begin.slot.became()
            self._started(begin)

    def _started(self, begin: _Begin) -> None:
        kernel, slot = begin.kernel, begin.slot
        begin.done = True
        self._timers.cancel(begin.timer)
        kernel.keeper_fd, kernel.init_fd = slot.keeper_fd, slot.init_fd
        kernel.slot = None  # The descriptors are the kernel's now, and closed as such.
        self._watch_keeper(kernel, child=True)
        timings = {"sandbox": round((time.monotonic() - begin.began) * 1000, 3)}
        begin.answer({"at": kernel.record.started_at, "timings_ms": timings})
        self._changed(kernel.record.kernel)
        assert begin.order is not None
        self._warmth.note_start(begin.order.spec)
        self._slots.fill_up()

    def _start_failed(self, begin: _Begin) -> None:
        kernel, slot = begin.kernel, begin.slot
        begin.done = True
        self._timers.cancel(begin.timer)
        words = slot.failure or "its processes were killed while it was started"
        self._processors.free(kernel.record.cpu, kernel.record.cpus)
        record = kernel.record
        nest = record.nest
        if begin.order is not None:
            self._boxes.forget(begin.order)
        if begin.word is not None:
            begin.word.withdraw()
        _forget_start(record)
        kernel.slot = None
        _save(kernel)
        self._slots.bury(slot)
        if nest:
            slot.missed()
            self._warmth.leave(nest)
        failed = RuntimeFailed(f"{record.kernel} could not be started: {words}.")
        self._networks.detach(record.kernel, partial(begin.answer, failed))

    def _give_up(self, begin: _Begin) -> None:
        begin.slot.failure = f"not ready after {START_S:.0f} s"
        begin.slot.abandon()

    def _watch_keeper(self, kernel: Kernel, *, child: bool) -> None:
        self._selector.register(
            kernel.keeper_fd, selectors.EVENT_READ, partial(self._keeper_left, kernel, child)
        )

    def _keeper_left(self, kernel: Kernel, child: bool, _events: int) -> None:
        self._selector.unregister(kernel.keeper_fd)
        if child and kernel.record.keeper is not None:
            os.waitpid(kernel.record.keeper.pid, 0)
        if kernel.init_fd >= 0:
            self._slots.end_init(kernel.init_fd)
        os.close(kernel.keeper_fd)
        kernel.keeper_fd = kernel.init_fd = -1
        waiting, kernel.at_end = kernel.at_end, []
        for call in waiting:
            call()
        self._changed(kernel.record.kernel)

    # -- the end -----------------------------------------------------------------------------

    def _kill(self, kernel: Kernel) -> None:
        """Everything in it, now. A version 1 freezer holds even SIGKILL back."""
        if kernel.record.group is not None:
            kernel.record.group.thaw()
        slot = kernel.slot
        init_fd = kernel.init_fd if kernel.init_fd >= 0 else slot.init_fd if slot else -1
        if init_fd >= 0:
            processes.kill(init_fd)

    def _settle(self, kernel: Kernel, answer: Answer) -> None:
        if not kernel.running:
            self._free_limits(kernel, answer)
            return
        self._kill(kernel)
        force = self._timers.after(END_S, partial(_kill_keeper, kernel))

        def ended() -> None:
            self._timers.cancel(force)
            self._free_limits(kernel, answer)

        kernel.at_end.append(ended)

    def _free_limits(self, kernel: Kernel, answer: Answer) -> None:
        group = kernel.record.group
        if group is None:
            self._release(kernel, answer)
        else:
            self._slots.clear_group(group, partial(self._cleared, kernel, answer))

    def _cleared(self, kernel: Kernel, answer: Answer, empty: bool) -> None:
        if not empty:
            answer(RuntimeFailed(f"{kernel.record.kernel}: some of its processes can't be ended."))
            return
        self._release(kernel, answer)

    def _release(self, kernel: Kernel, answer: Answer) -> None:
        self._networks.detach(kernel.record.kernel, partial(self._note_end, kernel, answer))

    def _note_end(self, kernel: Kernel, answer: Answer) -> None:
        record = kernel.record
        if record.state == STARTED:
            self._processors.free(record.cpu, record.cpus)
        guards.end(record.guard)
        record.state, record.group, record.slot, record.cpus = SETTLED, None, "", []
        record.keeper = record.init = record.connection = record.guard = kernel.slot = None
        nest, record.nest = record.nest, ""
        _save(kernel)
        if nest:
            self._warmth.leave(nest)
        self._unmount(kernel, answer)

    def _unmount(self, kernel: Kernel, answer: Answer) -> None:
        if kernel.workers or not scratch.is_mounted(f"{kernel.folder}/{scratch.MOUNT}"):
            answer({})
            return
        self._workers.run(
            "unmount",
            kernel.folder,
            done=lambda result: answer(result if isinstance(result, PlatformError) else {}),
        )

    def _settle_and_remove(self, kernel_id: KernelId, kernel: Kernel, answer: Answer) -> None:
        def settled(result: Any) -> None:
            if isinstance(result, PlatformError):
                answer(result)
                return
            self._workers.run("delete", kernel.folder, done=deleted)

        def deleted(result: Any) -> None:
            if isinstance(result, PlatformError):
                answer(result)
                return
            self._kernels.pop(kernel_id, None)
            if self._uids is not None:
                self._uids.free(kernel.record.uid)
            self._forget_templates()
            answer({})
            self._changed(str(kernel_id))

        self._settle(kernel, settled)

    def _delete(self, folder: str) -> None:
        """In a worker. The record goes last: a torn removal is found and done again."""
        self._pool.remove(folder)
        scratch.remove_tree(folder)

    def _forget_templates(self) -> None:
        kept = {kernel.record.template for kernel in self._kernels.values()}
        self._templates.forget(kept | self._warmth.templates())

    # -- files -------------------------------------------------------------------------------

    def _with_worker(
        self, kernel: Kernel, opening: Callable[[Kernel, Answer], None], answer: Answer
    ) -> None:
        if len(kernel.workers) >= _MAX_FILE_WORKERS:
            raise Conflict(f"{kernel.record.kernel}: too many file operations at once; try again.")
        self._with_scratch(kernel, answer, partial(opening, kernel))

    def _open_files(self, kernel: Kernel, answer: Answer) -> None:
        sock, pidfd = self._helpers.serve_files(
            f"{kernel.folder}/{scratch.MOUNT}",
            f"{self._state}/mounts/root",
            kernel.record.uid,
            partial(self._worker_left, kernel),
        )
        kernel.workers.add(pidfd)
        answer(sock)

    def _open_changes(self, kernel: Kernel, answer: Answer) -> None:
        upper = f"{kernel.folder}/{scratch.MOUNT}/{UPPER}"
        if not os.path.isdir(upper):
            raise Conflict(
                f"{kernel.record.kernel} has no root of its own that it could have changed: start "
                "it from an image with a whole root, with --writable or --root."
            )
        sock, pidfd = self._helpers.serve_changes(
            upper,
            f"{self._state}/mounts/root",
            kernel.record.uid,
            partial(self._worker_left, kernel),
        )
        kernel.workers.add(pidfd)
        answer(sock)

    def _worker_left(self, kernel: Kernel, pidfd: int) -> None:
        kernel.workers.discard(pidfd)
        if kernel.record.state == SETTLED and not kernel.workers:
            self._queue(kernel, lambda _: None, partial(self._unmount, kernel))

    @staticmethod
    def _end_workers(kernel: Kernel) -> None:
        for pidfd in kernel.workers:
            processes.kill(pidfd)


@dataclass(eq=False, slots=True, kw_only=True)
class _Begin:
    """A start under way."""

    kernel: Kernel
    slot: Slot
    answer: Answer
    order: Order | None = None
    kept: Sandbox = NO_SANDBOX
    word: Word | None = None
    timer: int = -1
    began: float = field(default_factory=time.monotonic)
    done: bool = False


def _attempt(kernel: Kernel, answer: Answer, step: Callable[[Answer], None]) -> None:
    """*step*; errors it raises are its answer."""
    try:
        step(answer)
    except PlatformError as exc:
        answer(exc)
    except OSError as exc:
        answer(_explain(kernel.record.kernel, exc))


def _forget_start(record: Record) -> None:
    """Nothing has run: it may be started again."""
    record.state, record.keeper, record.init, record.started_at = PREPARED, None, None, None
    record.cpus, record.slot, record.group, record.template = [], "", None, ""
    record.connection, record.guard, record.nest = None, None, ""


def _network_of(spec: KernelSpec) -> str:
    """How it is held."""
    return "nftables" if spec.network else "namespace"


def _save(kernel: Kernel) -> None:
    """Where an old record does no harm: a full disk must not stop what frees it."""
    try:
        kernel.record.save(kernel.folder)
    except OSError as exc:
        say(f"launcher: {kernel.record.kernel}: {exc}")


def _explain(kernel: str, exc: OSError) -> PlatformError:
    if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
        return StorageFull(f"{kernel}: the disk under the state folder is full.")
    return RuntimeFailed(f"{kernel}: {exc}.")


def _open(process: ProcessId | None) -> int:
    fd = process.open() if process is not None else None
    return -1 if fd is None else fd


def _kill_keeper(kernel: Kernel) -> None:
    if kernel.keeper_fd >= 0:
        processes.kill(kernel.keeper_fd)
