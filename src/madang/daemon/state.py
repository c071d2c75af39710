"""The state folder: who uses it, which version wrote it, what lies in it. Standard library only."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from typing import Final

from madang.wire.errors import ConfigInvalid, StateLocked, StateVersion, StorageFull

FORMAT: Final = 1
"""Grows when an older Madang could not read the folder any more."""
IGNORE_FILE: Final = ".madangignore"
_OURS: Final = frozenset({"lock", "VERSION", IGNORE_FILE, "new", "lost+found"})


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom a folder belongs to."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What the lock file says about the platform that holds it."""

    pid: int
    """The supervisor."""
    born: int
    """Its start, in clock ticks since boot: tells it from a later process of that number."""
    url: str = ""
    """Empty until the server is ready."""
    children: tuple[tuple[int, int], ...] = ()
    """(pid, born) of launcher and server."""


class StateFolder:
    """A state folder that this process alone uses."""

    def __init__(self, path: str, lock: int) -> None:
        self.path = path
        self.lock = lock

    @classmethod
    def open(cls, path: str, *, server: Owner) -> StateFolder:
        """Make or take over the folder.

        Raises StateLocked, StateVersion, ConfigInvalid (not a state folder, can't be written) and
        StorageFull.
        """
        try:
            os.makedirs(path, mode=0o755, exist_ok=True)
            _check_owner(path)
            lock = _take_lock(path)
            try:
                _check_version(path)
                _make_folders(path, server)
            except BaseException:
                os.close(lock)
                raise
        except OSError as exc:
            if exc.errno in {28, 122}:
                raise StorageFull(f"state folder {path}: {exc.strerror}.") from exc
            text = f"state folder {path}: {exc.strerror}. Choose another with --state DIR."
            raise ConfigInvalid(text) from exc
        return cls(path, lock)

    def join(self, *names: str) -> str:
        return os.path.join(self.path, *names)

    def tell(self, running: Running) -> None:
        """Write who runs here into the lock file, for ``down`` and ``doctor``."""
        data = json.dumps(asdict(running)).encode()
        os.pwrite(self.lock, data.ljust(512), 0)

    def read_token(self) -> str:
        """The first administrator's token, or an empty text."""
        try:
            with open(self.join("token"), encoding="ascii") as file:
                return file.read().strip()
        except FileNotFoundError:
            return ""

    def write_token(self, token: str) -> None:
        """Keep the token, readable by the owner of the folder alone."""
        temporary = self.join("token.new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            file.write(token + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.join("token"))

    def close(self) -> None:
        """Let others have the folder."""
        os.ftruncate(self.lock, 0)
        os.close(self.lock)


def read_running(path: str) -> Running | None:
    """Who runs on the folder at *path*, if anyone does."""
    try:
        with open(os.path.join(path, "lock"), "rb") as file:
            found = json.loads(file.read(4096).strip() or b"null")
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    children = tuple((int(pid), int(start)) for pid, start in found.pop("children", ()))
    running = Running(**found, children=children)
    return running if born(running.pid) == running.born else None


def born(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it has gone or is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _check_owner(path: str) -> None:
    found = os.stat(path)
    if found.st_uid != os.geteuid():
        raise ConfigInvalid(
            f"state folder {path} belongs to user {found.st_uid}, not to you ({os.geteuid()}). "
            "Start `madang up` as that user, or choose another folder with --state DIR."
        )
    if found.st_mode & 0o022:
        raise ConfigInvalid(
            f"state folder {path} can be written by other users. Mend: chmod go-w {path}"
        )


def _take_lock(path: str) -> int:
    lock = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(lock)
        running = read_running(path)
        by = f" (process {running.pid}, {running.url or 'starting'})" if running else ""
        raise StateLocked(
            f"state folder {path} is in use by another `madang up`{by}. "
            f"Stop it with `madang down --state {path}`, or use another folder."
        ) from exc
    return lock


def _check_version(path: str) -> None:
    file = os.path.join(path, "VERSION")
    try:
        with open(file, encoding="ascii", errors="replace") as old:
            text = old.read(32).strip()
    except FileNotFoundError:
        alien = sorted(set(os.listdir(path)) - _OURS)
        if alien:
            text = f"{path} is no state folder: it has files of something else ({alien[0]}, …)."
            raise ConfigInvalid(f"{text} Choose an empty one with --state DIR.") from None
        # Where the folder lies in somebody's working directory, `madang run` does not send it.
        for name, text in ((IGNORE_FILE, "*\n"), ("VERSION", f"{FORMAT}\n")):
            with open(os.path.join(path, "new"), "w", encoding="ascii") as new:
                new.write(text)
            os.replace(os.path.join(path, "new"), os.path.join(path, name))
        return
    if not text.isdecimal() or int(text) > FORMAT:
        raise StateVersion(
            f"state folder {path} has format {text[:20]!r}; this Madang knows up to {FORMAT}. "
            "Start the version that wrote it, or a newer one, or choose another folder."
        )


def _make_folders(path: str, server: Owner) -> None:
    own = Owner(os.geteuid(), os.getegid())
    folders = (
        ("server", server, 0o700),
        ("server/blobs", server, 0o700),
        ("server/build", server, 0o700),
        ("run", server, 0o700),
        ("layers", server, 0o755),
        ("tools", server, 0o755),
        ("kernels", own, 0o755),
    )
    for name, owner, mode in folders:
        _ensure_folder(os.path.join(path, name), owner, mode)


def _ensure_folder(path: str, owner: Owner, mode: int) -> None:
    """A real folder with that owner and mode; never through a link that somebody left there."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if (found.st_uid, found.st_gid) != (owner.uid, owner.gid):
            os.fchown(fd, owner.uid, owner.gid)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)
