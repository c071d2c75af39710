"""Slow or dangerous work in forked processes, so that the launcher never waits."""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from madang.agent.launcher import changes, files, seccomp, syscalls
from madang.agent.launcher.processes import say
from madang.wire.errors import PlatformError, RuntimeFailed, from_problem

Done = Callable[[Any], None]
"""Called with the result, or with the PlatformError that it ended with."""

_MAX_RESULT: Final = 64 * 1024
_READ_ALL: Final = 2
"""CAP_DAC_READ_SEARCH: some of a session's files may be closed even to itself."""


class Helpers:
    """Forks helpers and file workers, hears how they end, and buries them."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector

    def run(self, work: Callable[[], Any], done: Done, kept: Sequence[int] = ()) -> None:
        """*work* in a helper that shares our mount namespace; its result must fit JSON.

        *kept*: descriptors that it needs.
        """
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.fork()
        except OSError as exc:
            os.close(reader)
            os.close(writer)
            done(RuntimeFailed(f"no process can be had for a helper: {exc.strerror}."))
            return
        if pid == 0:
            _work(work, writer, kept)
        os.close(writer)

        def heard(_events: int) -> None:
            answer = result(reader)
            self._selector.unregister(reader)
            os.close(reader)
            os.waitpid(pid, 0)
            done(answer)

        self._selector.register(reader, selectors.EVENT_READ, heard)

    def serve_files(
        self, scratch: str, root: str, uid: int, over: Callable[[int], None]
    ) -> tuple[socket.socket, int]:
        """The client's socket to a new, confined file worker, and the worker's pidfd.

        *over* is called with the pidfd, which is closed afterwards.
        """
        return self._serve(over, lambda sock: _serve_files(sock, scratch, root, uid))

    def serve_changes(
        self, upper: str, root: str, uid: int, over: Callable[[int], None]
    ) -> tuple[socket.socket, int]:
        """The same, to one that tells what a session changed in its root; see ``changes``."""
        return self._serve(over, lambda sock: _serve_changes(sock, upper, root, uid))

    def _serve(
        self, over: Callable[[int], None], work: Callable[[socket.socket], NoReturn]
    ) -> tuple[socket.socket, int]:
        ours, theirs = socket.socketpair()
        try:
            pid = os.fork()
        except OSError as exc:
            ours.close()
            theirs.close()
            raise RuntimeFailed(f"no process can be had for files: {exc.strerror}.") from exc
        if pid == 0:
            work(theirs)
        theirs.close()
        pidfd = os.pidfd_open(pid)

        def ended(_events: int) -> None:
            self._selector.unregister(pidfd)
            os.waitpid(pid, 0)
            over(pidfd)
            os.close(pidfd)

        self._selector.register(pidfd, selectors.EVENT_READ, ended)
        return ours, pidfd


def _work(work: Callable[[], Any], writer: int, kept: Sequence[int]) -> NoReturn:
    try:
        begin("madang-helper", writer, *kept)
        tell(writer, work)
    finally:
        os._exit(0)


def tell(writer: int, work: Callable[[], Any]) -> bool:
    """Do *work* and send word of it for ``result``; whether it could be done."""
    answer = outcome(work)
    os.write(writer, json.dumps(answer).encode()[:_MAX_RESULT])
    return "ok" in answer


def outcome(work: Callable[[], Any]) -> dict[str, Any]:
    """Do *work*; its result, or the error that it ended with."""
    try:
        return {"ok": work()}
    except PlatformError as exc:
        return {"error": exc.code, "text": exc.text}
    except Exception as exc:  # Process root: whatever it is, the launcher is told.
        return {"error": RuntimeFailed.code, "text": f"{type(exc).__name__}: {exc}"}


def _serve_files(sock: socket.socket, scratch: str, root: str, uid: int) -> NoReturn:
    try:
        begin("madang-files", sock.fileno())
        confine(scratch, root, uid)
        files.serve(sock, "/")
    except BaseException as exc:
        say(f"madang files: {exc!r}")
    finally:
        os._exit(0)


def _serve_changes(sock: socket.socket, upper: str, root: str, uid: int) -> NoReturn:
    try:
        begin("madang-changes", sock.fileno())
        confine(upper, root, uid, kept=(_READ_ALL,))
        changes.serve(sock, "/")
    except BaseException as exc:
        say(f"madang changes: {exc!r}")
    finally:
        os._exit(0)


def begin(name: str, *kept: int) -> None:
    """What every fork of the launcher does first. *kept*: descriptors that stay open."""
    gc.disable()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    syscalls.close_all_but(*kept)
    syscalls.set_process_name(name)
    syscalls.die_with_parent(signal.SIGKILL)


def confine(scratch: str, root: str, uid: int, *, kept: Sequence[int] = ()) -> None:
    """See nothing but the scratch space, be nobody but the session.

    *kept*: capabilities that stay; then nothing can be written.
    """
    program = seccomp.program()
    syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC)
    syscalls.bind(os.fsencode(scratch), os.fsencode(root))
    attributes = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
    attributes |= syscalls.MOUNT_ATTR_RDONLY if kept else 0
    syscalls.mount_setattr(os.fsencode(root), attributes, recursive=False)
    os.chdir(root)
    syscalls.pivot_root(b".", b".")
    syscalls.umount(b".", syscalls.MNT_DETACH)
    os.chdir("/")
    syscalls.drop_bounding_set(kept)
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, bool(kept))
    if os.geteuid() != uid:
        syscalls.change_user(uid)
    syscalls.drop_capabilities(kept)
    syscalls.die_with_parent(signal.SIGKILL)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.no_new_privileges()
    seccomp.install(program)


def result(reader: int) -> Any:
    """What ``tell`` sent: the work's result, or the PlatformError that it ended with."""
    try:
        answer = json.loads(os.read(reader, _MAX_RESULT))
    except ValueError:
        return RuntimeFailed("a helper of the launcher was killed.")
    if "error" in answer:
        return from_problem(answer["error"], answer["text"], {})
    return answer["ok"]
