"""Content-addressed files below one folder.

```
DIGEST[:2]/DIGEST    a complete blob, read-only, named by the SHA-256 of what is in it
tmp/                 blobs being written; swept at ``open``
boot                 the boot of the machine in which the store was last opened
```

A blob appears by one rename, after its size and digest were checked: the death of any process
leaves a whole blob or none. Writes are not synced one by one (a working directory has thousands of
files); instead, after the machine was restarted, what was written shortly before is read again, and
dropped if a power cut damaged it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import itertools
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import BinaryIO, Final

from madang.kit.codec import from_json, to_json
from madang.wire.api import WorkspaceFile, WorkspaceManifest
from madang.wire.errors import (
    InvalidRequest,
    StorageFull,
    TooLarge,
    WorkspaceIncomplete,
)
from madang.wire.paths import relative
from madang.wire.size import GIB, KIB, format_bytes

log = logging.getLogger(__name__)

DIGEST: Final = re.compile(r"[0-9a-f]{64}")
MAX_BLOB: Final = 64 * GIB
MAX_MANIFEST_FILES: Final = 1_000_000
_SMALL: Final = 256 * KIB
"""Collected in memory and written at once."""
_UNSYNCED_S: Final = 120.0
"""The kernel writes dirty pages back after 30 s; four times that."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_KINDS: Final = frozenset({"file", "dir", "link"})


