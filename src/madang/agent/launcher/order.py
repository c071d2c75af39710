"""What the launcher tells a slot: everything about the session that it becomes."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from madang.agent.launcher.cgroups import Group
from madang.wire.kernel import NATIVE, ImageMount, KernelSpec
from madang.wire.network import Network, NetworkMode
from madang.wire.session import RootMode
from madang.wire.size import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Where the parts of the session's file system lie in the launcher's mount namespace."""

    template: str
    """Root of the image, read-only; see ``mounts``."""
    root: str
    """An empty folder; the session's root is put together there."""
    private: str
    """Another; a tmpfs with the session's own small files goes there."""
    outer: str
    """And one for the root that an OCI runtime works in; see ``containers``."""
    service: str
    tools: str | None
    host: str
    """Template of the host's own system; where OCI runtimes have their program from."""
    layers: str
    """Folder of all layers, for a session that has its root to itself."""

    def relative(self, state: str) -> View:
        """As seen from the folder of kernels, for those whom folders above are closed to."""
        paths = {
            key: path and os.path.join("..", os.path.relpath(path, state))
            for key, path in asdict(self).items()
        }
        return View(**paths)


@dataclass(frozen=True, slots=True)
class Berth:
    """Where the init of a slot in a nest lives, and what it can make ahead."""

    user: int
    """Descriptors of the nest's namespaces."""
    pids: int
    view: View
    """Of its image; the service folder is not known yet."""
    hurry: bool = False
    """A session waits for it: nothing is rehearsed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Paths of ``io`` and ``scratch`` may be relative to the keeper's working directory."""

    kernel: str
    spec: KernelSpec
    io: str
    """Folder of the kernel's ``io``."""
    scratch: str
    """Folder that holds ``scratch.FOLDERS``."""
    scratch_enforced: str
    group: Group
    cpus: list[int]
    """The session's processors; empty: no cpuset."""
    uid: int
    """As the launcher's user namespace counts."""
    nested: bool = False
    """There is one uid only (rootless): the session gets a user namespace inside of ours, where
    it is nobody special."""
    program: str = ""
    """The seccomp filter, base64; empty: the base, which every slot has."""
    deadly: str = ""
    """Rules of its policy that kill, in words."""
    runtime: str = NATIVE
    """What starts its programs: the init itself, or an OCI runtime."""
    runtime_program: str = ""
    """That one's program, absolute."""
    profile: str = ""
    """The seccomp filter again, as the JSON that OCI runtimes read."""
    box: str = ""
    """Name of the container that Docker makes for the session; see ``box``."""
    writes: list[list[str]] = field(default_factory=list)
    """Of each rule about changing files, where they may be changed."""
    guarded: bool = False
    """No program runs before its guard says so."""
    handed_over: list[str] = field(default_factory=list)
    """Calls that the guard is asked about."""
    nest_uids: int = 0
    """Of a nest's interpreter: how many uids its block has."""
    view: View | None = None
    """None: no isolation at all (the ``process`` runtime)."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Order:
        """From a launcher, which has checked everything that it was asked."""
        value = dict(value)
        view = value.pop("view")
        return cls(
            spec=_spec(value.pop("spec")),
            group=Group(**value.pop("group")),
            view=View(**view) if view else None,
            **value,
        )


def _spec(value: dict[str, Any]) -> KernelSpec:
    image, size, argv = value.pop("image"), value.pop("size"), value.pop("argv")
    del value["sandbox"]  # The filter is compiled, the guard has the rest.
    network = value.pop("network")
    network = Network(
        mode=NetworkMode(network["mode"]),
        allow=tuple(network["allow"]),
        bandwidth_bits=network["bandwidth_bits"],
    )
    root = RootMode(value.pop("root"))
    image["layers"], image["warm"] = tuple(image["layers"]), tuple(image["warm"])
    return KernelSpec(
        argv=tuple(argv),
        image=ImageMount(**image),
        size=Size(**size),
        network=network,
        root=root,
        **value,
    )
