"""A layer on disk: one installed distribution in the layout of a virtual environment.

The digest of a layer is the SHA-256 (hex) over one line per file, the lines sorted as bytes::

    PATH NUL KIND NUL CONTENT LF

PATH is relative to the layer's root, KIND one of ``644``, ``755`` (an executable) and ``link``,
CONTENT the SHA-256 (hex) of the file's bytes, or of a symbolic link's target. Folders and byte code
(``__pycache__/*.pyc``) don't count: byte code is made anew on each node from the files that do.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from stat import S_ISDIR, S_ISREG

ENVIRONMENT = "/env"
MODIFIED_AT = 315532800
"""1980-01-01: time stamps say nothing in a layer; zip files can hold this one."""
CHUNK = 1024 * 1024
_INTERPRETER = re.compile(rb"bin/python[0-9.]*")


def line(path: bytes, kind: bytes, content: str) -> bytes:
    """One file's part of a layer's digest; *content* is a SHA-256 in hex."""
    return b"%s\0%s\0%s\n" % (path, kind, content.encode())


def digest(lines: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def is_byte_code(path: bytes) -> bool:
    return path.endswith(b".pyc") and path.rpartition(b"/")[0].endswith(b"__pycache__")


def is_path(path: bytes) -> bool:
    """Whether *path* is relative and stays below its root, with no odd parts."""
    return bool(path) and b"\0" not in path and not {b"", b".", b".."} & set(path.split(b"/"))


def is_link(path: bytes, target: bytes) -> bool:
    """Whether a symbolic link stays in its layer; only the interpreter's may leave it.

    It may go up first, never up from where a name leads: that name may be a link itself.
    """
    if target.startswith(b"/"):
        return bool(_INTERPRETER.fullmatch(path)) and is_path(target[1:])
    steps = [step for step in target.split(b"/") if step not in {b"", b"."}]
    up = next((n for n, step in enumerate(steps) if step != b".."), len(steps))
    return bool(target) and up <= path.count(b"/") and b".." not in steps[up:]


def clean(root: str, python: str) -> None:
    """Make an installed tree the same wherever it was installed.

    Byte code, locks and marks of the installer go; scripts that start *python* start that of the
    environment.
    """
    for folder, names, files in os.walk(root):
        for name in [n for n in names if n == "__pycache__"]:
            shutil.rmtree(os.path.join(folder, name))
            names.remove(name)
        for name in files:
            if (name == ".lock" and folder == root) or name in {"uv_build.json", "uv_cache.json"}:
                os.unlink(os.path.join(folder, name))
    changed = set(_move_scripts(os.path.join(root, "bin"), python))
    for record in _records(root):
        _correct_record(root, record, changed)


def _move_scripts(folder: str, python: str) -> Iterator[str]:
    """Replace *python* in the first line of scripts; the paths of the changed ones."""
    if not os.path.isdir(folder):
        return
    for path in (os.path.join(folder, name) for name in sorted(os.listdir(folder))):
        stat = os.lstat(path)
        if not S_ISREG(stat.st_mode):
            continue
        with open(path, "rb") as file:
            content = file.read()
        first, _, rest = content.partition(b"\n")
        if first.startswith(b"#!") and python.encode() in first:
            os.unlink(path)  # it may be a hard link into a cache
            with open(path, "wb") as file:
                file.write(f"#!{ENVIRONMENT}/bin/python\n".encode() + rest)
            os.chmod(path, stat.st_mode & 0o777)
            yield path


def _records(root: str) -> Iterator[str]:
    for folder, _, files in os.walk(os.path.join(root, "lib")):
        if folder.endswith(".dist-info") and "RECORD" in files:
            yield os.path.join(folder, "RECORD")


def _correct_record(root: str, record: str, changed: set[str]) -> None:
    """Drop rows of files that are no more; hash the changed ones anew."""
    base = os.path.dirname(os.path.dirname(record))
    with open(record, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if len(row) == 3]
    kept = []
    for name, *rest in rows:
        path = os.path.normpath(os.path.join(base, name))
        if path in changed:
            with open(path, "rb") as script:
                data = script.read()
            hashed = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
            rest = ["sha256=" + hashed.decode(), str(len(data))]
        if not path.startswith(root + os.sep) or os.path.lexists(path):
            kept.append([name, *rest])
    os.unlink(record)
    with open(record, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(sorted(kept))


def skeleton(root: str, python: str, version: str) -> None:
    """The virtual environment itself: which interpreter, and where packages lie."""
    short = ".".join(version.split(".")[:2])
    os.makedirs(os.path.join(root, "bin"))
    os.makedirs(os.path.join(root, "lib", f"python{short}", "site-packages"))
    os.symlink("lib", os.path.join(root, "lib64"))
    os.symlink(python, os.path.join(root, "bin", "python"))
    for name in ("python3", f"python{short}"):
        os.symlink("python", os.path.join(root, "bin", name))
    home = os.path.dirname(python)
    with open(os.path.join(root, "pyvenv.cfg"), "w", encoding="utf-8") as file:
        file.write(f"home = {home}\ninclude-system-site-packages = false\nversion = {version}\n")


def pack(root: str, target: str, *, consume: bool = False) -> tuple[str, int]:
    """Write the tree as a tar file (GNU format, sorted); its digest and the bytes of its files.

    *consume*: delete each file once it is written, so that a large tree is not there twice.
    """
    lines: list[bytes] = []
    size = 0
    with tarfile.open(
        target, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for path in sorted(_walk(os.fsencode(root))):
            info, kind = _describe(root, path)
            source = os.path.join(os.fsencode(root), path)
            if kind is None:
                archive.addfile(info)
            elif kind == b"link":
                archive.addfile(info)
                lines.append(line(path, kind, _sha256(os.fsencode(info.linkname))))
            else:
                with open(source, "rb") as file:
                    hashed = _Hashed(file)
                    archive.addfile(info, hashed)
                lines.append(line(path, kind, hashed.sha256.hexdigest()))
                size += info.size
                if consume:
                    os.unlink(source)
    return digest(lines), size


def _walk(root: bytes, folder: bytes = b"") -> Iterator[bytes]:
    for name in os.listdir(os.path.join(root, folder)):
        path = os.path.join(folder, name)
        if S_ISDIR(os.lstat(os.path.join(root, path)).st_mode):
            yield path
            yield from _walk(root, path)
        elif not is_byte_code(path):
            yield path


def _describe(root: str, path: bytes) -> tuple[tarfile.TarInfo, bytes | None]:
    """The tar header of one file; its kind in the digest, None for a folder."""
    full = os.path.join(os.fsencode(root), path)
    stat = os.lstat(full)
    info = tarfile.TarInfo(os.fsdecode(path))
    info.mtime = MODIFIED_AT
    if os.path.islink(full):
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, os.fsdecode(os.readlink(full)), 0o777
        return info, b"link"
    if os.path.isdir(full):
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        return info, None
    if not os.path.isfile(full):
        raise ValueError(f"{os.fsdecode(path)!r} is neither a file, a folder nor a link")
    info.size, info.mode = stat.st_size, 0o755 if stat.st_mode & 0o100 else 0o644
    return info, b"%o" % info.mode


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Hashed(io.RawIOBase):
    """A file that is hashed while it is read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.sha256 = hashlib.sha256()
        self._file = file

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        return data
