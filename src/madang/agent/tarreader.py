"""A strict reader of the tars that sessions leave: bounded, one pass, nothing but what we write."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, Final

from madang.wire.errors import BuildFailed

BLOCK: Final = 512
CHUNK: Final = 1024 * 1024
MAX_FILES: Final = 500_000


class TarReader:
    """Base of the unpackers of the two kinds of layers."""

    def __init__(self, archive: BinaryIO, limit_bytes: int, *, max_name: int) -> None:
        self._archive: Final = archive
        self._left = limit_bytes
        self._max_name: Final = max_name
        self.size_bytes = 0
        """Of all files so far."""

    def entries(self) -> Iterator[tarfile.TarInfo]:
        """One header after another; the data of a file is to be taken by ``copy`` before the next.

        Raises BuildFailed.
        """
        try:
            while (info := self._next()) is not None:
                yield info
        except tarfile.TarError as exc:
            raise BuildFailed(f"a layer's archive is damaged: {exc}") from exc
        while padding := self._archive.read(CHUNK):
            self._spend(len(padding))  # the writer waits for us to take it

    def copy(self, file: BinaryIO, size: int) -> str:
        """The data of an entry into *file*, with holes where it is zero; its SHA-256."""
        self._spend(size)
        sha256 = hashlib.sha256()
        left = size
        while left:
            data = self._read(min(left, CHUNK))
            sha256.update(data)
            if data.strip(b"\0"):
                file.write(data)
            else:
                file.seek(len(data), os.SEEK_CUR)
            left -= len(data)
        file.truncate(size)
        self._read(-size % BLOCK)
        self.size_bytes += size
        return sha256.hexdigest()

    def _next(self) -> tarfile.TarInfo | None:
        """The next entry, with long names put in."""
        long: dict[bytes, str] = {}
        while True:
            header = self._read(BLOCK)
            if not header.strip(b"\0"):
                return None
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            if info.type not in {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}:
                info.name = long.get(tarfile.GNUTYPE_LONGNAME, info.name)
                info.linkname = long.get(tarfile.GNUTYPE_LONGLINK, info.linkname)
                return info
            if not 0 < info.size <= self._max_name + 1:
                raise BuildFailed("a layer's archive has a name that is too long")
            data = self._read(-(-info.size // BLOCK) * BLOCK)[: info.size]
            long[info.type] = os.fsdecode(data.rstrip(b"\0"))

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise BuildFailed("the layers are larger than the build's disk")

    def _read(self, size: int) -> bytes:
        data = self._archive.read(size)
        if len(data) < size:
            raise BuildFailed("a layer's archive ends in the middle")
        return data
