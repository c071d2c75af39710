"""A session's file system: image templates, and the root that each session gets.

A *template* is made once per image, in the launcher's private mount namespace: a read-only tmpfs
with the host's allow-listed folders bound in and an empty folder for everything of ours. A
session's init binds the whole template in one call and mounts on it what is the session's own.

The launcher is privileged and the state folder belongs partly to the server, which may be
hostile: image layers are opened without following links and named by descriptor from then on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from madang.agent.launcher import rootfs, syscalls, truth
from madang.agent.launcher.cgroups import Group
from madang.agent.launcher.network.rules import RESOLVER
from madang.agent.launcher.order import Order, View
from madang.agent.launcher.syscalls import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REMOUNT,
)
from madang.wire.image import ImageKind
from madang.wire.kernel import (
    HOME_DIR,
    OUTPUT_DIR,
    SERVICE_DIR,
    TOOLS_DIR,
    USER_NAME,
    WORK_DIR,
    KernelSpec,
)
from madang.wire.session import RootMode

HOST_KIND: Final = str(ImageKind.HOST)
HOST_FOLDERS: Final = ("bin", "lib", "lib32", "lib64", "libx32", "opt", "sbin", "usr")
CHROOT_TEXT: Final = "this is a chroot: / is no mount, so sessions can't get a root of their own"
CHROOT_MEND: Final = "Use the machine itself, a container (--privileged) or systemd-nspawn."
_FOLDERS: Final = (
    "dev etc env home home/user madang madang/bin madang/gate madang/run madang/tools mnt outputs "
    "proc root run srv sys tmp var var/cache var/lib var/tmp work"
).split()
_SCRATCH: Final = {
    "work": WORK_DIR,
    "outputs": OUTPUT_DIR,
    "home": HOME_DIR,
    "tmp": "/tmp",
    "var_tmp": "/var/tmp",
}
_OWN_ETC: Final = tuple(sorted((*rootfs.SESSION_ETC, *rootfs.USERS_ETC)))
_ROOT_USER: Final = "root:x:0:0:root:/root:/usr/sbin/nologin"
_NOBODY: Final = "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin"
_NOGROUP: Final = "nogroup:x:65534:"
_DEVICES: Final = {
    "null": (1, 3), "zero": (1, 5), "full": (1, 7),
    "random": (1, 8), "urandom": (1, 9), "tty": (5, 0),
}  # fmt: skip
_DEVICE_MODE: Final = 0o666
_DEVICE_LINKS: Final = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
_PROC_HIDDEN_FILES: Final = ("kcore", "keys", "timer_list", "sysrq-trigger", "sched_debug")
_PROC_HIDDEN_FOLDERS: Final = ("acpi", "scsi")
_PROC_READ_ONLY: Final = ("bus", "fs", "irq", "sys")
_STANDARD_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_QUIET: Final = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
_READ_ONLY: Final = MOUNT_ATTR_RDONLY | _QUIET


class Templates:
    """Makes templates on first use and keeps them."""

    def __init__(self, state: str, *, rootless: bool, extra: Sequence[str] = ()) -> None:
        """*extra*: further folders of the host to show, absolute."""
        self._state = state
        self._folder = f"{state}/mounts"
        self._rootless = rootless
        self._extra = tuple(extra)
        self._made: dict[str, str] = {}

    def open(self) -> None:
        """Make our folders. What is mounted there is seen in our mount namespace only.

        They can be entered: a nest's root is no owner of theirs.
        """
        for name in ("", "/root", "/private", "/outer", "/warm", "/empty"):
            os.makedirs(self._folder + name, exist_ok=True)
            os.chmod(self._folder + name, 0o711)  # noqa: S103

    def view(self, spec: KernelSpec, service: str) -> View:
        """Of one session. Raises RuntimeFailed if a layer is missing."""
        own = spec.root is not RootMode.READ_ONLY
        host = self.template(HOST_KIND, ())
        return replace(
            self._places(host),
            template=host if own else self.template(spec.image.kind, spec.image.layers),
            service=service,
            tools=f"{self._state}/tools" if spec.build else None,
        )

    def _places(self, host: str) -> View:
        return View(
            template=host,
            root=f"{self._folder}/root",
            private=f"{self._folder}/private",
            outer=f"{self._folder}/outer",
            service="",
            tools=None,
            host=host,
            layers=f"{self._state}/layers",
        )

    def template(self, kind: str, layers: Sequence[str]) -> str:
        names = "\n".join((kind, *layers))
        name = kind if kind == HOST_KIND else hashlib.sha256(names.encode()).hexdigest()
        if name not in self._made:
            self._made[name] = self._make(name, kind, layers)
        return self._made[name]

    def forget(self, kept: set[str]) -> None:
        """Unmount layered templates that are not *kept* (their paths)."""
        for name, path in list(self._made.items()):
            if name != HOST_KIND and path not in kept:
                del self._made[name]
                _discard(path)

    def _make(self, name: str, kind: str, layers: Sequence[str]) -> str:
        path = f"{self._folder}/template-{name}"
        os.makedirs(path, 0o700, exist_ok=True)
        if os.path.ismount(path):  # An older launcher's.
            return path
        root = os.fsencode(path)
        if kind == ImageKind.ROOT:
            try:
                rootfs.mount_shared(root, layers, self._places(""))
            except BaseException:
                os.rmdir(path)
                raise
        else:
            syscalls.mount(b"tmpfs", root, b"tmpfs", MS_NOSUID, b"mode=755,size=1m")
        try:
            if kind != ImageKind.ROOT:
                self._furnish(root, layers)
            syscalls.mount(None, root, None, syscalls.MS_REC | syscalls.MS_PRIVATE)
            syscalls.mount_setattr(root, _READ_ONLY)
            self._make_devices(root + b"/dev")
        except BaseException:
            _discard(path)
            raise
        return path

    def _furnish(self, root: bytes, layers: Sequence[str]) -> None:
        for name in _FOLDERS:
            os.makedirs(root + b"/" + name.encode(), 0o755, exist_ok=True)
        os.symlink("../run", root + b"/var/run")
        for name in (*HOST_FOLDERS, *(path.strip("/") for path in self._extra)):
            _show_host(root, name.encode())
        _mount_etc(root)
        _link_python(root)
        if layers:
            self._mount_layers(root + b"/env", layers)

    def _mount_layers(self, target: bytes, layers: Sequence[str]) -> None:
        fds: list[int] = []
        try:
            parent = os.open(f"{self._state}/layers", rootfs.PATH_ONLY)
            fds.append(parent)
            fds.extend(rootfs.open_layer(parent, digest) for digest in layers)
            if len(layers) == 1:
                syscalls.bind(b"/proc/self/fd/%d" % fds[1], target)
                return
            # Relative to /proc/self/fd names are short: an options page holds 800 of them.
            lower = b":".join(b"%d" % fd for fd in fds[1:])
            here = os.open(".", rootfs.PATH_ONLY)
            fds.append(here)
            os.chdir("/proc/self/fd")
            try:
                flags = MS_RDONLY | MS_NOSUID | MS_NODEV
                syscalls.mount(b"overlay", target, b"overlay", flags, b"lowerdir=" + lower)
            finally:
                os.fchdir(here)
        finally:
            for fd in fds:
                os.close(fd)

    def _make_devices(self, dev: bytes) -> None:
        flags = MS_NOSUID | MS_NOEXEC
        syscalls.mount(b"tmpfs", dev, b"tmpfs", flags, b"mode=755,size=64k")
        for name, (major, minor) in _DEVICES.items():
            node = dev + b"/" + name.encode()
            if self._rootless:
                touch(node)
                syscalls.bind(b"/dev/" + name.encode(), node)
            else:
                os.mknod(node, stat.S_IFCHR, os.makedev(major, minor))
                os.chmod(node, _DEVICE_MODE)
        for name, target in _DEVICE_LINKS.items():
            os.symlink(target, dev + b"/" + name.encode())
        for name in ("pts", "shm"):
            os.mkdir(dev + b"/" + name.encode())
        syscalls.mount_setattr(dev, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID)


def _discard(path: str) -> None:
    syscalls.umount(os.fsencode(path))
    os.rmdir(path)


def touch(path: bytes) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))


def _show_host(root: bytes, name: bytes) -> None:
    source, target = b"/" + name, root + b"/" + name
    try:
        if stat.S_ISLNK(os.lstat(source).st_mode):
            os.symlink(os.readlink(source), target)
            return
    except FileNotFoundError:
        return
    os.makedirs(target, 0o755, exist_ok=True)
    syscalls.bind(source, target, recursive=True)


def _mount_etc(root: bytes) -> None:
    """The host's /etc with empty files on top where each session's own are bound over."""
    top = root + b"/madang/etc"
    os.makedirs(top, 0o755)
    for name in _OWN_ETC:
        touch(top + b"/" + name.encode())
    fd = os.open(top, rootfs.PATH_ONLY)  # Named by descriptor: sessions see the mount's options.
    try:
        options = b"lowerdir=/proc/self/fd/%d:/etc" % fd
        flags = MS_RDONLY | MS_NOSUID | MS_NODEV
        syscalls.mount(b"overlay", root + b"/etc", b"overlay", flags, options)
    except OSError as exc:
        if exc.errno not in {errno.EPERM, errno.EINVAL, errno.ENODEV}:
            raise
        # No overlay here: what the host's /etc lacks stays missing.
        syscalls.bind(b"/etc", root + b"/etc", recursive=True)
    finally:
        os.close(fd)


def _link_python(root: bytes) -> None:
    """``python`` for hosts that only have ``python3``."""
    python3 = shutil.which("python3", path=_STANDARD_PATH)
    if python3 and not shutil.which("python", path=_STANDARD_PATH):
        os.symlink(python3, root + b"/madang/bin/python")


def root_is_mount() -> bool:
    """Whether the kernel lets processes here change their root; not so in a chroot."""
    with open("/proc/self/mountinfo", "rb") as file:
        return any(line.split()[4] == b"/" for line in file)


def enter(order: Order, view: View) -> None:
    """Make the session's root and move into it; the caller has a mount namespace of its own."""
    move_into(assemble(order, view))


