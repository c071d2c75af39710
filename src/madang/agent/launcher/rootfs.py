"""Whole roots of images: their layers over each other, and a skeleton of ours on top.

The *skeleton* is a small tmpfs with the folders and files that sessions mount something on. It lies
on top, so the way to each of them leads through real folders of ours, whatever an image has there::

    /work /outputs /home/user /tmp /var/tmp /proc /sys /dev /madang/…   folders
    /etc/hostname hosts resolv.conf   files; passwd and group too, unless the session is root
    /madang/etc/passwd group          the image's own, which the session's are made from

Layers belong to the agent's user. They are mounted so that their files seem to be root's, or the
session's own where it may change them (an *idmapped* mount: nothing on disk changes). Whiteouts and
opaque folders are those of overlayfs with ``userxattr``, which nobody needs privileges to make.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

from madang.agent.launcher import syscalls
from madang.agent.launcher.order import Order, View
from madang.agent.launcher.syscalls import MS_NODEV, MS_NOSUID, MS_RDONLY
from madang.wire.errors import RuntimeFailed
from madang.wire.session import RootMode

FOLDERS: Final = (
    "dev etc home/user madang/bin madang/etc madang/gate madang/run madang/tools outputs proc sys "
    "tmp var/tmp work"
).split()
SESSION_ETC: Final = ("hostname", "hosts", "resolv.conf")
"""Each session's own."""
USERS_ETC: Final = ("group", "passwd")
"""Its own too, unless it is root: then it manages the image's."""
IMAGES_ETC: Final = "/madang/etc"
"""Copies of what the image has of ``USERS_ETC``; and our settings for ``apt``."""
UPPER: Final = "root/upper"
"""Folder of a session's scratch space: what it changed, as a layer."""
_WORK: Final = "root/work"
_APT: Final = b'APT::Sandbox::User "root";\n'
"""Else it changes its user, finds that it has not, and gives up."""
_MAX_ETC_BYTES: Final = 256 * 1024
PATH_ONLY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW


def mount_shared(target: bytes, layers: Sequence[str], view: View) -> None:
    """The read-only root that all sessions of an image share. Raises RuntimeFailed, OSError."""
    with _shown(view, owner=0, needed=False) as parent, ExitStack() as stack:
        fds = [_kept(stack, open_layer(parent, digest)) for digest in layers]
        skeleton = stack.enter_context(_skeleton(view, fds, owner=0, with_users=True))
        lower = b"lowerdir=" + _names((skeleton, *fds))
        _overlay(target, MS_RDONLY | MS_NOSUID | MS_NODEV, lower)


def mount_own(target: bytes, order: Order, view: View) -> None:
    """A session's own: what it changes goes into its scratch space."""
    uid = order.uid
    fake = order.spec.root is RootMode.FAKE
    upper = f"{order.scratch}/{UPPER}"
    with _shown(view, owner=uid, needed=True) as parent, ExitStack() as stack:
        fds = [_kept(stack, open_layer(parent, digest)) for digest in order.spec.image.layers]
        skeleton = stack.enter_context(_skeleton(view, fds, owner=uid, with_users=not fake))
        os.makedirs(upper, 0o755, exist_ok=True)
        os.chmod(os.path.dirname(upper), 0o700)
        os.chown(upper, uid, uid)
        os.makedirs(f"{order.scratch}/{_WORK}", 0o700, exist_ok=True)
        upper_fd = _kept(stack, os.open(upper, PATH_ONLY))
        work_fd = _kept(stack, os.open(f"{order.scratch}/{_WORK}", PATH_ONLY))
        options = b"lowerdir=%b,upperdir=%d,workdir=%d"
        options %= (_names((skeleton, *fds)), upper_fd, work_fd)
        _overlay(target, MS_NOSUID | MS_NODEV, options)


def open_layer(parent: int, digest: str) -> int:
    """Raises RuntimeFailed if it is missing."""
    try:
        return os.open(digest, PATH_ONLY, dir_fd=parent)
    except OSError as exc:
        raise RuntimeFailed(
            f"image layer {digest[:16]}… is missing on this machine; build the image again."
        ) from exc


def shell(root: bytes) -> str:
    """Of the root that is seen at *root*."""
    fd = os.open(root or b"/", PATH_ONLY)
    try:
        os.close(syscalls.open_in_root(fd, b"bin/bash", os.O_PATH))
    except OSError:
        return "/bin/sh"
    finally:
        os.close(fd)
    return "/bin/bash"


def users(root: bytes, name: str) -> list[str]:
    """Lines of the image's ``passwd`` or ``group``, as the skeleton at *root* keeps them."""
    with open(root + f"{IMAGES_ETC}/{name}".encode(), "rb") as file:
        return file.read().decode("utf-8", "replace").splitlines()


# -- the parts -------------------------------------------------------------------------------------


