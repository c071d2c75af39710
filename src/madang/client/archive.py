"""Tar streams: packing local files, and unpacking what a session sent without trusting it."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from madang.wire.errors import FileFailed, FileMissing
from madang.wire.paths import display

_CHUNK: Final = 256 * 1024
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


# Packing


def packer(
    sources: Sequence[str | bytes], name: str | bytes | None = None
) -> Callable[[], Iterator[bytes]]:
    """A body with *sources*, each under its own last name, or the only one under *name*.

    Raises FileMissing at once.
    """
    paths = [os.fsencode(source) for source in sources]
    for path in paths:
        if not os.path.lexists(path):
            raise FileMissing(f"{display(path)}: no such file here.")
    return lambda: _pack(paths, None if name is None else os.fsencode(name))


def _pack(paths: Sequence[bytes], given: bytes | None) -> Iterator[bytes]:
    for path in paths:
        last = os.path.basename(path.rstrip(b"/"))
        own = os.path.basename(os.path.realpath(path)) if last in {b"", b".", b".."} else last
        name = own if given is None else given
        for where, below in _walk(path, b""):
            full = b"/".join(part for part in (name, below) if part)
            if full:
                yield from _member(where, full)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _walk(path: bytes, name: bytes) -> Iterator[tuple[bytes, bytes]]:
    """A path and all below it, parents first, with their names relative to the first."""
    yield path, name
    if os.path.isdir(path) and not os.path.islink(path):
        for child in sorted(os.listdir(path)):
            below = name + b"/" + child if name else child
            yield from _walk(os.path.join(path, child), below)


def _member(path: bytes, name: bytes) -> Iterator[bytes]:
    """One header with its data; sockets, pipes and devices are left out."""
    try:
        seen = os.lstat(path)
        info = tarfile.TarInfo(os.fsdecode(name))
        info.mode = stat.S_IMODE(seen.st_mode) & 0o777
        info.mtime = seen.st_mtime
        if stat.S_ISDIR(seen.st_mode):
            info.type = tarfile.DIRTYPE
        elif stat.S_ISLNK(seen.st_mode):
            info.type, info.linkname = tarfile.SYMTYPE, os.fsdecode(os.readlink(path))
        elif stat.S_ISREG(seen.st_mode):
            yield from _file(path, info)
            return
        else:
            return
        yield _header(info)
    except OSError as exc:
        raise FileFailed(f"{display(path)} can't be read ({exc.strerror}).") from exc


def _header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _file(path: bytes, info: tarfile.TarInfo) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        info.size = left = os.fstat(file.fileno()).st_size
        yield _header(info)
        while left:
            data = file.read(min(left, _CHUNK))
            if not data:
                raise FileFailed(f"{display(path)} became shorter while it was read. Try again.")
            left -= len(data)
            yield data
    yield bytes(-info.size % tarfile.BLOCKSIZE)


# Unpacking


@dataclass(slots=True)
class Unpacked:
    files: int = 0
    size_bytes: int = 0
    skipped: list[str] = field(default_factory=list)
    """Names left out, each with the reason."""


class _Reader(io.BufferedIOBase):
    """Chunks as a file that is read forwards."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None and size >= 0
        parts, have = [self._rest], len(self._rest)
        while have < size and (chunk := next(self._chunks, b"")):
            parts.append(chunk)
            have += len(chunk)
        data = b"".join(parts)
        self._rest = data[size:]
        return data[:size]


def unpack(chunks: Iterator[bytes], target: str | bytes) -> Unpacked:
    """Write the archive's members below the folder *target*.

    Nothing is ever written outside: each folder on the way is opened by itself and links are not
    followed. Left out are devices, pipes, links that lead out, and names with ``..``. Modes lose
    set-uid bits and writing by others.
    """
    root = os.fsencode(target)
    os.makedirs(root, exist_ok=True)
    done = Unpacked()
    root_fd = os.open(os.path.realpath(root), _FOLDER)
    try:
        with tarfile.open(
            fileobj=_Reader(chunks),
            mode="r|",
            encoding="utf-8",
            errors="surrogateescape",
        ) as tar:
            for member in tar:
                _unpack_member(tar, member, root_fd, done)
    except tarfile.TarError as exc:
        raise FileFailed(f"the archive from the session is damaged: {exc}.") from exc
    finally:
        os.close(root_fd)
    return done


def _unpack_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, root_fd: int, done: Unpacked
) -> None:
    parts = [part for part in os.fsencode(member.name).split(b"/") if part not in {b"", b"."}]
    shown = display(b"/".join(parts))
    reason = _refusal(member, parts)
    if reason:
        done.skipped.append(f"{shown} ({reason})")
        return
    if not parts:
        return
    try:
        with _folder(root_fd, parts[:-1]) as fd:
            _make(tar, member, fd, parts[-1], done)
    except OSError as exc:
        raise FileFailed(f"{shown} can't be written here ({exc.strerror}).") from exc


def _refusal(member: tarfile.TarInfo, parts: list[bytes]) -> str:
    """Why *member* is left out; empty if it is not."""
    if b".." in parts or not parts:
        return "leads out of the folder" if b".." in parts else ""
    if member.issym():
        stays = _stays(len(parts) - 1, os.fsencode(member.linkname))
        return "" if stays else "a link that leads out of the folder"
    if not (member.isreg() or member.isdir()):
        return "neither file, folder nor link"
    return ""


def _stays(depth: int, target: bytes) -> bool:
    """Whether a link in a folder *depth* levels down stays inside, whatever other links there are.

    It may go up first, from a folder that we made; never up from where a name leads: that name may
    be a link itself.
    """
    steps = [step for step in target.split(b"/") if step not in {b"", b"."}]
    up = next((n for n, step in enumerate(steps) if step != b".."), len(steps))
    return not target.startswith(b"/") and up <= depth and b".." not in steps[up:]


@contextlib.contextmanager
def _folder(root_fd: int, parts: Sequence[bytes]) -> Iterator[int]:
    """A descriptor of a folder below *root_fd*, made if need be."""
    fd = os.dup(root_fd)
    try:
        for part in parts:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=fd)
            below = os.open(part, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def _make(
    tar: tarfile.TarFile, member: tarfile.TarInfo, fd: int, name: bytes, done: Unpacked
) -> None:
    if member.isdir():
        with _folder(fd, [name]) as made:
            os.fchmod(made, member.mode & 0o755 | 0o700)
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=fd)
    if member.issym():
        os.symlink(os.fsencode(member.linkname), name, dir_fd=fd)
        return
    source = tar.extractfile(member)
    assert source is not None
    with open(os.open(name, _NEW, 0o600, dir_fd=fd), "wb") as file:
        while data := source.read(_CHUNK):
            file.write(data)
        file.flush()
        os.fchmod(file.fileno(), member.mode & 0o755 | 0o600)
        os.utime(file.fileno(), (member.mtime, member.mtime))
    done.files += 1
    done.size_bytes += member.size
