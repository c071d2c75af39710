"""What lies in a working directory: everything below it that is not ignored."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from madang.client.ignore import FILE_NAME, Rules
from madang.wire.errors import FileFailed, WorkspaceTooLarge
from madang.wire.paths import display
from madang.wire.size import MIB, format_bytes

_NAMED: Final = 5
"""Names in an error; more are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    size_bytes: int = 512 * MIB
    files: int = 50_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing found, by its path relative to the root."""

    path: bytes
    kind: str
    mode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int
    inode: int
    target: bytes | None = None

    @property
    def stamp(self) -> list[int]:
        return [self.size_bytes, self.modified_ns, self.changed_ns, self.inode]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    root: bytes
    entries: tuple[Entry, ...]
    skipped: tuple[bytes, ...]
    """Sockets, pipes and devices."""


@dataclass(slots=True)
class _Scan:
    root: bytes
    limits: Limits
    entries: list[Entry] = field(default_factory=list)
    skipped: list[bytes] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    private: set[bytes] = field(default_factory=set)
    """Folders whose own ignore file leaves nothing of them, such as ``runs``."""
    size_bytes: int = 0

    @property
    def too_large(self) -> bool:
        return self.size_bytes > self.limits.size_bytes or len(self.entries) > self.limits.files

    @property
    def hopeless(self) -> bool:
        """Far beyond the limit; what was seen is enough to say what is large."""
        return len(self.entries) > 4 * self.limits.files


def scan(root: bytes, limits: Limits) -> Tree:
    """Everything below *root* that is not ignored, parents first. Links are not followed.

    Raises WorkspaceTooLarge with the largest folders, FileFailed with what can't be read.
    """
    state = _Scan(root, limits)
    todo: list[tuple[bytes, Rules]] = [(b"", Rules.defaults())]
    while todo and not state.hopeless:
        folder, rules = todo.pop()
        todo += _scan_folder(state, folder, rules)
    if state.too_large:
        raise _too_large(state)
    if state.unreadable:
        raise unreadable(state.unreadable)
    entries = [entry for entry in state.entries if entry.path not in state.private]
    entries.sort(key=lambda entry: entry.path)
    return Tree(root=root, entries=tuple(entries), skipped=tuple(sorted(state.skipped)))


def _scan_folder(state: _Scan, folder: bytes, rules: Rules) -> list[tuple[bytes, Rules]]:
    """Add what lies in *folder* (``b"a/b/"``); return the folders in it."""
    try:
        with os.scandir(state.root + b"/" + folder) as found:
            items = list(found)
    except FileNotFoundError:
        return []
    except OSError as exc:
        state.unreadable.append(f"{display(folder) or '.'} ({exc.strerror})")
        return []
    if any(item.name == FILE_NAME for item in items):
        rules = rules.extended(folder, _read_rules(state, folder))
    below: list[tuple[bytes, Rules]] = []
    kept = 0
    for item in items:
        path = folder + item.name
        is_folder = item.is_dir(follow_symlinks=False)
        if rules.ignores(path, is_folder=is_folder):
            continue
        kept += 1
        _add(state, path, item)
        if is_folder:
            below.append((path + b"/", rules))
    if items and not kept and any(item.name == FILE_NAME for item in items):
        state.private.add(folder.rstrip(b"/"))
    return below


def _read_rules(state: _Scan, folder: bytes) -> bytes:
    try:
        with open(state.root + b"/" + folder + FILE_NAME, "rb") as file:
            return file.read(MIB)
    except OSError as exc:
        state.unreadable.append(f"{display(folder + FILE_NAME)} ({exc.strerror})")
        return b""


def _add(state: _Scan, path: bytes, item: os.DirEntry[bytes]) -> None:
    try:
        seen = item.stat(follow_symlinks=False)
        target = os.readlink(item.path) if stat.S_ISLNK(seen.st_mode) else None
    except FileNotFoundError:
        return
    except OSError as exc:
        state.unreadable.append(f"{display(path)} ({exc.strerror})")
        return
    entry = entry_of(path, seen, target)
    if entry is None:
        state.skipped.append(path)
        return
    state.entries.append(entry)
    state.size_bytes += entry.size_bytes


def entry_of(path: bytes, seen: os.stat_result, target: bytes | None = None) -> Entry | None:
    """None for what is neither file, folder nor link."""
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link"}
    kind = kinds.get(stat.S_IFMT(seen.st_mode))
    if kind is None:
        return None
    return Entry(
        path,
        kind,
        stat.S_IMODE(seen.st_mode) & 0o777,
        seen.st_size if kind == "file" else 0,
        seen.st_mtime_ns,
        seen.st_ctime_ns,
        seen.st_ino,
        target,
    )


def _too_large(state: _Scan) -> WorkspaceTooLarge:
    sizes: Counter[bytes] = Counter()
    counts: Counter[bytes] = Counter()
    for entry in state.entries:
        top = entry.path.partition(b"/")[0]
        sizes[top] += entry.size_bytes
        counts[top] += 1
    by_size = state.size_bytes > state.limits.size_bytes
    ranked = (sizes if by_size else counts).most_common(_NAMED)
    largest = ", ".join(
        f"{display(name)} ({format_bytes(amount) if by_size else f'{amount:,} files'})"
        for name, amount in ranked
    )
    more = "more than " if state.hopeless else ""
    text = (
        f"the working directory {display(state.root)} has {more}{format_bytes(state.size_bytes)} "
        f"in {len(state.entries):,} files; the limit is {format_bytes(state.limits.size_bytes)} "
        f"in {state.limits.files:,}. Largest: {largest}. List what is not needed in "
        ".madangignore, or use --no-sync."
    )
    return WorkspaceTooLarge(text, size_bytes=state.size_bytes, files=len(state.entries))


def unreadable(names: Sequence[str]) -> FileFailed:
    """An error that names what can't be read, each with the reason."""
    shown = ", ".join(sorted(names)[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    text = (
        f"the working directory holds what can't be read: {shown}{more}. Mend the permissions, "
        "or list it in .madangignore."
    )
    return FileFailed(text)
