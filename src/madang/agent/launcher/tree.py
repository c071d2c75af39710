"""Files below a root that a hostile program changes at the same time.

Every path is resolved by the kernel as if the root were ``/`` (openat2), work goes on with
descriptors from there, and nothing but regular files is ever read: no link leads out, no fifo
or device blocks. Missing permissions are left as they are: whoever uses this has the session's uid.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from madang.agent.launcher import syscalls
from madang.wire.errors import FileFailed, FileMissing, PathInvalid
from madang.wire.kernel import HOME_DIR, OUTPUT_DIR, WORK_DIR

SCRATCH_VIEW: Final[Mapping[str, str]] = {
    WORK_DIR: "work",
    OUTPUT_DIR: "outputs",
    HOME_DIR: "home",
    "/tmp": "tmp",
    "/var/tmp": "var_tmp",
}
"""Where a session sees the folders of its scratch space."""
MAX_DEPTH: Final = 200
MAX_ENTRIES: Final = 1_000_000
"""Of one folder."""
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in a folder."""

    path: bytes
    """Relative to where the walk began."""
    kind: str
    """``file``, ``dir``, ``link``, ``other``"""
    info: os.stat_result
    target: bytes | None = None


def kind_of(mode: int) -> str:
    known = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link"}
    return known.get(stat.S_IFMT(mode), "other")


class Tree:
    """The files that a session sees, by its own absolute paths; relative ones start in /work."""

    def __init__(self, root: str, view: Mapping[str, str] = SCRATCH_VIEW) -> None:
        self._root = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._view = {seen.encode().rstrip(b"/"): real.encode() for seen, real in view.items()}

    def close(self) -> None:
        os.close(self._root)

    def locate(self, path: bytes) -> bytes:
        """*path* as seen from the root; raises PathInvalid or FileMissing."""
        if not path or b"\0" in path:
            raise PathInvalid("a path is empty or has a NUL byte.")
        absolute = os.path.normpath(os.path.join(WORK_DIR.encode(), path))
        for seen, real in self._view.items():
            if absolute == seen or absolute.startswith(seen + b"/") or not seen:
                return os.path.normpath(real + absolute[len(seen) :])
        folders = ", ".join(os.fsdecode(seen) for seen in self._view)
        raise FileMissing(f"{os.fsdecode(absolute)} lies outside of {folders}.")

    def open(self, path: bytes, flags: int = _READ) -> int:
        """Open what *path* leads to, links followed inside the root."""
        return syscalls.open_in_root(self._root, self.locate(path), flags)

    def open_file(self, path: bytes) -> int:
        """Open a regular file for reading."""
        fd = self.open(path)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise FileFailed(f"{os.fsdecode(path)} is not a regular file.")
        return fd

    def open_folder(self, path: bytes, *, make: bool = False) -> int:
        """Open a folder; *make* it and its parents where they are missing."""
        try:
            return self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            if not make:
                raise
        parent, name = self.open_parent(path)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=parent)
        finally:
            os.close(parent)
        return self.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def open_parent(self, path: bytes) -> tuple[int, bytes]:
        """The folder in which *path* is or will be, made if missing, and the last name."""
        absolute = os.path.normpath(os.path.join(WORK_DIR.encode(), path))
        parent, name = os.path.split(absolute)
        if absolute in self._view or not name:
            raise PathInvalid(f"{os.fsdecode(path)} can't be replaced or removed.")
        return self.open_folder(parent, make=True), name


def walk(folder: int, prefix: bytes = b"", *, recursive: bool = True) -> Iterator[Entry]:
    """Entries of an open folder, each folder before its contents, names in order.

    A folder that may not be read or vanishes meanwhile is listed without its contents.
    """
    for name in names(folder):
        try:
            info = os.stat(name, dir_fd=folder, follow_symlinks=False)
            kind = kind_of(info.st_mode)
            target = os.readlink(name, dir_fd=folder) if kind == "link" else None
        except OSError:
            continue  # Removed or replaced meanwhile.
        path = prefix + name
        yield Entry(path, kind, info, target)
        if kind == "dir" and recursive:
            yield from _walk_into(folder, name, path)


def _walk_into(parent: int, name: bytes, path: bytes) -> Iterator[Entry]:
    if path.count(b"/") >= MAX_DEPTH:
        raise FileFailed(f"folders are nested deeper than {MAX_DEPTH} levels.")
    try:
        folder = os.open(name, _FOLDER, dir_fd=parent)
    except OSError:
        return
    try:
        yield from walk(folder, path + b"/")
    finally:
        os.close(folder)


