"""Sending a working directory: look, hash what changed, send what the server lacks.

What is looked at may change meanwhile. A file whose bytes are not those that were hashed is
noticed (the server checks too), and the whole is done again, a few times.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from madang.client.tree import Entry, Limits, Tree, entry_of, scan, unreadable
from madang.kit.codec import from_json, to_json
from madang.wire.api import WorkspaceFile, WorkspaceManifest, WorkspaceState
from madang.wire.errors import FileFailed, PlatformError
from madang.wire.paths import display, to_wire
from madang.wire.size import GIB

Known = dict[str, tuple[list[int], str]]
"""Path → stamp and digest."""
Progress = Callable[[int, int], None]
"""Called with the bytes sent so far and the bytes to send."""

TRIES: Final = 3
_CHUNK: Final = 256 * 1024
_SETTLED_NS: Final = 2_000_000_000
"""A file changed this shortly before it was hashed may change again with the same times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the cache file keeps of a folder."""

    files: Known = field(default_factory=dict)
    manifest: str = ""
    """SHA-256 of the manifest that a server was last told of …"""
    workspace: str = ""
    """… and the digest that it answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashed:
    """A tree with the digest of each file, ready to be told to the server."""

    manifest: WorkspaceManifest
    tree: Tree
    sources: dict[str, Entry]
    """Digest → a file with that content."""
    changed: int
    """Files that had to be hashed."""
    memory: Memory
    """As it was read."""
    files: Known
    """What may be remembered."""

    @property
    def manifest_digest(self) -> str:
        return hashlib.sha256(to_json(self.manifest)).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Synced:
    digest: str | None
    """For ``SessionSpec.workspace``; None: the folder is empty."""
    files: int = 0
    size_bytes: int = 0
    changed: int = 0
    sent_files: int = 0
    sent_bytes: int = 0
    skipped: tuple[bytes, ...] = ()


class FileChanged(Exception):
    """A file is not what it was when it was hashed."""

    def __init__(self, path: bytes) -> None:
        super().__init__(display(path))
        self.path = path


class Caller(Protocol):
    """What ``sync`` needs of a client."""

    def register_workspace(self, manifest: WorkspaceManifest) -> WorkspaceState: ...

    def send_blobs(self, body: Callable[[], Iterator[bytes]]) -> None: ...


