"""Reading what may be compressed, whatever its media type says: gzip, bzip2, xz, zstd or plain."""

from __future__ import annotations

import bz2
import lzma
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

from madang.agent.buildscript.main import BuildError, Exit

CHUNK = 1024 * 1024
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def kind_of(head: bytes) -> str:
    """How a file that begins so is compressed; empty: not."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")


def plain(file: BinaryIO) -> Iterator[bytes]:
    """The bytes of a seekable file, decompressed. Raises BuildError if it is damaged."""
    kind = kind_of(file.read(6))
    file.seek(0)
    try:
        if kind == "zstd":
            yield from _zstd(file)
        elif kind:
            yield from _members(file, kind)
        else:
            yield from iter(lambda: file.read(CHUNK), b"")
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as exc:
        if isinstance(exc, OSError) and exc.errno is not None:
            raise  # the disk, not the data
        raise BuildError(Exit.DAMAGED, f"a layer's compressed data is damaged: {exc}") from exc


def _opened(kind: str) -> Any:
    if kind == "gzip":
        return zlib.decompressobj(wbits=31)
    return bz2.BZ2Decompressor() if kind == "bzip2" else lzma.LZMADecompressor()


def _members(file: BinaryIO, kind: str) -> Iterator[bytes]:
    """Several compressed files one after another are one; zeros may follow."""
    data = file.read(CHUNK)
    while data:
        one = _opened(kind)
        while not one.eof:
            if not data:
                raise EOFError("it ends in the middle")
            if kind == "gzip":
                yield one.decompress(data, CHUNK)
                data = one.unconsumed_tail or (b"" if one.eof else file.read(CHUNK))
            else:
                yield one.decompress(data if one.needs_input else b"", CHUNK)
                data = file.read(CHUNK) if one.needs_input and not one.eof else b"-"
        data = (one.unused_data or file.read(CHUNK)).lstrip(b"\0")


def _copied(file: BinaryIO, target: IO[bytes]) -> IO[bytes]:
    shutil.copyfileobj(file, target, CHUNK)
    target.seek(0)
    return target


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    """By the program: Python has no zstd before 3.14."""
    program = shutil.which("zstd")
    if program is None:
        raise BuildError(
            Exit.DAMAGED,
            "a layer is compressed with zstd, which this machine can't read: install the program "
            "`zstd` on it, or copy the image with gzip layers.",
        )
    with (
        tempfile.TemporaryFile() as whole,  # a member of an archive is no file to a program
        subprocess.Popen(
            [program, "-d", "-c", "-q"],
            stdin=_copied(file, whole),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process,
    ):
        assert process.stdout is not None and process.stderr is not None
        try:
            yield from iter(lambda: process.stdout.read(CHUNK), b"")  # type: ignore[union-attr]
            error = process.stderr.read(2000).decode("utf-8", "replace").strip()
        finally:
            process.kill()
    if process.returncode > 0:
        raise BuildError(Exit.DAMAGED, f"a layer's compressed data is damaged: {error}")
