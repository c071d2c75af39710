"""Make a layer of ours (see ``rootlayer``) of a tar that somebody else wrote.

Foreign tars come in any order, with paths twice, folders missing, PAX headers, sparse files, and
names that lead out. They are read as if unpacked into an empty root: the last of several entries of
a path wins, a folder that is a link in the same layer leads where it says, never out. What a layer
can't have (devices, pipes) is left out, as nothing in a session could use it.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from madang.agent.buildscript import rootlayer
from madang.agent.buildscript.main import BuildError, Exit
from madang.agent.buildscript.rootlayer import LINK, MAX_TIME, PLAIN
from madang.wire.rootlayer import MAX_ID, OPAQUE, WHITEOUT, Meta

MAX_FILES = 500_000
MAX_HEADER = 1024 * 1024
MAX_LINKS = 40
CHUNK = 1024 * 1024
_FOLDER = Meta(0o755)
_LONG = frozenset(
    {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE}
    | {tarfile.SOLARIS_XHDTYPE}
)


class Header(tarfile.TarInfo):
    """Refuses headers that ``tarfile`` would read into memory whole."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):  # type: ignore[no-untyped-def]
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in _LONG and info.size > MAX_HEADER):
            raise damaged("a layer has a header of an impossible size")
        return info


@dataclass(eq=False)
class _Entry:
    """A file, folder or link; one for all hard links to it."""

    info: tarfile.TarInfo | None
    """None: a folder that only others name."""
    target: bytes = b""
    """Of a symbolic link."""

    @property
    def folder(self) -> bool:
        return self.info is None or self.info.isdir()

    @property
    def link(self) -> bool:
        return self.info is not None and self.info.issym()


@dataclass
class Layer:
    """What a foreign tar says, in order of paths."""

    entries: dict[bytes, _Entry] = field(default_factory=lambda: {b"": _Entry(None)})
    gone: set[bytes] = field(default_factory=set)
    opaque: set[bytes] = field(default_factory=set)
    left_out: int = 0
    size_bytes: int = 0


def damaged(text: str) -> BuildError:
    return BuildError(Exit.DAMAGED, text)


def convert(source: BinaryIO, target: BinaryIO, limit_bytes: int) -> tuple[str, int, Layer]:
    """Digest and bytes of the layer that the plain tar *source* (seekable) is, written to *target*.

    Raises BuildError if it is damaged, hostile or has more than *limit_bytes*.
    """
    try:
        archive = tarfile.open(  # noqa: SIM115 - it has nothing to close but source
            fileobj=source, mode="r:", tarinfo=Header, encoding="utf-8", errors="surrogateescape"
        )
        layer = _read(archive, limit_bytes)
        digest = _write(archive, layer, target)
    except (tarfile.TarError, ValueError, OverflowError, UnicodeError) as exc:
        raise damaged(f"a layer's archive is damaged: {exc}") from exc
    return digest, layer.size_bytes, layer