def _kept(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


@contextmanager
def _shown(view: View, *, owner: int, needed: bool) -> Iterator[int]:
    """The folder of all layers, as it looks if *owner* owned what the agent's user owns.

    Where the file system can't, it looks as it is, or RuntimeFailed if *needed*. Mounted for as
    long as the context lasts: older kernels stack only what lies in a mount namespace.
    """
    plain = os.open(view.layers, PATH_ONLY)
    place = os.fsencode(view.outer)
    try:
        agent = os.fstat(plain).st_uid
        if agent == owner:
            yield plain
            return
        tree = syscalls.open_tree(b"/proc/self/fd/%d" % plain)
        try:
            _change_owner(tree, agent, owner)
            syscalls.move_mount(tree, place)
        except OSError as exc:
            if needed:
                raise RuntimeFailed(_NOT_OWNED.format(exc.strerror)) from exc
            yield plain
            return
        finally:
            os.close(tree)
        shown = os.open(place, PATH_ONLY)
        try:
            yield shown
        finally:
            os.close(shown)
            syscalls.umount(place)
    finally:
        os.close(plain)


_NOT_OWNED: Final = (
    "its image's files can't be made its own here: the file system under the state folder takes no "
    "idmapped mounts ({}). Keep the state on ext4, xfs or btrfs, or leave --writable and --root "
    "out."
)


def _change_owner(tree: int, inside: int, outside: int) -> None:
    namespace = _user_namespace(inside, outside)
    try:
        syscalls.map_owners(tree, namespace)
    finally:
        os.close(namespace)


def _user_namespace(inside: int, outside: int) -> int:
    """One in which *inside* stands for our *outside*, for uids and gids. Nobody lives in it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            _offer_namespace(theirs, ours)
        theirs.close()
        fds: list[int] = []
        try:
            _, fds, _, _ = socket.recv_fds(ours, 1, 2)
            if len(fds) != 2:
                raise OSError(errno.EPERM, "user namespaces are forbidden")
            for name in (b"uid_map", b"gid_map"):
                file = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=fds[0])
                try:
                    os.write(file, b"%d %d 1" % (inside, outside))
                finally:
                    os.close(file)
            return os.dup(fds[1])
        finally:
            for fd in fds:
                os.close(fd)
            ours.close()
            os.waitpid(pid, 0)


def _offer_namespace(link: socket.socket, other: socket.socket) -> None:
    """The child's side: its folder of ``/proc``, as it may have another number there, and lives
    until the other end is closed."""
    try:
        other.close()
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        folder = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY)
        socket.send_fds(link, [b"!"], [folder, os.open("/proc/self/ns/user", os.O_RDONLY)])
        link.recv(1)
    finally:
        os._exit(0)


@contextmanager
def _skeleton(view: View, layers: Sequence[int], *, owner: int, with_users: bool) -> Iterator[int]:
    """Mounted for as long as the context lasts."""
    place = os.fsencode(view.private)
    options = b"mode=755,size=2m,uid=%d,gid=%d" % (owner, owner)
    syscalls.mount(b"tmpfs", place, b"tmpfs", MS_NOSUID | MS_NODEV, options)
    try:
        for name in FOLDERS:
            path = place
            for part in name.encode().split(b"/"):
                path += b"/" + part
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path, 0o755)
                    os.chown(path, owner, owner)
        for name in (*SESSION_ETC, *(USERS_ETC if with_users else ())):
            _write(place + f"/etc/{name}".encode(), b"", owner)
        for name in USERS_ETC:
            content = _image_etc(layers, b"etc/" + name.encode())
            _write(place + f"{IMAGES_ETC}/{name}".encode(), content, owner)
        _write(place + f"{IMAGES_ETC}/apt.conf".encode(), _APT, owner)
        fd = os.open(place, PATH_ONLY)
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        syscalls.umount(place)


def _write(path: bytes, content: bytes, owner: int) -> None:
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, content)
        os.fchown(fd, owner, owner)
    finally:
        os.close(fd)


def _image_etc(layers: Sequence[int], path: bytes) -> bytes:
    """A small file of the topmost layer that has it; empty where it is none, or too large."""
    for layer in layers:
        try:
            fd = syscalls.open_below(layer, path, _READ)
        except FileNotFoundError:
            continue
        except OSError:  # A link, a whiteout, something that only root may read.
            return b""
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_size > _MAX_ETC_BYTES:
                return b""
            return os.read(fd, _MAX_ETC_BYTES)
        finally:
            os.close(fd)
    return b""


def _names(fds: Sequence[int]) -> bytes:
    """Relative to /proc/self/fd names are short: an options page holds 800 of them."""
    return b":".join(b"%d" % fd for fd in fds)


def _overlay(target: bytes, flags: int, options: bytes) -> None:
    target = os.path.abspath(target)
    here = os.open(".", PATH_ONLY)
    try:
        os.chdir("/proc/self/fd")
        syscalls.mount(b"overlay", target, b"overlay", flags, options + b",userxattr")
    finally:
        os.fchdir(here)
        os.close(here)