def assemble(order: Order, view: View) -> bytes:
    """Mount all parts of the session's root; where it is."""
    frame = Frame(view, order.group, order)
    _bind_scratch(os.fsencode(order.scratch), frame.root)
    service = frame.root + SERVICE_DIR.encode()
    _bind_quiet(os.fsencode(view.service), service, MOUNT_ATTR_RDONLY)
    if view.tools is not None:
        _bind_quiet(os.fsencode(view.tools), frame.root + TOOLS_DIR.encode(), MOUNT_ATTR_RDONLY)
    frame.fill(order)
    return frame.root


class Frame:
    """A root with everything that is the same for all sessions of an image.

    What a session has of its own is added when it is known: its folders, and the contents of files
    that are there already, empty.
    """

    def __init__(self, view: View, group: Group, order: Order | None = None) -> None:
        """*order*: where it is known already; it may want a root of its own."""
        self.root = os.fsencode(view.root)
        private = os.fsencode(view.private)
        etc = _OWN_ETC
        if order is not None and order.spec.root is not RootMode.READ_ONLY:
            rootfs.mount_own(self.root, order, view)
            syscalls.bind(os.fsencode(view.host) + b"/dev", self.root + b"/dev", recursive=True)
            if order.spec.root is RootMode.FAKE:
                etc = rootfs.SESSION_ETC
        else:
            syscalls.bind(os.fsencode(view.template), self.root, recursive=True)
        mount_proc(self.root + b"/proc")
        flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
        syscalls.mount(b"tmpfs", private, b"tmpfs", flags, b"mode=755,size=4m")
        self._private = os.open(private, rootfs.PATH_ONLY)
        self._show_own_files(private, group, etc)
        flags = MS_NOSUID | MS_NOEXEC
        options = b"newinstance,ptmxmode=0666,mode=0620"
        syscalls.mount(b"devpts", self.root + b"/dev/pts", b"devpts", flags, options)

    def _show_own_files(self, private: bytes, group: Group, etc: Sequence[str]) -> None:
        """Read-only where they are shown; they can be written by way of *private* alone."""
        os.mkdir(private + b"/etc")
        os.mkdir(private + b"/proc")
        for path in (*(f"/etc/{name}" for name in etc), *truth.PROC_FILES):
            source = private + path.encode()
            touch(source)
            _ignore_missing(_bind_quiet, source, self.root + path.encode(), MOUNT_ATTR_RDONLY)
        groups = _make_group_folders(group, private)
        _bind_quiet(private + b"/sys", self.root + b"/sys", MOUNT_ATTR_RDONLY)
        for source, name in groups:
            target = self.root + b"/sys/fs/cgroup" + name
            syscalls.bind(source, target)
            syscalls.mount_setattr(target, _READ_ONLY | syscalls.MOUNT_ATTR_NOEXEC)

    def enter(self) -> None:
        """Move in, before it is filled."""
        move_into(self.root)
        self.root = b""

    def take(self, folders: Sequence[int]) -> None:
        """Mount the session's folders, as ``clone_folders`` gave them."""
        targets = [*_SCRATCH.values(), SERVICE_DIR]
        for fd, target in zip(folders, targets, strict=True):
            path = self.root + target.encode()
            syscalls.move_mount(fd, path)
            os.close(fd)
            only = MOUNT_ATTR_RDONLY if target == SERVICE_DIR else 0
            syscalls.mount_setattr(path, _QUIET | only, recursive=False)

    def fill(self, order: Order) -> None:
        """Write the session's own files; afterwards nobody can write them any more."""
        size = order.spec.size
        for path, content in own_files(order, self.root).items():
            _write(path[1:], content, self._private)
        os.close(self._private)
        options = b"mode=1777,size=%d" % size.mem_bytes
        flags = MS_NOSUID | MS_NODEV
        syscalls.mount(b"tmpfs", self.root + b"/dev/shm", b"tmpfs", flags, options)