def _read(archive: tarfile.TarFile, limit_bytes: int) -> Layer:
    layer = Layer()
    spent = 0
    while (info := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # it would keep them all
        spent += max(0, info.size) if info.isreg() else 0
        if spent > limit_bytes:
            text = f"a layer unpacks to more than the {limit_bytes >> 20} MiB that are free here"
            raise BuildError(Exit.DISK, text)
        _add(layer, info)
        if len(layer.entries) + len(layer.gone) > MAX_FILES:
            raise damaged(f"a layer has more than {MAX_FILES} files")
    _settle(layer)
    return layer


def _add(layer: Layer, info: tarfile.TarInfo) -> None:
    name = os.fsencode(info.name)
    path = _place(layer, name)
    folder, base = os.path.split(path)
    if any(part.startswith(WHITEOUT) for part in folder.split(b"/")):
        layer.left_out += 1  # AUFS' own notes
    elif base.startswith(WHITEOUT):
        _remove(layer, path, base)
    elif not path:
        return  # the root itself
    elif info.isdir():
        known = layer.entries.get(path)
        if known is not None and known.folder:
            known.info = info
        else:
            _put(layer, path, _Entry(info))
    elif info.isreg():
        _put(layer, path, _Entry(info))
    elif info.issym():
        _put(layer, path, _Entry(info, os.fsencode(info.linkname)))
    elif info.islnk():
        target = layer.entries.get(_place(layer, os.fsencode(info.linkname)))
        if target is None or target.folder:
            raise damaged(f"{info.name[:80]!r} is a hard link to a file that is not in its layer")
        _put(layer, path, target)
    else:
        layer.left_out += 1


def _remove(layer: Layer, path: bytes, base: bytes) -> None:
    folder = os.path.dirname(path)
    if base == OPAQUE:
        layer.opaque.add(folder)
    elif base.startswith(WHITEOUT + WHITEOUT):
        layer.left_out += 1  # AUFS' own notes
    elif base in {WHITEOUT, WHITEOUT + b".", WHITEOUT + b".."}:
        raise damaged(f"{os.fsdecode(path)[:80]!r} hides nothing that a layer can have")
    else:
        layer.gone.add(rootlayer.beside(path, base.removeprefix(WHITEOUT)))


def _put(layer: Layer, path: bytes, entry: _Entry) -> None:
    """In its place, with the folders that it lies in; what was there goes."""
    old = layer.entries.get(path)
    if old is entry:
        return
    if old is not None and old.folder:
        below = path + b"/"
        for inner in [inner for inner in layer.entries if inner.startswith(below)]:
            del layer.entries[inner]
    _ensure(layer, os.path.dirname(path))
    layer.entries[path] = entry


def _ensure(layer: Layer, folder: bytes) -> None:
    """*folder* and all above it."""
    while folder and not ((known := layer.entries.get(folder)) and known.folder):
        layer.entries[folder] = _Entry(None)
        folder = os.path.dirname(folder)


def _place(layer: Layer, name: bytes) -> bytes:
    """Where *name* lies, its folders' links (of this layer) followed as below a root."""
    parts = _parts(name)
    done: list[bytes] = []
    followed = 0
    while parts:
        part = parts.pop(0)
        if part == b"..":
            del done[-1:]  # above the root there is the root; only links lead here
            continue
        path = b"/".join([*done, part])
        entry = layer.entries.get(path) if parts else None
        if entry is None or not entry.link:
            done.append(part)
            continue
        followed += 1
        if followed > MAX_LINKS:
            raise damaged(f"{os.fsdecode(name)[:80]!r} lies behind links that lead in a circle")
        target = entry.target
        if target.startswith(b"/"):
            done = []
        parts = [p for p in target.split(b"/") if p not in {b"", b"."}] + parts
    path = b"/".join(done)
    if path and not rootlayer.is_path(path):
        raise damaged(f"{os.fsdecode(path)[:80]!r}… is no path that a layer can have")
    return path


def _parts(name: bytes) -> list[bytes]:
    parts = [part for part in name.split(b"/") if part not in {b"", b"."}]
    if b".." in parts or b"\0" in name:
        raise damaged(f"{os.fsdecode(name)[:80]!r} leads out of its layer")
    return parts


def _settle(layer: Layer) -> None:
    """A name that is gone below and here again hides what was below."""
    for path in list(layer.gone):
        entry = layer.entries.get(path)
        if entry is not None:
            layer.gone.discard(path)
            if entry.folder:
                layer.opaque.add(path)
        else:
            _ensure(layer, os.path.dirname(path))
    for folder in layer.opaque:
        _ensure(layer, folder)


def _write(archive: tarfile.TarFile, layer: Layer, target: BinaryIO) -> str:
    lines: list[bytes] = []
    first: dict[int, bytes] = {}
    names = {path: path for path in layer.entries if path}
    names |= {rootlayer.whiteout(path): path for path in layer.gone}
    names |= {os.path.join(folder, OPAQUE): folder for folder in layer.opaque if folder}
    with rootlayer.opened(target) as out:
        for name in sorted(names):
            path = names[name]
            if name == path:
                lines.append(_entry(archive, layer, path, out, first))
                continue
            out.addfile(rootlayer.header(name, tarfile.REGTYPE, PLAIN))
            opaque = os.path.basename(name) == OPAQUE
            lines.append(rootlayer.opaque_line(path) if opaque else rootlayer.gone_line(path))
    return rootlayer.digest(lines)


def _entry(
    archive: tarfile.TarFile,
    layer: Layer,
    path: bytes,
    out: tarfile.TarFile,
    first: dict[int, bytes],
) -> bytes:
    """Write one; its line of the digest."""
    entry = layer.entries[path]
    info = entry.info
    if info is None or info.isdir():
        meta = _FOLDER if info is None else _meta(info)
        out.addfile(rootlayer.header(path, tarfile.DIRTYPE, meta))
        return rootlayer.folder_line(path, meta)
    if entry.link:
        if not entry.target or b"\0" in entry.target or len(entry.target) > rootlayer.MAX_PATH:
            raise damaged(f"link {os.fsdecode(path)[:80]!r} has no target that a link can have")
        made = rootlayer.header(path, tarfile.SYMTYPE, LINK)
        made.linkname = os.fsdecode(entry.target)
        out.addfile(made)
        return rootlayer.link_line(path, entry.target)
    meta, modified_at = _meta(info), int(min(max(info.mtime, 0), MAX_TIME))
    made = rootlayer.header(path, tarfile.REGTYPE, meta, modified_at)
    known = first.setdefault(id(entry), path)
    if known != path:
        made.type, made.linkname = tarfile.LNKTYPE, os.fsdecode(known)
        out.addfile(made)
        return rootlayer.hard_line(path, known)
    made.size = info.size
    source = archive.extractfile(info)
    assert source is not None
    hashed = rootlayer.Hashed(source)
    out.addfile(made, hashed)
    layer.size_bytes += info.size
    return rootlayer.file_line(path, meta, modified_at, hashed.hexdigest())


def _meta(info: tarfile.TarInfo) -> Meta:
    uid, gid = (number if 0 <= number <= MAX_ID else 0 for number in (info.uid, info.gid))
    return Meta(info.mode & 0o7777, uid, gid)


def unpack_plain(chunks: Iterator[bytes], target: BinaryIO, limit_bytes: int) -> None:
    """Write *chunks*, up to a limit: what decompresses to more than fits is stopped early."""
    left = limit_bytes
    for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            text = f"a layer unpacks to more than the {limit_bytes >> 20} MiB that are free here"
            raise BuildError(Exit.DISK, text)
        target.write(chunk)


def free_bytes(folder: str) -> int:
    return shutil.disk_usage(folder).free