def names(folder: int) -> list[bytes]:
    """Of all entries of an open folder, in order."""
    found: list[bytes] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            found.append(os.fsencode(entry.name))
            if len(found) > MAX_ENTRIES:
                raise FileFailed(f"a folder holds more than {MAX_ENTRIES} entries.")
    return sorted(found)


def open_entry(folder: int, path: bytes) -> int:
    """Open a regular file that ``walk`` found; OSError if it is none (any more)."""
    parent, name = os.path.split(path)
    at = _descend(folder, parent)
    try:
        fd = os.open(name, _READ | os.O_NOFOLLOW, dir_fd=at)
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def _descend(folder: int, path: bytes, *, make: bool = False) -> int:
    """Open a folder below *folder*, step by step, no links; *make* what is missing."""
    at = os.dup(folder)
    try:
        for name in filter(None, path.split(b"/")):
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=at)
            below = os.open(name, _FOLDER, dir_fd=at)
            os.close(at)
            at = below
    except BaseException:
        os.close(at)
        raise
    return at


def replace(parent: int, name: bytes, make: Callable[[bytes], None]) -> None:
    """Put what *make* creates under a temporary name at *name*, at once or not at all."""
    temporary = b".madang-" + os.urandom(8).hex().encode()
    try:
        make(temporary)
        os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=parent)
        raise


def write_file(
    parent: int, name: bytes, chunks: Iterable[bytes], mode: int, modified_ns: int | None = None
) -> int:
    """Replace a file by *chunks*, atomically. Its size."""
    size = 0

    def make(temporary: bytes) -> None:
        nonlocal size
        fd = os.open(temporary, _CREATE, 0o600, dir_fd=parent)
        try:
            for chunk in chunks:
                size += len(chunk)
                _write_all(fd, chunk)
            os.fchmod(fd, mode & 0o777)
            if modified_ns is not None:
                os.utime(fd, ns=(modified_ns, modified_ns))
        finally:
            os.close(fd)

    replace(parent, name, make)
    return size


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Writer:
    """Puts many entries below an open folder; remembers the last parent."""

    def __init__(self, folder: int) -> None:
        self._folder = folder
        self._parent: tuple[bytes, int] | None = None
        self._folders: list[tuple[bytes, int, int]] = []
        self.files = 0
        self.bytes = 0

    def file(self, path: bytes, chunks: Iterable[bytes], mode: int, modified_ns: int) -> None:
        parent, name = self._locate(path)
        self.bytes += write_file(parent, name, chunks, mode, modified_ns)
        self.files += 1

    def link(self, path: bytes, target: bytes) -> None:
        """A symbolic link; where it leads is the session's own affair."""
        parent, name = self._locate(path)
        replace(parent, name, lambda temporary: os.symlink(target, temporary, dir_fd=parent))
        self.files += 1

    def hard_link(self, path: bytes, earlier: bytes) -> None:
        """One more name of a file that was put here before."""
        parent, name = self._locate(path)
        source = _descend(self._folder, os.path.dirname(earlier))
        try:

            def make(temporary: bytes) -> None:
                os.link(
                    os.path.basename(earlier),
                    temporary,
                    src_dir_fd=source,
                    dst_dir_fd=parent,
                    follow_symlinks=False,
                )

            replace(parent, name, make)
        finally:
            os.close(source)
        self.files += 1

    def folder(self, path: bytes, mode: int, modified_ns: int) -> None:
        """A folder; its mode and time are set at the end, when nothing is put into it any more."""
        os.close(_descend(self._folder, path, make=True))
        self._folders.append((path, mode, modified_ns))

    def close(self) -> None:
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None

    def finish(self) -> None:
        """Set what ``folder`` put off, deepest first."""
        self.close()
        for path, mode, modified_ns in sorted(self._folders, reverse=True):
            fd = _descend(self._folder, path)
            try:
                os.fchmod(fd, mode & 0o777)
                os.utime(fd, ns=(modified_ns, modified_ns))
            finally:
                os.close(fd)

    def _locate(self, path: bytes) -> tuple[int, bytes]:
        folder, name = os.path.split(path)
        if self._parent is None or self._parent[0] != folder:
            self.close()
            self._parent = (folder, _descend(self._folder, folder, make=True))
        return self._parent[1], name
