"""Image layers on a node: taken over from builds, checked, byte-compiled, collected.

``layers/DIGEST/`` is complete and read-only, or is not there: it is made under another name and
renamed. What comes out of a build session is not trusted: the archive reader below knows
four kinds of entries and bounds everything, the digest is computed anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final

from madang.agent.buildscript import compile as compiler
from madang.agent.buildscript import tree
from madang.agent.rootlayers import RootUnpacker
from madang.agent.tarreader import MAX_FILES, TarReader
from madang.kit import codec
from madang.kit.clock import Clock
from madang.wire.errors import BuildFailed, InvalidRequest
from madang.wire.image import Layer

log = logging.getLogger(__name__)

DIGEST: Final = re.compile(r"[0-9a-f]{64}")
MAX_PATH: Final = 1024
YOUNG_S: Final = 900.0
"""A layer used by a build is kept this long, until the manager's list names it."""
HOST_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READ_ONLY: Final = 0o555
_PART: Final = ".part-"
_TRASH: Final = ".trash-"
_KEYS: Final = ".keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """An unpacked layer that is not in its place yet."""

    digest: str
    path: str
    size_bytes: int
    root: bool = False
    """A layer of a root file system, which has its modes already."""


class LayerStore:
    """The folder of all layers of a node. Methods that are not coroutines may block."""

    def __init__(self, root: str, clock: Clock) -> None:
        self._root: Final = root
        self._clock: Final = clock

    def open(self) -> None:
        """Make the folder, sweep what a crash left."""
        os.makedirs(self._root, mode=0o755, exist_ok=True)
        for name in os.listdir(self._root):
            if name.startswith((_PART, _TRASH)):
                remove_tree(os.path.join(self._root, name))

    def path(self, digest: str) -> str:
        if not DIGEST.fullmatch(digest):
            raise BuildFailed(f"{digest[:80]!r} is no layer digest")
        return os.path.join(self._root, digest)

    def has(self, digest: str) -> bool:
        return os.path.isdir(self.path(digest))

    def list(self) -> tuple[str, ...]:
        """Digests of all layers that lie here."""
        return tuple(sorted(name for name in os.listdir(self._root) if DIGEST.fullmatch(name)))

    def touch(self, digests: Iterable[str]) -> None:
        """Keep these for a while though nobody names them yet."""
        now = self._clock.now()
        for digest in digests:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path(digest), (now, now))

    def stage(self, digest: str, archive: BinaryIO, limit_bytes: int) -> Staged:
        """Unpack a layer's tar and compare its digest. Raises BuildFailed, or OSError as it is."""
        part = tempfile.mkdtemp(prefix=_PART, dir=self._root)
        try:
            found, size = _Unpacker(archive, part, limit_bytes).run()
            if found != digest:
                raise BuildFailed(f"layer {digest[:12]} has other content than it says")
        except BaseException:
            remove_tree(part)
            raise
        return Staged(digest=digest, path=part, size_bytes=size)

    def stage_root(self, archive: BinaryIO, limit_bytes: int, digest: str | None = None) -> Staged:
        """Unpack a layer of a root file system (see ``buildscript.rootlayer``).

        *digest*: what it must have. Raises BuildFailed, or OSError as it is.
        """
        part = tempfile.mkdtemp(prefix=_PART, dir=self._root)
        try:
            found, size = RootUnpacker(archive, part, limit_bytes).run()
            if digest not in {None, found}:
                raise BuildFailed(f"layer {str(digest)[:12]} has other content than it says")
        except BaseException:
            remove_tree(part)
            raise
        return Staged(digest=found, path=part, size_bytes=size, root=True)

    def commit(self, staged: Collection[Staged]) -> None:
        """Move complete layers into place, after all their data is on disk."""
        for one in (one for one in staged if not one.root):
            _seal(one.path)
        os.sync()
        now = self._clock.now()
        for one in staged:
            os.utime(one.path, (now, now))
            try:
                os.rename(one.path, self.path(one.digest))
            except OSError:
                if not self.has(one.digest):
                    raise
                remove_tree(one.path)  # another build was faster
        _sync_folder(self._root)

    def collect(self, keep: Collection[str]) -> tuple[str, ...]:
        """Delete layers that are neither named nor young; the deleted ones."""
        gone = []
        for digest in self.list():
            path = self.path(digest)
            if digest not in keep and self._clock.now() - os.stat(path).st_mtime > YOUNG_S:
                trash = os.path.join(self._root, f"{_TRASH}{digest}")
                os.rename(path, trash)
                remove_tree(trash)
                gone.append(digest)
        return tuple(gone)

    def known(self, owner: str) -> dict[str, Layer]:
        """Key → layer, as builds of this owner claimed them, of layers that lie here."""
        try:
            with open(self._keys_path(owner), "rb") as file:
                keys = codec.from_json(dict[str, Layer], file.read())
        except FileNotFoundError:
            return {}
        except InvalidRequest as exc:  # a torn write; the next build learns it all again
            log.warning("layer keys are damaged", extra={"error": exc.text})
            return {}
        return {key: layer for key, layer in keys.items() if self.has(layer.digest)}

    def learn(self, owner: str, keys: Mapping[str, Layer]) -> None:
        """Remember for the owner's next builds."""
        path = self._keys_path(owner)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        part = path + ".part"
        with open(part, "wb") as file:
            file.write(codec.to_json({**self.known(owner), **keys}))
        os.rename(part, path)

    def _keys_path(self, owner: str) -> str:
        name = hashlib.sha256(owner.encode()).hexdigest()
        return os.path.join(self._root, _KEYS, f"{name}.json")


