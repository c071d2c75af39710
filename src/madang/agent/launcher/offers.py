"""Which runtimes sessions may choose on this machine: what root allowed and what is installed."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from madang.agent.launcher import engine, guests, profile
from madang.wire.errors import NetworkRefused, PolicyInvalid, RuntimeNotOffered, SizeInvalid
from madang.wire.image import ImageKind
from madang.wire.kernel import NATIVE, RUNSC, WITHOUT_NETWORK, KernelSpec
from madang.wire.policy import Sandbox
from madang.wire.session import RootMode
from madang.wire.size import MIB, Size, format_bytes

PACKAGES: Final = {"crun": "crun", "runc": "runc", RUNSC: "runsc"}
"""Runtime → the Debian package that has its program."""
DOCKER: Final = "docker"
DOCKER_SOCKET: Final = "/run/docker.sock"
RUNTIMES: Final = (NATIVE, *PACKAGES, DOCKER)
_YAMA: Final = "/proc/sys/kernel/yama/ptrace_scope"
_NO_PTRACE: Final = 3
SEARCHED: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NEEDS_ROOT: Final = "other runtimes need `madang up` as root"
_NO_NETWORK: Final = (
    "network: gVisor has network interfaces of its own, which the machine's rules don't reach. "
    "Leave --network out, or use another runtime."
)
_WITH_ROOTS: Final = ("crun", "runc")
_NO_ROOTS: Final = "it runs no image with a root of its own"
_NO_OWN_ROOTS: Final = "a session that changes its root needs the runtime native"
_NOT_ALLOWED: Final = "`node.runtimes` does not name it"


@dataclass(frozen=True, slots=True)
class Least:
    """What a session must have for the runtime itself to fit in, while it starts a program."""

    pids: int = 0
    mem_bytes: int = 0


LEAST: Final[Mapping[str, Least]] = {
    "runc": Least(pids=16, mem_bytes=24 * MIB),
    RUNSC: Least(mem_bytes=48 * MIB),
}
"""They are Go programs: they have threads, and memory of their own."""


_GVISOR_PIDS: Final = 256
_GVISOR_PIDS_EACH: Final = 16
"""gVisor's kernel has threads of its own, and some for each process that it runs."""


def machine_size(runtime: str, size: Size) -> Size:
    """What the machine must let a session of *size* have for its programs to get that."""
    if runtime != RUNSC:
        return size
    return replace(size, pids=_GVISOR_PIDS + _GVISOR_PIDS_EACH * size.pids)


RAW_ARGUMENTS: Final = "raw arguments"
OTHER_NUMBERS: Final = "other numbers"
OWN_PLACE: Final = "own place"
PROCESS_COUNTS: Final = "process counts"
PROGRAMS_ALONE: Final = "programs alone"
WHOLE_WRITES: Final = "whole writes"
_JSON: Final = {RAW_ARGUMENTS: "arguments must be UTF-8: OCI configurations are JSON"}
_LIBSECCOMP: Final = {
    OTHER_NUMBERS: "libseccomp kills who calls by numbers of x32, where we say ENOSYS"
}
LACKS: Final[Mapping[str, Mapping[str, str]]] = {
    "crun": _JSON,
    "runc": _JSON | _LIBSECCOMP,
    RUNSC: _JSON
    | {
        PROCESS_COUNTS: "the machine counts the threads of gVisor's kernel",
        PROGRAMS_ALONE: "memory is that of gVisor's kernel: without it no program lives",
        WHOLE_WRITES: "gVisor cuts a write short where a pipe has no room for all of it",
    },
    DOCKER: _LIBSECCOMP
    | {OWN_PLACE: "a session reads the name that its control group has, as Docker made its own"},
}
"""Promises of ``runtime.contract`` that a runtime can't keep, and why."""


OWN_CALLS: Final[Mapping[str, tuple[str, ...]]] = {"runc": ("fstatfs",)}
"""System calls of the runtime itself when the session's filter is on already."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One session's runtime."""

    name: str = NATIVE
    program: str = ""
    profile: str = ""
    """For those that don't take our filter as it is: see ``profile``."""


