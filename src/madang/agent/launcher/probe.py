"""What this machine can hold: each means of isolation is tried for real, in a forked child.

Nothing stays: namespaces, mounts and filters die with the child; folders and groups are removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from madang.agent.launcher import cgroups, fanotify, landlock, mounts, scratch, seccomp, syscalls
from madang.agent.launcher.fence import Fence
from madang.wire.errors import PolicyUnkept
from madang.wire.policy import SITE, Act, NetRule
from madang.wire.size import GIB, format_bytes

OLDEST_KERNEL: Final = (5, 12)
LITTLE_DISK: Final = 5 * GIB
LITTLE_WATCHES: Final = 8192
BUILT_AT: Final = 1_760_000_000
"""No correct clock shows less: October 2025."""
TRIAL_S: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: str
    """``ok``, ``warning`` (works, with less), ``error`` (sessions can't run)"""
    text: str
    mend: str = ""
    """What to type, or to do."""

    @property
    def ok(self) -> bool:
        return self.level == "ok"


def probe(state_dir: str, *, server_uid: int = 2_000_000_000) -> list[Finding]:
    """Look at everything; takes a fraction of a second. *state_dir* need not exist."""
    where = _existing(state_dir)
    findings = [
        _kernel(platform.release(), platform.machine()),
        _user(os.geteuid()),
        _namespaces(),
        _root(),
        *_cgroups(),
        _addresses(),
        _files(),
        _overlay(where),
        _scratch(where),
        _seccomp(),
        _pidfd(),
        _resource_capability(),
        _disk(where),
        _clock(time.time()),
        _inotify(),
        _uv(),
    ]
    if os.geteuid() == 0:
        findings.append(_python(server_uid))
    return findings


def _good(name: str, text: str) -> Finding:
    return Finding(name=name, level="ok", text=text)


def _less(name: str, text: str, mend: str) -> Finding:
    return Finding(name=name, level="warning", text=text, mend=mend)


def _bad(name: str, text: str, mend: str) -> Finding:
    return Finding(name=name, level="error", text=text, mend=mend)


def _kernel(release: str, machine: str) -> Finding:
    name = "kernel"
    if machine not in seccomp.AUDIT_ARCH:
        return _bad(name, f"{machine} is not supported", "Use x86-64 or 64-bit ARM (aarch64).")
    major, _, rest = release.partition(".")
    minor = rest.partition(".")[0].partition("-")[0]
    version = (int(major), int(minor or 0))
    if version < OLDEST_KERNEL:
        wanted = ".".join(map(str, OLDEST_KERNEL))
        return _bad(name, f"Linux {release} is too old", f"Use Linux {wanted} or newer.")
    return _good(name, f"Linux {release}, {machine}")


def _user(uid: int) -> Finding:
    if uid == 0:
        return _good("user", "root: each session gets a user of its own")
    return _less("user", f"user {uid}: rootless, with what the kernel allows", "sudo madang up")


def _namespaces() -> Finding:
    """Root makes them directly, others inside a user namespace."""
    flags = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNET
    flags |= syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
    name = "namespaces"
    if os.geteuid() == 0:
        failure = attempt(lambda: syscalls.unshare(flags))
        mend = "Run on the machine itself, or in a container started with --privileged."
        return _bad(name, f"refused: {failure}", mend) if failure else _good(name, "all of them")
    failure = attempt(lambda: syscalls.unshare(flags | syscalls.CLONE_NEWUSER))
    if failure is None:
        return _good(name, "all of them, in a user namespace")
    return _bad(name, f"user namespaces are refused: {failure}", _user_namespace_mend())


def _root() -> Finding:
    name = "root folder"
    if mounts.root_is_mount():
        return _good(name, "sessions can get another one")
    return _bad(name, mounts.CHROOT_TEXT, mounts.CHROOT_MEND)


def _user_namespace_mend() -> str:
    switches = (
        ("kernel.unprivileged_userns_clone", "0", "1"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
        ("user.max_user_namespaces", "0", "10000"),
    )
    for key, refused, allowed in switches:
        if cgroups.read(f"/proc/sys/{key.replace('.', '/')}") == refused:
            return f"sudo sysctl -w {key}={allowed}"
    return "Run `sudo madang up`."


def _cgroups() -> Iterator[Finding]:
    """Makes a group and removes it."""
    name = f"madang-probe-{os.getpid()}"
    found = cgroups.detect(name)
    try:
        has = sorted(found.bases.keys() - {cgroups.UNIFIED})
    finally:
        found.remove()
    if not has:
        yield _less("cgroups", "none can be made: limits are only watched", _delegation_mend())
        return
    yield _good("cgroups", f"version {found.version}: {', '.join(has)}")
    if "memory" not in has:
        mend = "Add `cgroup_enable=memory cgroup_memory=1` to the kernel's command line, reboot."
        yield _less("memory limit", "the memory controller is off: memory is watched", mend)
    if "cpuset" not in has:
        text = "no cpuset: programs see more processors than they get"
        yield _less("processor sets", text, _delegation_mend())
    if "pids" not in has:
        yield _less(
            "process limit", "no pids controller: a fork bomb is not held", _delegation_mend()
        )


def _files() -> Finding:
    """What rules about files take."""
    if not fanotify.possible():
        text = "policies can't refuse to open files: no fanotify"
        return _less("files", text, "Root, and a kernel with fanotify's permission events.")
    if landlock.abi() < landlock.LEAST_ABI:
        text = "policies can't say where files are changed: no Landlock, or an old one"
        return _less("files", text, "Linux 6.2 or newer with `landlock` among its lsm modules.")
    return _good("files", "policies can refuse to open and to change files")


def _addresses() -> Finding:
    """Puts a fence around a group that nobody is in."""
    found = cgroups.detect(f"madang-probe-{os.getpid()}")
    rule = NetRule(layer=SITE, line=1, act=Act.CONNECT, targets=("*",), code=errno.EACCES)
    group = found.group("fence")
    try:
        for folder in group.folders:
            os.mkdir(folder)
        Fence.attach(group, (rule,)).close()
    except PolicyUnkept as exc:
        return _less("addresses", exc.text, "Root, and control groups of version 2.")
    except OSError as exc:
        return _less("addresses", f"no control group can be made: {exc}", _delegation_mend())
    finally:
        group.remove()
        found.remove()
    return _good("addresses", "policies can refuse connects and binds")


def _delegation_mend() -> str:
    if os.geteuid() == 0:
        return "mount -t cgroup2 none /sys/fs/cgroup"
    return "systemd-run --user --scope -p Delegate=yes madang up"


def _overlay(where: str) -> Finding:
    failure = attempt(lambda: _try_overlay(where))
    if failure is None:
        return _good("overlay", "images of layers can be mounted")
    mend = "modprobe overlay" if os.geteuid() == 0 else "sudo modprobe overlay; or run as root."
    return _bad("overlay", f"images of layers can't be mounted: {failure}", mend)


def _try_overlay(where: str) -> None:
    _own_mounts()
    syscalls.mount(b"tmpfs", os.fsencode(where), b"tmpfs")
    for layer in ("a", "b", "all"):
        os.mkdir(f"{where}/{layer}")
    options = f"lowerdir={where}/a:{where}/b"
    syscalls.mount(b"overlay", f"{where}/all".encode(), b"overlay", 1, options.encode())


def _own_mounts() -> None:
    """A mount namespace for this child, which may mount in it."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        syscalls.unshare(syscalls.CLONE_NEWNS)
    else:
        syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUSER)
        cgroups.write("/proc/self/setgroups", "deny")
        cgroups.write("/proc/self/uid_map", f"0 {uid} 1")
        cgroups.write("/proc/self/gid_map", f"0 {gid} 1")
    syscalls.mount(None, b"/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)


def _scratch(where: str) -> Finding:
    name = "disk limit"
    watched = "the limit of a session's files is only watched"
    if os.geteuid() != 0:
        return _less(name, f"not root: {watched}", "sudo madang up")
    if scratch.mkfs_path() is None:
        return _less(name, f"mkfs.ext4 is missing: {watched}", "apt-get install e2fsprogs")
    try:
        folder = tempfile.mkdtemp(prefix=".probe-", dir=where)
    except OSError as exc:
        return _less(name, f"{where}: {exc.strerror}", "Use --state DIR on a writable disk.")
    try:
        failure = attempt(lambda: _try_scratch(folder))
    finally:
        scratch.remove_tree(folder)
    if failure is None:
        return _good(name, "ext4 images on loop devices")
    return _less(name, f"no loop device: {watched} ({failure})", "modprobe loop")


def _try_scratch(folder: str) -> None:
    _own_mounts()
    pool = scratch.Pool(folder, ready=0, reserve_bytes=0)
    os.mkdir(f"{folder}/kernel")
    pool.take(f"{folder}/kernel", 4 << 20, os.geteuid())
    pool.remove(f"{folder}/kernel")


def _seccomp() -> Finding:
    failure = attempt(_try_seccomp)
    if failure is None:
        return _good("seccomp", "system calls are filtered")
    mend = "Use a kernel with CONFIG_SECCOMP_FILTER, as all distributions have."
    return _bad("seccomp", f"filters are refused: {failure}", mend)


def _try_seccomp() -> None:
    syscalls.no_new_privileges()
    seccomp.install(seccomp.program())
    try:
        syscalls.unshare(syscalls.CLONE_NEWUTS)
    except PermissionError:
        return
    raise OSError(errno.ENOTSUP, "the filter has no effect")


def _pidfd() -> Finding:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as exc:
        return _bad("pidfd", str(exc.strerror), "Use Linux 5.12 or newer.")
    return _good("pidfd", "processes are watched without races")


def _resource_capability() -> Finding:
    """Even root may lack CAP_SYS_RESOURCE, in containers: then hard limits can't be raised."""
    name, capability = "resource limits", 1 << 24
    for line in cgroups.read("/proc/self/status").splitlines():
        key, _, value = line.partition(":")
        if key == "CapEff" and os.geteuid() == 0 and not int(value, 16) & capability:
            text = "no CAP_SYS_RESOURCE: sessions keep the hard limits of this shell"
            return _less(name, text, "ulimit -Hn 1048576   # where the limit allows it")
    return _good(name, "can be set")


def _disk(where: str) -> Finding:
    found = os.statvfs(where)
    free = found.f_bavail * found.f_frsize
    text = f"{format_bytes(free)} free under {where}"
    if free < LITTLE_DISK:
        return _less("disk", text, "Free space, or use --state DIR on another disk.")
    return _good("disk", text)


def _clock(now: float) -> Finding:
    stamp = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now < BUILT_AT:
        return _less("clock", f"{stamp} is in the past", "timedatectl set-ntp true")
    return _good("clock", stamp)


def _inotify() -> Finding:
    text = cgroups.read("/proc/sys/fs/inotify/max_user_watches")
    if text.isdecimal() and int(text) < LITTLE_WATCHES:
        mend = "sysctl -w fs.inotify.max_user_watches=524288"
        return _less("inotify", f"{text} watches: editors in sessions may run out", mend)
    return _good("inotify", f"{text or 'unknown'} watches")


def _uv() -> Finding:
    beside = os.path.join(os.path.dirname(sys.executable), "uv")
    found = beside if os.access(beside, os.X_OK) else shutil.which("uv")
    if found is None:
        return _less("uv", "not found: images can't be built", "pip install uv")
    return _good("uv", found)


def _python(server_uid: int) -> Finding:
    """The server runs as an ordinary user; it must be able to execute this interpreter."""
    name = "python"
    failure = attempt(lambda: _try_python(server_uid))
    if failure is None:
        return _good(name, f"{sys.executable}, open to the server's user")
    blocked = _first_closed(os.path.realpath(sys.executable))
    if blocked is None:
        return _bad(name, f"{sys.executable}: {failure}", "Use another Python interpreter.")
    text = f"{blocked} is closed to the server's user; `madang up` makes a way for the server alone"
    return _good(name, text)


def _try_python(server_uid: int) -> None:
    os.setgroups([])
    os.setresgid(server_uid, server_uid, server_uid)
    os.setresuid(server_uid, server_uid, server_uid)
    if not os.access(sys.executable, os.X_OK):
        raise PermissionError(errno.EACCES, f"{sys.executable} can't be executed")


def _first_closed(path: str) -> str | None:
    """The topmost folder above *path* that others can't enter."""
    parts = path.strip("/").split("/")
    folders = ("/" + "/".join(parts[:count]) for count in range(1, len(parts)))
    return next((f for f in folders if not os.stat(f).st_mode & 0o001), None)


def _existing(path: str) -> str:
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def attempt(action: Callable[[], object]) -> str | None:
    """Do *action* in a forked child; None, or in words why it failed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _report(action, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode("utf-8", "replace")
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return None
    return said or f"the trial ended with {code}"


def _report(action: Callable[[], object], writing: int) -> None:
    """In the child: never returns."""
    code = 1
    try:
        signal.alarm(TRIAL_S)
        action()
        code = 0
    except BaseException as exc:
        with contextlib.suppress(OSError):
            os.write(writing, (getattr(exc, "strerror", None) or str(exc)).encode())
    finally:
        os._exit(code)