def sync(
    client: Caller,
    root: str | bytes,
    *,
    limits: Limits | None = None,
    cache: str | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> Synced:
    """Make the server know the folder *root* as it is now.

    *cache*: a file that remembers digests. A folder that is as it was when a server was told of it
    is taken as known there; *again* asks in any case.
    """
    for attempt in range(TRIES):
        hashed = prepare(root, limits=limits, cache=cache)
        if (synced := known_already(hashed, again=again)) is not None:
            return synced
        state = client.register_workspace(hashed.manifest)
        try:
            if state.missing:
                client.send_blobs(lambda: send(hashed, state.missing, progress))  # noqa: B023
            return finish(hashed, state, cache)
        except FileChanged as exc:
            if attempt + 1 == TRIES:
                raise keeps_changing(exc) from exc
    raise AssertionError("unreachable")


def known_already(hashed: Hashed, *, again: bool) -> Synced | None:
    """The result, if the server need not be asked."""
    if not hashed.manifest.files:
        return Synced(digest=None, skipped=hashed.tree.skipped)
    memory = hashed.memory
    if again or not memory.workspace or memory.manifest != hashed.manifest_digest:
        return None
    return _summary(hashed, WorkspaceState(digest=memory.workspace, missing=()))


def finish(hashed: Hashed, state: WorkspaceState, cache: str | None) -> Synced:
    """Remember and report what the server knows now."""
    memory = Memory(files=hashed.files, manifest=hashed.manifest_digest, workspace=state.digest)
    if cache is not None and memory != hashed.memory:
        _write_cache(cache, memory)
    return _summary(hashed, state)


def keeps_changing(error: FileChanged) -> FileFailed:
    return FileFailed(
        f"{error} keeps changing while it is read. Stop what writes it, or list it in "
        ".madangignore."
    )


def _summary(hashed: Hashed, state: WorkspaceState) -> Synced:
    files = [entry for entry in hashed.tree.entries if entry.kind == "file"]
    sent = [hashed.sources[digest] for digest in state.missing if digest in hashed.sources]
    return Synced(
        digest=state.digest,
        files=len(files),
        size_bytes=sum(entry.size_bytes for entry in files),
        changed=hashed.changed,
        sent_files=len(sent),
        sent_bytes=sum(entry.size_bytes for entry in sent),
        skipped=hashed.tree.skipped,
    )


def prepare(root: str | bytes, *, limits: Limits | None = None, cache: str | None = None) -> Hashed:
    """Look at *root* and hash what the cache file does not know."""
    tree = scan(os.path.realpath(os.fsencode(root)), limits or Limits())
    memory = _read_cache(cache)
    fresh: Known = {}
    sources: dict[str, Entry] = {}
    files: list[WorkspaceFile] = []
    changed = 0
    for entry in tree.entries:
        digest = None
        if entry.kind == "file":
            entry, digest, was_known = _digest(tree.root, entry, memory.files)
            changed += not was_known
            sources[digest] = entry
            if time.time_ns() - max(entry.modified_ns, entry.changed_ns) > _SETTLED_NS:
                fresh[to_wire(entry.path)] = (entry.stamp, digest)
        files.append(_wire_file(entry, digest))
    return Hashed(
        manifest=WorkspaceManifest(files=tuple(files)),
        tree=tree,
        sources=sources,
        changed=changed,
        memory=memory,
        files=fresh,
    )


def _wire_file(entry: Entry, digest: str | None) -> WorkspaceFile:
    return WorkspaceFile(
        path=to_wire(entry.path),
        kind=entry.kind,
        mode=entry.mode,
        size_bytes=entry.size_bytes,
        modified_ns=entry.modified_ns,
        digest=digest,
        target=None if entry.target is None else to_wire(entry.target),
    )


# Hashing


def _digest(root: bytes, entry: Entry, known: Known) -> tuple[Entry, str, bool]:
    """The file as hashed, its digest, and whether the cache knew it."""
    cached = known.get(to_wire(entry.path))
    if cached is not None and cached[0] == entry.stamp:
        return entry, cached[1], True
    for _ in range(TRIES):
        with open(_open_file(root, entry.path), "rb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = entry_of(entry.path, os.fstat(file.fileno()))
        if after is not None and after.stamp == entry.stamp:
            return entry, digest, False
        entry = after or entry
    raise keeps_changing(FileChanged(entry.path))


def _open_file(root: bytes, path: bytes) -> int:
    """A descriptor of a regular file; never waits for a pipe that took its place."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(root + b"/" + path, flags)
    except OSError as exc:
        raise unreadable([f"{display(path)} ({exc.strerror})"]) from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileFailed(f"{display(path)} was a file and is none any more. Try again.")
    return fd


def _read_cache(path: str | None) -> Memory:
    if path is None:
        return Memory()
    try:
        with open(path, "rb") as file:
            return from_json(Memory, file.read(GIB))
    except (OSError, PlatformError):
        return Memory()


def _write_cache(path: str, memory: Memory) -> None:
    """A cache that can't be written costs time only."""
    part = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(part, "wb") as file:
            file.write(to_json(memory))
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(part)


# Sending


def send(
    hashed: Hashed, missing: Sequence[str], progress: Progress | None = None
) -> Iterator[bytes]:
    """The body for ``PUT /v1/workspaces/blobs``. Raises FileChanged."""
    wanted = [(digest, hashed.sources[digest]) for digest in missing if digest in hashed.sources]
    total = sum(entry.size_bytes for _, entry in wanted)
    done = 0
    buffer = bytearray()
    for digest, entry in wanted:
        buffer += bytes.fromhex(digest) + entry.size_bytes.to_bytes(8, "little")
        for chunk in _read_checked(hashed.tree.root, entry, digest):
            buffer += chunk
            done += len(chunk)
            if len(buffer) >= _CHUNK:
                yield bytes(buffer)
                buffer.clear()
                if progress is not None:
                    progress(done, total)
    yield bytes(buffer)


def _read_checked(root: bytes, entry: Entry, digest: str) -> Iterator[bytes]:
    """Exactly the bytes that have *digest*."""
    seen, left = hashlib.sha256(), entry.size_bytes
    with open(_open_file(root, entry.path), "rb", buffering=0) as file:
        while left and (chunk := file.read(min(left, _CHUNK))):
            seen.update(chunk)
            left -= len(chunk)
            yield chunk
    if left or seen.hexdigest() != digest:
        raise FileChanged(entry.path)