def move_into(root: bytes) -> None:
    """Let go of the old root, with everything that was mounted for this one."""
    os.chdir(root)
    syscalls.pivot_root(b".", b".")
    syscalls.umount(b".", syscalls.MNT_DETACH)
    os.chdir("/")


def own_files(order: Order, root: bytes = b"") -> dict[str, bytes]:
    """Path → content of what no other session has. *root*: where its root is seen."""
    size = order.spec.size
    return _etc_files(order, root) | truth.files(size.cpu, order.cpus, size.mem_bytes)


def _write(path: str, content: bytes, parent: int) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644, dir_fd=parent)
    except FileNotFoundError:
        for end in range(1, len(path)):
            if path[end] == "/":
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path[:end], 0o755, dir_fd=parent)
        return _write(path, content, parent)
    try:
        while content:
            content = content[os.write(fd, content) :]
    finally:
        os.close(fd)
    return None


def clone_folders(scratch: str, service: str) -> Iterator[int]:
    """A session's folders as mounts, for an init that has moved into its root already."""
    for path in (*(f"{scratch}/{name}" for name in _SCRATCH), service):
        yield syscalls.clone_mount(os.fsencode(path))


def _bind_scratch(scratch: bytes, root: bytes) -> None:
    for name, target in _SCRATCH.items():
        _bind_quiet(scratch + b"/" + name.encode(), root + target.encode())


