"""Taking over a layer of a root file system; see ``buildscript.rootlayer`` for what it says.

The writer may be anybody. All paths are made by us below an empty folder that only we can enter,
and a folder is one only if this very archive made it, so that no link is ever followed.
"""

from __future__ import annotations

import os
import stat
import tarfile
from typing import BinaryIO, Final, cast

from madang.agent.buildscript import rootlayer
from madang.agent.buildscript.rootlayer import MAX_PATH, MAX_TIME
from madang.agent.tarreader import MAX_FILES, TarReader
from madang.wire.errors import BuildFailed
from madang.wire.rootlayer import (
    MAX_ID,
    OPAQUE,
    OVERLAY_OPAQUE,
    RECORD,
    WHITEOUT,
    Meta,
)

ROOT_MODE: Final = 0o755
_UNPACKING: Final = 0o700
_ROOT: Final = Meta(ROOT_MODE)


class RootUnpacker(TarReader):
    """Makes the files of one layer in an empty folder of ours."""

    def __init__(self, archive: BinaryIO, root: str, limit_bytes: int) -> None:
        super().__init__(archive, limit_bytes, max_name=MAX_PATH)
        self._root: Final = os.fsencode(root)
        self._folders: Final[dict[bytes, Meta]] = {b"": _ROOT}
        self._files: Final[dict[bytes, tuple[Meta, int, str]]] = {}
        """Meta, time and content, also of those that others are hard links to."""
        self._hard: Final[dict[bytes, list[bytes]]] = {}
        self._lines: Final[list[bytes]] = []
        self._others: Final[set[bytes]] = set()
        """Links, hard links, and what is gone."""
        self._opaque: Final[set[bytes]] = set()

    def run(self) -> tuple[str, int]:
        """Digest and bytes of all files."""
        for info in self.entries():
            self._add(info)
        self._finish_folders()
        return rootlayer.digest([*self._lines, *self._file_lines()]), self.size_bytes

    def _add(self, info: tarfile.TarInfo) -> None:
        path = os.fsencode(info.name).rstrip(b"/")
        name = os.path.basename(path)
        if name.startswith(WHITEOUT):
            self._remove(path, name, info)
            return
        self._check(path)
        if info.type == tarfile.DIRTYPE:
            os.mkdir(self._full(path), _UNPACKING)
            self._folders[path] = _meta(info)
        elif info.type == tarfile.REGTYPE and info.size >= 0:
            self._file(path, info)
        elif info.type == tarfile.SYMTYPE:
            self._link(path, os.fsencode(info.linkname))
        elif info.type == tarfile.LNKTYPE:
            self._hard_link(path, os.fsencode(info.linkname))
        else:
            raise BuildFailed(f"{_shown(path)} is neither a file, a folder nor a link")

    def _check(self, path: bytes) -> None:
        if not rootlayer.is_path(path):
            raise BuildFailed(f"{_shown(path)} is no path in a layer")
        if path in self._folders or path in self._files or path in self._others:
            raise BuildFailed(f"{_shown(path)} comes twice in its layer")
        if os.path.dirname(path) not in self._folders:
            raise BuildFailed(f"{_shown(path)} lies in no folder of its layer")
        if len(self._folders) + len(self._files) + len(self._others) > MAX_FILES:
            raise BuildFailed(f"a layer has more than {MAX_FILES} files")

    def _full(self, path: bytes) -> bytes:
        return os.path.join(self._root, path)

    def _file(self, path: bytes, info: tarfile.TarInfo) -> None:
        meta, modified_at = _meta(info), _time(info)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(self._full(path), flags, 0o600), "wb") as file:
            content = self.copy(cast(BinaryIO, file), info.size)
            _mark(file.fileno(), meta, folder=False)
            os.utime(file.fileno(), (modified_at, modified_at))
        self._files[path] = meta, modified_at, content

    def _link(self, path: bytes, target: bytes) -> None:
        if not target or b"\0" in target or len(target) > MAX_PATH:
            raise BuildFailed(f"link {_shown(path)} has no target that a link can have")
        os.symlink(target, self._full(path))
        self._others.add(path)
        self._lines.append(rootlayer.link_line(path, target))

    def _hard_link(self, path: bytes, target: bytes) -> None:
        if target not in self._files:
            raise BuildFailed(f"hard link {_shown(path)} is to no file before it in its layer")
        os.link(self._full(target), self._full(path), follow_symlinks=False)
        self._others.add(path)
        self._hard.setdefault(target, []).append(path)

    def _remove(self, path: bytes, name: bytes, info: tarfile.TarInfo) -> None:
        """What lower layers have is gone: one name, or all that a folder had."""
        folder = os.path.dirname(path)
        if info.type != tarfile.REGTYPE or info.size:
            raise BuildFailed(f"{_shown(path)} should be an empty file")
        if name == OPAQUE:
            if folder not in self._folders or not folder or folder in self._opaque:
                raise BuildFailed(f"{_shown(path)} lies in no folder of its layer, or comes twice")
            self._opaque.add(folder)
            os.setxattr(self._full(folder), OVERLAY_OPAQUE, b"y")
            self._lines.append(rootlayer.opaque_line(folder))
            return
        gone = os.path.join(folder, name.removeprefix(WHITEOUT))
        if os.path.basename(gone).startswith(WHITEOUT):
            raise BuildFailed(f"{_shown(path)} hides nothing that a layer can have")
        self._check(gone)
        os.mknod(self._full(gone), stat.S_IFCHR | 0o000, os.makedev(0, 0))
        self._others.add(gone)
        self._lines.append(rootlayer.gone_line(gone))

    def _finish_folders(self) -> None:
        """Modes and times, the deepest first: until now we could write into all of them."""
        for path, meta in sorted(self._folders.items(), reverse=True):
            full = self._full(path)
            folder = os.open(full, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                _mark(folder, meta, folder=True)
                os.utime(folder, (rootlayer.FOLDER_TIME, rootlayer.FOLDER_TIME))
            finally:
                os.close(folder)
            if path:
                self._lines.append(rootlayer.folder_line(path, meta))

    def _file_lines(self) -> list[bytes]:
        """Of hard links the first path is the file, in whichever order they came."""
        lines = []
        for path, (meta, modified_at, content) in self._files.items():
            first, *others = sorted([path, *self._hard.get(path, ())])
            lines.append(rootlayer.file_line(first, meta, modified_at, content))
            lines += [rootlayer.hard_line(other, first) for other in others]
        return lines


def _meta(info: tarfile.TarInfo) -> Meta:
    if not (0 <= info.mode <= 0o7777 and 0 <= info.uid <= MAX_ID and 0 <= info.gid <= MAX_ID):
        raise BuildFailed(f"{info.name[:80]!r} has a mode or an owner that no file can have")
    return Meta(info.mode, info.uid, info.gid)


def _time(info: tarfile.TarInfo) -> int:
    if not 0 <= info.mtime <= MAX_TIME:
        raise BuildFailed(f"{info.name[:80]!r} has a time that no file can have")
    return int(info.mtime)


def _mark(file: int, meta: Meta, *, folder: bool) -> None:
    """Give it its mode on disk, and note what it is in the image where that differs."""
    mode = meta.on_disk(folder)
    if meta != Meta(mode):
        os.setxattr(file, RECORD, meta.record())
    os.fchmod(file, mode)


def _shown(path: bytes) -> str:
    return repr(os.fsdecode(path)[:80])
