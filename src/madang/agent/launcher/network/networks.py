"""The launcher's side: which networks root allows, and a warden for each session that has one."""

from __future__ import annotations

import os
import select
import selectors
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from madang.agent.launcher import helpers, processes
from madang.agent.launcher.network import rules, warden
from madang.agent.launcher.network.warden import Plan, Site
from madang.agent.launcher.processes import ProcessId, say
from madang.agent.launcher.registry import Connection
from madang.agent.launcher.timers import Timers
from madang.wire.errors import HostLacks, NetworkRefused, PlatformError, RuntimeFailed
from madang.wire.network import Net, Network, NetworkMode, format_rate, parse_target

PRIVATE: Final = ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16")
_SWEEP_S: Final = 30.0
"""After the last session with a network; the next one may come soon."""
_AGAIN_S: Final = 1.0
_LEAVE_S: Final = 5.0
"""A warden that has not left so long after its session is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """What root says about sessions' networks; the server can't change it."""

    modes: tuple[str, ...] = ("none",)
    addresses: str = "10.213.0.0/16"
    """For sessions and the machine's ends."""
    forbidden: tuple[str, ...] = PRIVATE
    """Ranges that no session reaches, besides those that none ever does."""
    resolvers: tuple[str, ...] = ()
    """Empty: those of the machine."""
    bandwidth_bits: int | None = None
    """Most per session and direction, per second; None: no limit."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> NetworkConfig:
        """From ``[network]``, which may have been JSON on the way."""
        lists = {key: tuple(v) for key, v in settings.items() if isinstance(v, list | tuple)}
        return cls(**{**settings, **lists})

    def site(self, state: str, mark: str) -> Site:
        """*mark*: twelve letters that no other state folder of this machine has."""
        return Site(
            table=f"madang_{mark}",
            prefix=f"md{mark[:6]}-",
            pool=Net.parse(self.addresses),
            forbidden=tuple(Net.parse(text) for text in self.forbidden),
            resolvers=self.resolvers,
            lock=f"{state}/network.lock",
        )


@dataclass(eq=False, slots=True, kw_only=True)
class _Attached:
    """A session with a network."""

    kernel: str
    connection: Connection
    plan: Plan
    init_fd: int
    """Our own."""
    noted: Callable[[], None]
    """Called when the connection has another warden."""
    warden_fd: int = -1
    at_end: list[Callable[[], None]] = field(default_factory=list)

    @property
    def lives(self) -> bool:
        poll = select.poll()
        poll.register(self.init_fd, select.POLLIN)
        return not poll.poll(0)


class Networks:
    """Those of all kernels."""

    def __init__(
        self,
        config: NetworkConfig,
        *,
        state: str,
        mark: str,
        rootless: bool,
        selector: selectors.BaseSelector,
        timers: Timers,
        helpers: helpers.Helpers,
    ) -> None:
        self._config = config
        self._site = config.site(state, mark)
        self._rootless = rootless
        self._selector = selector
        self._timers = timers
        self._helpers = helpers
        self._attached: dict[str, _Attached] = {}
        self._used: set[int] = {0}  # Its first address is that of the range.
        self._renewed = False

    # -- what root allows --------------------------------------------------------------------

    def check(self, network: Network) -> None:
        """Raises NetworkRefused, HostLacks."""
        if not network:
            return
        if network.mode not in self._config.modes:
            allowed = ", ".join(self._config.modes)
            raise NetworkRefused(
                f"network {network.mode}: this machine's settings allow {allowed} "
                "(`network.modes`)."
            )
        if self._rootless:
            text = "sessions can't have a network here: that takes root."
            raise HostLacks(f"{text} Start `madang up` as root, or take no network.")
        for text in network.allow:
            net = parse_target(text).net
            for forbidden in (*rules.ALWAYS_FORBIDDEN, self._site.pool, *self._site.forbidden):
                if net is not None and net.within(forbidden):
                    words = f"{text} lies in {forbidden}, which sessions may not reach here"
                    raise NetworkRefused(f"{words} (`network.forbidden`).")
        most, asked = self._config.bandwidth_bits, network.bandwidth_bits
        if most is not None and asked is not None and asked > most:
            words = f"bandwidth: {format_rate(asked)} asked for, {format_rate(most)} is the most"
            raise NetworkRefused(f"{words} (`network.bandwidth`).")

    # -- begin -------------------------------------------------------------------------------

    def attach(
        self,
        kernel: str,
        network: Network,
        *,
        folder: str,
        uid: int,
        init: ProcessId,
        init_fd: int,
        noted: Callable[[], None],
        done: Callable[[Connection | PlatformError], None],
    ) -> None:
        """Give the session of *init* its network before any program of it runs."""
        number = self._take()
        if network.bandwidth_bits is None:
            network = replace(network, bandwidth_bits=self._config.bandwidth_bits)
        connection = Connection(
            number=number,
            mode=network.mode,
            allow=list(network.allow),
            bandwidth_bits=network.bandwidth_bits,
        )
        attached = self._attach(kernel, connection, folder, uid, init, init_fd, noted)
        renew, self._renewed = not self._renewed, True
        attached.plan = replace(attached.plan, renew=renew)
        self._begin(attached, done)

    def adopt(
        self,
        kernel: str,
        connection: Connection,
        *,
        folder: str,
        uid: int,
        init: ProcessId,
        init_fd: int,
        noted: Callable[[], None],
    ) -> None:
        """A running session of an older launcher."""
        self._used.add(connection.number)
        attached = self._attach(kernel, connection, folder, uid, init, init_fd, noted)
        fd = connection.warden.open() if connection.warden is not None else None
        if not self._renewed:
            self._renewed = True
            self._helpers.run(partial(warden.ensure_table, self._site, renew=True), _complain)
        if fd is None:
            self._again(attached)
        else:
            self._watch(attached, fd)

    def _take(self) -> int:
        for number in range(self._site.count):
            if number not in self._used:
                self._used.add(number)
                return number
        raise RuntimeFailed(
            f"all {self._site.count - 1} networks for sessions are in use. Stop some, or set "
            "`network.addresses` to a larger range."
        )

    def _attach(
        self,
        kernel: str,
        connection: Connection,
        folder: str,
        uid: int,
        init: ProcessId,
        init_fd: int,
        noted: Callable[[], None],
    ) -> _Attached:
        network = Network(
            mode=NetworkMode(connection.mode),
            allow=tuple(connection.allow),
            bandwidth_bits=connection.bandwidth_bits,
        )
        plan = Plan(
            site=self._site,
            network=network,
            number=connection.number,
            folder=folder,
            uid=uid,
            init=init,
        )
        attached = self._attached[kernel] = _Attached(
            kernel=kernel,
            connection=connection,
            plan=plan,
            init_fd=os.dup(init_fd),
            noted=noted,
        )
        return attached

    def _begin(
        self, attached: _Attached, done: Callable[[Connection | PlatformError], None]
    ) -> None:
        try:
            pid, reader = warden.make_process(attached.plan, attached.init_fd)
        except OSError as exc:
            self._forget(attached)
            done(RuntimeFailed(f"no process can be had for a network: {exc.strerror}."))
            return
        attached.connection.warden = ProcessId.of(pid)
        self._watch(attached, os.pidfd_open(pid))

        def heard(_events: int) -> None:
            answer: Any = helpers.result(reader)
            self._selector.unregister(reader)
            os.close(reader)
            done(answer if isinstance(answer, PlatformError) else attached.connection)

        self._selector.register(reader, selectors.EVENT_READ, heard)

    # -- meanwhile ---------------------------------------------------------------------------

    def _watch(self, attached: _Attached, fd: int) -> None:
        attached.warden_fd = fd
        self._selector.register(fd, selectors.EVENT_READ, partial(self._left, attached))

    def _left(self, attached: _Attached, _events: int) -> None:
        """It went with its session, or was killed."""
        self._selector.unregister(attached.warden_fd)
        try:
            os.waitid(os.P_PIDFD, attached.warden_fd, os.WEXITED)
        except ChildProcessError:  # An older launcher's.
            pass
        os.close(attached.warden_fd)
        attached.warden_fd = -1
        if attached.lives and not attached.at_end:
            self._timers.after(_AGAIN_S, partial(self._again, attached))
        else:
            self._forget(attached)

    def _again(self, attached: _Attached) -> None:
        """The rules stand, so the session goes on; what it can't do meanwhile is ask for names."""
        if self._attached.get(attached.kernel) is not attached:
            return
        if not attached.lives or attached.at_end:
            self._forget(attached)
            return

        def done(answer: Connection | PlatformError) -> None:
            if isinstance(answer, PlatformError):
                say(f"launcher: {attached.kernel}: its network: {answer.text}")
            else:
                attached.noted()

        attached.plan = replace(attached.plan, again=True, renew=False)
        self._begin(attached, done)

    # -- end ---------------------------------------------------------------------------------

    def detach(self, kernel: str, then: Callable[[], None]) -> None:
        """*then* once its warden has left; the session has ended."""
        attached = self._attached.get(kernel)
        if attached is None:
            then()
            return
        force = self._timers.after(_LEAVE_S, partial(_kill, attached))
        attached.at_end += [partial(self._timers.cancel, force), then]
        if attached.warden_fd < 0:
            self._forget(attached)

    def _forget(self, attached: _Attached) -> None:
        if self._attached.get(attached.kernel) is not attached:
            return
        del self._attached[attached.kernel]
        os.close(attached.init_fd)
        self._used.discard(attached.connection.number)
        for call in attached.at_end:
            call()
        if not self._attached:
            self._timers.after(_SWEEP_S, self.sweep)

    def sweep(self) -> None:
        """Nothing of ours stays in the machine's rules while no session has a network."""
        if not self._rootless and not self._attached and rules.nft_path() is not None:
            self._renewed = False
            self._helpers.run(partial(warden.remove_table, self._site), _complain)


def _kill(attached: _Attached) -> None:
    if attached.warden_fd >= 0:
        processes.kill(attached.warden_fd)


def _complain(result: Any) -> None:
    if isinstance(result, PlatformError):
        say(f"launcher: network: {result.text}")