def _bind_quiet(source: bytes, target: bytes, attributes: int = 0) -> None:
    syscalls.bind(source, target)
    syscalls.mount_setattr(target, _QUIET | attributes, recursive=False)


def mount_proc(proc: bytes) -> None:
    syscalls.mount(b"proc", proc, b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for name in _PROC_HIDDEN_FILES:
        _ignore_missing(syscalls.bind, b"/dev/null", proc + b"/" + name.encode())
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
    for name in _PROC_HIDDEN_FOLDERS:
        target = proc + b"/" + name.encode()
        _ignore_missing(syscalls.mount, b"tmpfs", target, b"tmpfs", flags, b"size=4k,mode=555")
    for name in _PROC_READ_ONLY:
        target = proc + b"/" + name.encode()
        _ignore_missing(syscalls.bind, target, target)
        remount = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
        _ignore_missing(syscalls.mount, None, target, None, remount)


def _ignore_missing(call: object, *arguments: object) -> None:
    assert callable(call)
    try:
        call(*arguments)
    except FileNotFoundError:
        pass


def _make_group_folders(group: Group, private: bytes) -> list[tuple[bytes, bytes]]:
    """Where the session's own control group is shown: (source, name below the mount point)."""
    base = private + b"/sys/fs/cgroup"
    os.makedirs(base, 0o755)
    if group.version == 2:
        return [(os.fsencode(folder), b"") for folder in group.folders]
    pairs = []
    for controller, folder in group.paths.items():
        name = b"/" + controller.encode()
        os.mkdir(base + name)
        pairs.append((os.fsencode(folder), name))
    return pairs


def _etc_files(order: Order, root: bytes) -> dict[str, bytes]:
    name, uid = order.spec.hostname, shown_uid(order)
    whole = order.spec.image.kind == ImageKind.ROOT
    user = f"{USER_NAME}:x:{uid}:{uid}::{HOME_DIR}:{rootfs.shell(root) if whole else shell()}"
    passwd, group = [_ROOT_USER, user, _NOBODY], ["root:x:0:", f"{USER_NAME}:x:{uid}:", _NOGROUP]
    if whole:
        passwd = _with_images(passwd, rootfs.users(root, "passwd"))
        group = _with_images(group, rootfs.users(root, "group"))
    hosts = f"127.0.0.1 localhost {name}\n::1 localhost ip6-localhost ip6-loopback\n"
    return {
        "/etc/passwd": _lines(passwd),
        "/etc/group": _lines(group),
        "/etc/hostname": f"{name}\n".encode(),
        "/etc/hosts": hosts.encode(),
        "/etc/resolv.conf": _resolv_conf(order),
    }


def _with_images(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """The image's users too, where they take nobody's name or number."""
    taken = {part for line in ours for part in (line.split(":")[0], line.split(":")[2])}
    others = (line for line in theirs if line.count(":") >= 2)
    return [*ours, *(each for each in others if not taken & set(each.split(":")[:3:2]))]


def _lines(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _resolv_conf(order: Order) -> bytes:
    """One server gives each name; it answers on the session's own loopback."""
    if not order.spec.network:
        return b""
    return f"nameserver {RESOLVER}\noptions timeout:5 attempts:2\n".encode()


NESTED_UID: Final = 1000


def shown_uid(order: Order) -> int:
    """The uid that the session's programs see."""
    if order.spec.root is RootMode.FAKE:
        return 0
    return NESTED_UID if order.nested else order.uid


def shell() -> str:
    return "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
