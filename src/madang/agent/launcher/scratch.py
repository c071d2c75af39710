"""Writable space of one kernel, limited in size: an ext4 image on a loop device.

::

    KERNEL/scratch.img   sparse file; holds the session's files until the kernel is removed
    KERNEL/scratch/      where it is mounted, in the launcher's mount namespace
      work/ outputs/ home/ tmp/ var_tmp/     the session's uid owns them

The loop device is configured to clear itself with the last unmount, so a launcher that is killed
leaves none behind. Where no loop device can be had (rootless, most containers) ``scratch/`` is a
plain folder and the limit is only watched.

The image is sparse: sessions together may be promised more than the disk has. When the host's disk
is full a session's writes fail with EIO, so ``take`` refuses to start one when little is left.

State lies in the file system only, and claims are renames: each call may be made in a forked
helper. All but ``missing`` may take tens of milliseconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from madang.agent.launcher import syscalls
from madang.wire.errors import RuntimeFailed, StorageFull
from madang.wire.size import GIB, MIB, format_bytes

IMAGE: Final = "scratch.img"
MOUNT: Final = "scratch"
FOLDERS: Final = {
    "work": 0o755,
    "outputs": 0o755,
    "home": 0o700,
    "tmp": 0o1777,
    "var_tmp": 0o1777,
}
DEFAULT_RESERVE: Final = 256 * MIB

_LOOP_CONFIGURE, _LOOP_GET_STATUS64, _LOOP_CTL_GET_FREE = 0x4C0A, 0x4C05, 0x4C82
_LOOP_MAJOR: Final = 7
_ATTACH_S: Final = 10.0
"""How long to try for a loop device: many starts at once take each the one that others saw free."""
_AUTOCLEAR: Final = 4
_LOOP_INFO: Final = struct.Struct("=QQQQQIIII64s64s32sQQ")
_LOOP_CONFIG: Final = struct.Struct(f"=II{_LOOP_INFO.size}s64x")
_MS_MOVE: Final = 8192
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BYTES_PER_INODE: Final = 8192
_MOUNT_FLAGS: Final = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOATIME
_MOUNT_OPTIONS: Final = b"noinit_itable,discard,nobarrier,errors=remount-ro"
"""Uninitialised inode tables stay holes; deleted files give the host its space back; a session's
fsync does not become one of the host's disk; after an error nothing more is written."""


@dataclass(frozen=True, slots=True)
class Scratch:
    path: str
    """Holds ``FOLDERS``."""
    enforced: str
    """``quota``, or ``watch`` for a plain folder."""


def is_mounted(path: str) -> bool:
    """Whether scratch space, a file system of its own, is mounted at *path*, absolute."""
    try:
        return os.lstat(path).st_dev != os.lstat(os.path.dirname(path)).st_dev
    except FileNotFoundError:
        return False