class Offers:
    """What there is, decided when the launcher starts."""

    def __init__(
        self,
        wanted: str,
        allowed: Collection[str],
        *,
        rootless: bool,
        docker_socket: str = DOCKER_SOCKET,
    ) -> None:
        """*wanted*: for sessions that don't choose. *allowed*: what they may choose."""
        self.default = wanted
        self.programs: dict[str, str] = {NATIVE: ""}
        """Name → the runtime's program; of Docker, the engine's socket."""
        self.missing: dict[str, str] = {}
        for name in RUNTIMES[1:]:
            if name not in {*allowed, wanted}:
                program, why = "", _NOT_ALLOWED
            elif rootless:
                program, why = "", NEEDS_ROOT
            elif name == DOCKER:
                program, why = docker_socket, engine.find(docker_socket)
            else:
                program, why = find(name)
            if why:
                self.missing[name] = why
            else:
                self.programs[name] = program

    @property
    def names(self) -> list[str]:
        """The default first."""
        return sorted(self.programs, key=lambda name: name != self.default)

    def of(self, spec: KernelSpec) -> Offer:
        """Raises RuntimeNotOffered, SizeInvalid, PolicyInvalid."""
        name = spec.runtime or self.default
        if name not in self.programs:
            why = self.missing.get(name, "there is no such runtime")
            raise RuntimeNotOffered(name, offered=self.programs, why=why)
        if name == NATIVE:
            return Offer()
        if spec.image.kind == ImageKind.ROOT and name not in _WITH_ROOTS:
            raise RuntimeNotOffered(name, offered=(NATIVE, *_WITH_ROOTS), why=_NO_ROOTS)
        if spec.root is not RootMode.READ_ONLY:
            raise RuntimeNotOffered(name, offered=(NATIVE,), why=_NO_OWN_ROOTS)
        _check_size(name, spec)
        if name == DOCKER:  # For the start alone: its init installs the session's own.
            found = profile.profile(Sandbox(widen=spec.sandbox.widen))
            return Offer(name, self.programs[name], json.dumps(found))
        if name in WITHOUT_NETWORK and spec.network:
            raise NetworkRefused(_NO_NETWORK)
        if name in {"crun", RUNSC}:  # They take the filter as it is.
            return Offer(name, self.programs[name])
        found = profile.profile(spec.sandbox)
        _check_calls(name, found)
        return Offer(name, self.programs[name], json.dumps(found))


def _check_calls(name: str, found: Mapping[str, Any]) -> None:
    passes = {"SCMP_ACT_ALLOW", "SCMP_ACT_LOG"}
    for call in OWN_CALLS.get(name, ()):
        entry = next(each for each in found["syscalls"] if call in each["names"])
        if entry["action"] not in passes and "args" not in entry:
            text = f"the sandbox policy refuses {call}, which {name} makes itself"
            raise PolicyInvalid(f"{text}; allow it, or use another runtime.")


def _check_size(name: str, spec: KernelSpec) -> None:
    least = LEAST.get(name, Least())
    if spec.size.pids < least.pids:
        text = f"{name} itself takes {least.pids} while it starts a program"
        raise SizeInvalid(f"pids: {text}; ask for --pids {least.pids}, or use another runtime.")
    if spec.size.mem_bytes < least.mem_bytes:
        wanted = format_bytes(least.mem_bytes)
        text = f"{name} itself takes up to {wanted} while it starts a program"
        raise SizeInvalid(f"mem: {text}; ask for more with --mem, or use another runtime.")


def find(name: str) -> tuple[str, str]:
    """(the runtime's program, or in words why it can't be used)"""
    if name == RUNSC and (why := _why_not_gvisor()):
        return "", why
    found = shutil.which(name, path=SEARCHED)
    if found is None:
        return "", f"it is not installed: apt-get install {PACKAGES[name]}"
    path = os.path.realpath(found)
    info = os.stat(path)
    if info.st_uid != 0 or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "", f"{path} can be changed by others than root"
    if not path.startswith("/usr/"):
        return "", f"{path} does not lie in /usr, which is all that sessions see"
    return path, ""


def _why_not_gvisor(arch: str | None = None, yama: str = _YAMA) -> str:
    if (arch or platform.machine()) != guests.MACHINE:
        return f"it is offered on {guests.MACHINE} only"
    with contextlib.suppress(OSError, ValueError), open(yama, encoding="ascii") as file:
        if int(file.read()) >= _NO_PTRACE:
            return "this machine permits no ptrace: kernel.yama.ptrace_scope is 3 until a restart"
    return ""