class _Unpacker(TarReader):
    """Reads the tar dialect that ``tree.pack`` writes into an empty folder of ours."""

    def __init__(self, archive: BinaryIO, root: str, limit_bytes: int) -> None:
        super().__init__(archive, limit_bytes, max_name=MAX_PATH)
        self._root = os.fsencode(root)
        self._seen: dict[bytes, bytes] = {b"": b"dir"}
        self._lines: list[bytes] = []

    def run(self) -> tuple[str, int]:
        """Digest and bytes of all files."""
        for info in self.entries():
            self._add(info)
        return tree.digest(self._lines), self.size_bytes

    def _add(self, info: tarfile.TarInfo) -> None:
        path = os.fsencode(info.name).rstrip(b"/")
        self._check(path)
        full = os.path.join(self._root, path)
        if info.type == tarfile.DIRTYPE:
            kind = b"dir"
            os.mkdir(full, 0o755)
        elif info.type == tarfile.SYMTYPE:
            kind = b"link"
            target = os.fsencode(info.linkname)
            if not tree.is_link(path, target):
                raise BuildFailed(f"link {info.name!r} leads out of its layer")
            os.symlink(target, full)
            self._lines.append(tree.line(path, kind, hashlib.sha256(target).hexdigest()))
        elif info.type == tarfile.REGTYPE and info.size >= 0:
            kind = b"755" if info.mode & 0o100 else b"644"
            with open(full, "xb") as file:
                content = self.copy(file, info.size)
                os.fchmod(file.fileno(), int(kind, 8))
            self._lines.append(tree.line(path, kind, content))
        else:
            raise BuildFailed(f"{info.name!r} is neither a file, a folder nor a link")
        self._seen[path] = kind

    def _check(self, path: bytes) -> None:
        name = os.fsdecode(path)
        if not tree.is_path(path) or len(path) > MAX_PATH:
            raise BuildFailed(f"{name[:80]!r} is no path in a layer")
        if b"__pycache__" in path.split(b"/"):
            raise BuildFailed(f"{name!r}: byte code is made on the node")
        if path in self._seen or self._seen.get(os.path.dirname(path)) != b"dir":
            raise BuildFailed(f"{name!r} comes twice, or its folder is none")
        if len(self._seen) > MAX_FILES:
            raise BuildFailed(f"a layer has more than {MAX_FILES} files")


async def byte_compile(root: str, version: str) -> bool:
    """Compile a staged layer with the host's interpreter of *version*; False if there is none."""
    python = shutil.which("python3", path=HOST_PATH)
    if python is None:
        return False
    process = await asyncio.create_subprocess_exec(
        *(python, "-I", "-S", compiler.__file__, root, version, tree.ENVIRONMENT),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
        start_new_session=True,
    )
    try:
        code = await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        await process.wait()
    if code:
        log.warning("layer not byte-compiled", extra={"python": version, "exit_code": code})
    return code == 0


def remove_tree(path: str) -> None:
    """Delete a tree though its folders are read-only."""
    for folder, _, _ in os.walk(path):
        os.chmod(folder, 0o700)
    shutil.rmtree(path)


def _seal(root: str) -> None:
    """Make everything read-only, for everyone to read."""
    for folder, _, files in os.walk(root):
        for name in files:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                os.chmod(path, os.stat(path).st_mode & READ_ONLY)
        os.chmod(folder, READ_ONLY)


def _sync_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