class Pool:
    """Makes scratch space; keeps some of the default size ready."""

    def __init__(
        self,
        folder: str,
        *,
        default_bytes: int = 10 * GIB,
        ready: int = 2,
        images: bool = True,
        reserve_bytes: int = DEFAULT_RESERVE,
    ) -> None:
        """*folder*: on the same file system as the kernels' folders.

        *images*: False where loop devices can't be had.
        """
        self.folder = folder
        self.default_bytes = default_bytes
        self.ready = ready
        self.images = images
        self.reserve_bytes = reserve_bytes
        self._mine = os.urandom(4).hex()
        """In the names of what this pool makes: an older launcher's may be mounted elsewhere."""
        self._template = f"{folder}/template-{self._mine}-/{IMAGE}"
        """A fresh image of the default size, never mounted; a copy is made sooner than another."""

    def missing(self) -> int:
        """How many ready ones ``refill`` would make."""
        return self.ready - len(self._entries(f"ready-{self._mine}-")) if self.images else 0

    def refill(self) -> None:
        """Make what is missing, as long as the disk has room. One call at a time."""
        for _ in range(self.missing()):
            if self._free_bytes() < self.reserve_bytes:
                return
            if not os.path.exists(self._template):
                self._add(os.path.dirname(self._template), self._make_template)
            name = f"ready-{self._mine}-{os.urandom(8).hex()}"
            self._add(f"{self.folder}/{name}", self._make_default)

    def _add(self, folder: str, make: Callable[[str], None]) -> None:
        """*folder*, filled by *make*: whole or not there."""
        half_made = f"{self.folder}/new-{self._mine}-{os.urandom(8).hex()}"
        os.mkdir(half_made, 0o700)
        try:
            make(half_made)
            os.rename(half_made, folder)
        except BaseException:
            self.remove(half_made)
            os.rmdir(half_made)
            raise

    def _make_template(self, folder: str) -> None:
        _format(f"{folder}/{IMAGE}", self.default_bytes)

    def _make_default(self, folder: str) -> None:
        _make(folder, self.default_bytes, self._template)

    def sweep(self) -> None:
        """Forget what older launchers made ready. May run beside all other calls."""
        os.makedirs(self.folder, 0o700, exist_ok=True)
        for name in self._entries(""):
            if f"-{self._mine}-" in name:
                continue
            self.remove(f"{self.folder}/{name}")
            remove_tree(f"{self.folder}/{name}")

    def take(self, kernel_dir: str, size_bytes: int, uid: int) -> Scratch:
        """Scratch space for a kernel, owned by *uid*. Doing it again changes nothing."""
        if not self._exists(kernel_dir):
            self._check_room(size_bytes)
            if self.images:
                self._take_image(kernel_dir, size_bytes)
            else:
                os.makedirs(f"{kernel_dir}/{MOUNT}", 0o755, exist_ok=True)
        scratch = self.mount_again(kernel_dir)
        _furnish(scratch.path, uid)
        return scratch

    def mount_again(self, kernel_dir: str) -> Scratch:
        """The same files once more, after ``release`` or a new launcher's start."""
        path = f"{kernel_dir}/{MOUNT}"
        if not os.path.exists(f"{kernel_dir}/{IMAGE}"):
            if not os.path.isdir(path):
                raise RuntimeFailed(f"{kernel_dir} has no scratch space; it was removed.")
            return Scratch(path, "watch")
        os.makedirs(path, 0o755, exist_ok=True)
        if not is_mounted(path):
            _mount(f"{kernel_dir}/{IMAGE}", path)
        return Scratch(path, "quota")

    def release(self, kernel_dir: str) -> None:
        """Unmount, keep the files. Doing it again changes nothing."""
        path = f"{kernel_dir}/{MOUNT}"
        while is_mounted(path):
            try:
                syscalls.umount(os.fsencode(path), syscalls.UMOUNT_NOFOLLOW)
            except OSError as exc:
                if exc.errno != errno.EBUSY:
                    raise
                syscalls.umount(os.fsencode(path))

    def remove(self, kernel_dir: str) -> None:
        """Delete the files. Doing it again changes nothing."""
        self.release(kernel_dir)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{kernel_dir}/{IMAGE}")
        remove_tree(f"{kernel_dir}/{MOUNT}")

    def _take_image(self, kernel_dir: str, size_bytes: int) -> None:
        is_default = size_bytes == self.default_bytes
        if not is_default or not self._take_ready(kernel_dir):
            try:
                _make(kernel_dir, size_bytes, self._template if is_default else None)
            except OSError as exc:
                self.remove(kernel_dir)
                raise RuntimeFailed(f"scratch space for {kernel_dir}: {exc}") from exc

    def _take_ready(self, kernel_dir: str) -> bool:
        for name in self._entries(f"ready-{self._mine}-"):
            claimed = f"{self.folder}/taken-{name}"
            try:
                os.rename(f"{self.folder}/{name}", claimed)
            except FileNotFoundError:
                continue  # Another helper was faster.
            os.rename(f"{claimed}/{IMAGE}", f"{kernel_dir}/{IMAGE}")
            os.makedirs(f"{kernel_dir}/{MOUNT}", 0o755, exist_ok=True)
            if is_mounted(f"{claimed}/{MOUNT}"):
                source, target = f"{claimed}/{MOUNT}".encode(), f"{kernel_dir}/{MOUNT}".encode()
                syscalls.mount(source, target, None, _MS_MOVE)
            os.rmdir(f"{claimed}/{MOUNT}")
            os.rmdir(claimed)
            return True
        return False

    def _check_room(self, size_bytes: int) -> None:
        free = self._free_bytes()
        if free < self.reserve_bytes:
            raise StorageFull(
                f"disk: {format_bytes(free)} are free under {self.folder}, less than the "
                f"{format_bytes(self.reserve_bytes)} kept back. Remove sessions (`madang rm`) or "
                "free space.",
                free=free,
                asked=size_bytes,
            )

    def _free_bytes(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def _entries(self, prefix: str) -> list[str]:
        return sorted(name for name in os.listdir(self.folder) if name.startswith(prefix))

    @staticmethod
    def _exists(kernel_dir: str) -> bool:
        """Made before, in either way; an empty folder is what a killed helper leaves."""
        folders = (f"{MOUNT}/{name}" for name in FOLDERS)
        return any(os.path.exists(f"{kernel_dir}/{name}") for name in (IMAGE, *folders))


def usage(path: str) -> tuple[int, int]:
    """Bytes used and bytes in all of mounted scratch space."""
    found = os.statvfs(path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_blocks * found.f_frsize


def _furnish(path: str, uid: int) -> None:
    for name, mode in FOLDERS.items():
        folder = f"{path}/{name}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
            os.chmod(folder, mode)
            os.chown(folder, uid, uid)


def image_bytes(size_bytes: int) -> int:
    """Size of an image in which programs can write at least *size_bytes*.

    On top come inodes and bitmaps, and the blocks that ext4 keeps back for delayed allocation.
    """
    groups = size_bytes // (128 * MIB) + 1
    kept_back = min(size_bytes // 50, 16 * MIB)
    return size_bytes + size_bytes // 28 + kept_back + groups * 32 * 1024 + 512 * 1024


def _make(folder: str, size_bytes: int, template: str | None) -> None:
    """A mounted image in *folder*; made under another name, so that it is whole or not there.

    *template*: an image of that size, to copy if it exists.
    """
    new, image = f"{folder}/{IMAGE}.new", f"{folder}/{IMAGE}"
    try:
        if template is None or not _copy(template, new):
            _format(new, size_bytes)
        os.rename(new, image)
    except BaseException:
        os.unlink(new)
        raise
    os.makedirs(f"{folder}/{MOUNT}", 0o755, exist_ok=True)
    _mount(image, f"{folder}/{MOUNT}", fresh=True)
    with contextlib.suppress(OSError):
        os.rmdir(f"{folder}/{MOUNT}/lost+found")


def _format(image: str, size_bytes: int) -> None:
    with _created(image) as fd:
        os.ftruncate(fd, image_bytes(size_bytes))
    _mkfs(image)


def _copy(source: str, target: str) -> bool:
    """Data as data, holes as holes. False: there is no *source*."""
    try:
        reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        with _created(target) as writer:
            os.ftruncate(writer, os.fstat(reader).st_size)
            for start, end in _data(reader):
                _copy_range(reader, writer, start, end)
    finally:
        os.close(reader)
    return True


def _data(fd: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file holds data."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno != errno.ENXIO:  # ENXIO: nothing but a hole is left.
                raise
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def _copy_range(reader: int, writer: int, start: int, end: int) -> None:
    while start < end:
        data = os.pread(reader, min(end - start, MIB), start)
        start += os.pwrite(writer, data, start)


@contextlib.contextmanager
def _created(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def mkfs_path() -> str | None:
    return shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin:/bin")


def _mkfs(image: str) -> None:
    program = mkfs_path()
    if program is None:
        raise RuntimeFailed("mkfs.ext4 is missing: install e2fsprogs.")
    argv = [
        *(program, "-q", "-F", "-m", "0", "-i", str(_BYTES_PER_INODE), "-b", "4096", "-I", "256"),
        *("-O", "^has_journal,^resize_inode,^metadata_csum,uninit_bg"),
        *("-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", image),
    ]
    quiet = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
    ]
    pid = os.posix_spawn(program, argv, {"PATH": "/usr/sbin:/usr/bin"}, file_actions=quiet)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        code = os.waitstatus_to_exitcode(status)
        raise OSError(errno.EIO, f"mkfs.ext4 on {image} ended with {code}")


def _mount(image: str, path: str, *, fresh: bool = False) -> None:
    """Mount *image* by a loop device that vanishes with the mount.

    An image that is still mounted in an older launcher's namespace is mounted through the same
    device: two devices over one file would destroy it. A *fresh* one never was: no search.
    """
    for _ in range(16):
        fd, device = (None if fresh else _attached(image)) or _attach(image)
        try:
            syscalls.mount(device.encode(), path.encode(), b"ext4", _MOUNT_FLAGS, _MOUNT_OPTIONS)
            return
        except OSError as exc:
            # The device that we found was cleared before we could mount it.
            if exc.errno not in {errno.ENXIO, errno.EBUSY, errno.EINVAL}:
                raise
            time.sleep(0.005)
        finally:
            os.close(fd)
    raise RuntimeFailed(f"{image} can't be mounted: its loop device keeps changing.")


def _attach(image: str) -> tuple[int, str]:
    """A free loop device over *image*: its open descriptor (keeps it alive) and path."""
    backing = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            return _configure(control, backing, image)
        finally:
            os.close(control)
    finally:
        os.close(backing)


def _configure(control: int, backing: int, image: str) -> tuple[int, str]:
    name = os.fsencode(image)[-63:]
    info = _LOOP_INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, _AUTOCLEAR, name, b"", b"", 0, 0)
    give_up = time.monotonic() + _ATTACH_S
    while time.monotonic() < give_up:
        device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
        _ensure_node(device)
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(backing, 4096, info))
            return fd, device
        except OSError as exc:
            os.close(fd)
            if exc.errno != errno.EBUSY:  # EBUSY: somebody else took the free one.
                raise
            time.sleep(os.urandom(1)[0] / 25_600)  # apart: helpers ask at once, for the same
    raise OSError(errno.EBUSY, "no free loop device")


def _ensure_node(device: str) -> None:
    """Containers have no devtmpfs: make the node."""
    if not os.path.exists(device):
        number = int(device.removeprefix("/dev/loop"))
        with contextlib.suppress(FileExistsError):
            os.mknod(device, 0o600 | 0o060000, os.makedev(_LOOP_MAJOR, number))


def _attached(image: str) -> tuple[int, str] | None:
    """The loop device that has *image* already, opened."""
    wanted = os.stat(image)
    for device in _configured_devices():
        try:
            fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            status = bytearray(_LOOP_INFO.size)
            fcntl.ioctl(fd, _LOOP_GET_STATUS64, status)
            dev, inode = _LOOP_INFO.unpack(status)[:2]
            if (dev, inode) == (wanted.st_dev, wanted.st_ino):
                return fd, device
        except OSError:
            pass
        os.close(fd)
    return None


def _configured_devices() -> Iterator[str]:
    for name in os.listdir("/sys/block"):
        if name.startswith("loop") and os.path.exists(f"/sys/block/{name}/loop"):
            yield f"/dev/{name}"


def remove_tree(path: str | bytes, parent: int | None = None) -> None:
    """Delete a folder that a hostile program filled: any depth, any modes, links not followed.

    Subfolders are moved up to the top before they are emptied, so no path and no recursion grows.
    Their new names can't be guessed, so none of them is taken.
    """
    try:
        top = os.open(path, _FOLDER, dir_fd=parent)
    except FileNotFoundError:
        return
    names = (f".removed-{os.urandom(8).hex()}-{number}" for number in itertools.count())
    try:
        _empty(top, top, names)
        while folders := os.listdir(top):
            for name in folders:
                _remove_folder(top, name, names)
    finally:
        os.close(top)
    os.rmdir(path, dir_fd=parent)


def _remove_folder(top: int, name: str, names: Iterator[str]) -> None:
    _open_up(name, top)
    folder = os.open(name, _FOLDER, dir_fd=top)
    try:
        _empty(folder, top, names)
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=top)


def _empty(folder: int, top: int, names: Iterator[str]) -> None:
    """Delete the files of *folder*; move its subfolders to *top* under new *names*."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        if not is_folder:
            os.unlink(name, dir_fd=folder)
        elif folder != top:
            _open_up(name, folder)
            os.rename(name, next(names), src_dir_fd=folder, dst_dir_fd=top)


def _open_up(name: str, parent: int) -> None:
    """Let its owner in. Root needs no leave, and must not chmod what may be a link by now."""
    if os.geteuid() != 0:
        os.chmod(name, 0o700, dir_fd=parent)