class BlobStore:
    """Any number of tasks may use it at once; one process at a time."""

    def __init__(self, root: str, *, max_blob_bytes: int = MAX_BLOB) -> None:
        self._root = root
        self._tmp = os.path.join(root, "tmp")
        self._max = max_blob_bytes
        self._numbers = itertools.count()

    async def open(self) -> None:
        """Make the folder, sweep what a crash left, check what a power cut may have damaged."""
        await asyncio.to_thread(self._open)

    def _open(self) -> None:
        os.makedirs(self._tmp, mode=0o700, exist_ok=True)
        for name in os.listdir(self._tmp):
            os.unlink(os.path.join(self._tmp, name))
        for number in range(256):
            os.makedirs(os.path.join(self._root, f"{number:02x}"), mode=0o700, exist_ok=True)
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read()
        note = os.path.join(self._root, "boot")
        if _read_text(note) not in {"", boot}:
            self._check_latest()
        with _errors("the blob store"), open(note, "w", encoding="ascii") as file:
            file.write(boot)

    def _check_latest(self) -> None:
        """Drop blobs that were written just before the machine stopped and are not whole."""
        blobs = list(self._blobs())
        latest = max((entry.stat().st_mtime for entry in blobs), default=0.0)
        for entry in blobs:
            if entry.stat().st_mtime >= latest - _UNSYNCED_S and _digest(entry.path) != entry.name:
                log.warning("damaged blob dropped", extra={"digest": entry.name})
                os.unlink(entry.path)

    # --- blobs

    async def missing(self, digests: Iterable[str]) -> list[str]:
        """Those not here, each once, in the order given. Those here count as used now."""
        wanted = list(dict.fromkeys(digests))
        for digest in wanted:
            _check_digest(digest)
        return await asyncio.to_thread(
            lambda: [digest for digest in wanted if not self._touch(digest)]
        )

    async def put(self, digest: str, size: int, chunks: AsyncIterator[bytes]) -> None:
        """Store *chunks*, which must be *size* bytes of content *digest*.

        Raises InvalidRequest if they are not, TooLarge, StorageFull. Known content is read to its
        end and checked all the same.
        """
        _check_digest(digest)
        if not 0 <= size <= self._max:
            limit = format_bytes(self._max)
            raise TooLarge(f"blob {digest[:12]} has {size} bytes; the most is {limit}.")
        if size <= _SMALL:
            data = await _collect(digest, size, chunks)
            await asyncio.to_thread(self._put_small, digest, data)
        else:
            await self._put_large(digest, size, chunks)

    def _put_small(self, digest: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != digest:
            raise _wrong_content(digest)
        if self._touch(digest):
            return
        with self._temporary(digest) as file:
            file.write(data)

    async def _put_large(self, digest: str, size: int, chunks: AsyncIterator[bytes]) -> None:
        digester = hashlib.sha256()
        left = size
        with self._temporary(digest) as file:
            async for chunk in chunks:
                left -= len(chunk)
                if left < 0:
                    break
                await asyncio.to_thread(_append, file, digester, chunk)
            if left:
                raise _wrong_size(digest, size)
            if digester.hexdigest() != digest:
                raise _wrong_content(digest)

    @contextlib.contextmanager
    def _temporary(self, digest: str) -> Iterator[BinaryIO]:
        """A new file that becomes the blob if the block ends well, and goes otherwise."""
        path = os.path.join(self._tmp, f"{digest}.{next(self._numbers)}")
        try:
            with _errors(f"blob {digest[:12]}"):
                with open(path, "xb") as file:
                    yield file
                os.chmod(path, 0o444)
                os.rename(path, self._path(digest))
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            raise

    async def fetch(self, digest: str) -> str:
        """See ``wire.link.BlobSource``."""
        _check_digest(digest)
        if not self._touch(digest):
            raise WorkspaceIncomplete(f"blob {digest[:12]} is not stored. Send it, then try again.")
        return self._path(digest)

    # --- manifests

    async def put_manifest(self, manifest: WorkspaceManifest) -> str:
        """Store it in canonical form (files by path); its digest.

        Raises InvalidRequest or PathInvalid for one that makes no sense.
        """
        if len(manifest.files) > MAX_MANIFEST_FILES:
            raise TooLarge(
                f"the working directory has {len(manifest.files)} entries; "
                f"the most is {MAX_MANIFEST_FILES}."
            )
        data = await asyncio.to_thread(_canonical, manifest)
        digest = hashlib.sha256(data).hexdigest()
        await asyncio.to_thread(self._put_small, digest, data)
        return digest

    async def get_manifest(self, digest: str) -> WorkspaceManifest:
        """Raises WorkspaceIncomplete if it is not here, InvalidRequest if it is something else."""
        path = await self.fetch(digest)
        return await asyncio.to_thread(lambda: from_json(WorkspaceManifest, _read(path)))

    async def complete(self, digest: str) -> bool:
        """Whether the manifest and all its blobs are here."""
        try:
            manifest = await self.get_manifest(digest)
        except WorkspaceIncomplete:
            return False
        return not await self.missing(_digests(manifest))

    # --- collection

    async def collect(self, keep: Iterable[str], *, older_than_s: float = 3600.0) -> int:
        """Delete blobs that no manifest of *keep* needs and nobody used lately; bytes freed.

        Whoever asked for a blob or sent it within *older_than_s* may be about to name it.
        """
        kept: set[str] = set()
        for digest in keep:
            try:
                kept.update(_digests(await self.get_manifest(digest)), [digest])
            except (WorkspaceIncomplete, InvalidRequest):
                continue
        return await asyncio.to_thread(self._sweep, kept, time.time() - older_than_s)

    def _sweep(self, kept: set[str], used_before: float) -> int:
        freed = 0
        for entry in self._blobs():
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if entry.name not in kept and status.st_mtime < used_before:
                    os.unlink(entry.path)
                    freed += status.st_blocks * 512
        return freed

    # --- files

    def _path(self, digest: str) -> str:
        return os.path.join(self._root, digest[:2], digest)

    def _touch(self, digest: str) -> bool:
        """Note the use; False if it is not here."""
        try:
            os.utime(self._path(digest))
        except FileNotFoundError:
            return False
        return True

    def _blobs(self) -> Iterator[os.DirEntry[str]]:
        for number in range(256):
            with os.scandir(os.path.join(self._root, f"{number:02x}")) as entries:
                yield from (entry for entry in entries if DIGEST.fullmatch(entry.name))


async def _collect(digest: str, size: int, chunks: AsyncIterator[bytes]) -> bytes:
    data = bytearray()
    async for chunk in chunks:
        data += chunk
        if len(data) > size:
            break
    if len(data) != size:
        raise _wrong_size(digest, size)
    return bytes(data)


def _append(file: BinaryIO, digester: hashlib._Hash, chunk: bytes) -> None:
    digester.update(chunk)
    file.write(chunk)


def _canonical(manifest: WorkspaceManifest) -> bytes:
    """JSON without blanks, fields as declared, files by path; each path once and relative."""
    seen: set[bytes] = set()
    for file in manifest.files:
        path = relative(file.path)
        if path in seen:
            raise InvalidRequest(f"{file.path!r} is listed twice.")
        seen.add(path)
        _check_file(file)
    files = tuple(sorted(manifest.files, key=lambda file: file.path))
    return to_json(WorkspaceManifest(files=files))


def _check_file(file: WorkspaceFile) -> None:
    if file.kind not in _KINDS:
        raise InvalidRequest(f"{file.path!r}: kind {file.kind!r} is not file, dir or link.")
    if file.kind == "file":
        if file.size_bytes < 0:
            raise InvalidRequest(f"{file.path!r}: a size can't be negative.")
        if file.digest is None:
            raise InvalidRequest(f"{file.path!r}: a file needs its digest.")
        _check_digest(file.digest)
    if file.kind == "link" and not file.target:
        raise InvalidRequest(f"{file.path!r}: a link needs its target.")


def _digests(manifest: WorkspaceManifest) -> list[str]:
    return [file.digest for file in manifest.files if file.digest is not None]


def _check_digest(digest: str) -> None:
    if not DIGEST.fullmatch(digest):
        raise InvalidRequest(f"{digest[:80]!r} is no SHA-256 digest in lower-case hex.")


def _wrong_size(digest: str, size: int) -> InvalidRequest:
    return InvalidRequest(f"blob {digest[:12]}: the content has not the {size} bytes announced.")


def _wrong_content(digest: str) -> InvalidRequest:
    return InvalidRequest(f"blob {digest[:12]}: the content has another digest.")


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in _FULL:
            text = f"{what} can't be stored: {exc.strerror}. Remove sessions or free space."
            raise StorageFull(text) from exc
        raise
