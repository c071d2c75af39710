"""Runs inside an image's own interpreter, as the text of ``python -c``: imports, then forks.

No other module of ours can be seen from there, and whatever the image's code makes of this one
stays inside of the nest's sandbox (see ``nest``). For each seat that the launcher sends, a child is
forked that enters the namespaces of a slot and waits there; what it gets from the slot's init makes
it the program that a new ``python`` would have become. What it can't imitate exactly, it executes.

Arguments: descriptor of the launcher's socket, then the modules to import.
"""
# ruff: noqa: E402, S102, S302, SIM115

from __future__ import annotations

import sys

BEFORE = frozenset(sys.modules)
"""What every interpreter has loaded when it starts."""

import _socket

TYPE_CHECKING = False
if TYPE_CHECKING:  # ``typing`` itself would be loaded in every session.
    from typing import Any
import ctypes
import gc
import io
import marshal
import os
import runpy
import time

NEWPID = 0x20000000
MAX_FDS = 8
RIGHTS_BYTES = _socket.CMSG_SPACE(4 * MAX_FDS)
TOUCH = {
    "numpy": "import numpy.random; numpy.ones(3).sum()",
    "torch": "repr(torch.ones(3).sum())",
}
"""What is loaded at first use only. Starts no thread, draws no random number."""
CAPSET = {"x86_64": 126, "aarch64": 91}[os.uname().machine]

STANDARD: Any = (sys.stdin, sys.stdout, sys.stderr)
READY: list[io.TextIOWrapper] = []
"""stdin from nowhere and from a pipe, stdout, stderr: opened before there is a program."""
FILLING: list[bytes] = []
POOL_BYTES = 16 * 1024
LARGE_BYTES = 100_000
"""So much malloc has in one piece nowhere but at its end."""
MOST_GAPS = 4096
NOWHERE = io.TextIOWrapper(io.BytesIO())
LOADED: set[str] = set()
"""Modules that a program's own may hide, once everything is imported."""

libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
libc.sbrk.restype = ctypes.c_void_p


class Unlike(Exception):
    """The program must be executed: a fork can't do the same."""


def check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def receive(link: _socket.socket) -> tuple[bytes, list[int]]:
    """(message, descriptors); an empty one once the peer has left."""
    data, found, _, _ = link.recvmsg(64, RIGHTS_BYTES)
    fds: list[int] = []
    for _, _, raw in found:
        fds += [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw) & ~3, 4)]
    return data, fds


# -- the interpreter -----------------------------------------------------------------------------


def load(modules: list[str]) -> None:
    """Import everything. Raises RuntimeError where forks would not be like new processes."""
    for name in modules:
        scope: dict[str, Any] = {}
        exec(f"import {name}\n{TOUCH.get(name, '')}", scope)
    sys.stdout.flush()
    sys.stderr.flush()
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("a module starts threads while it is imported")
    if said := os.pread(1, 300, 0):
        text = said.decode("utf-8", "replace")
        raise RuntimeError(f"a module writes output while it is imported: {text}")
    LOADED.update(name.partition(".")[0] for name in sys.modules.keys() - BEFORE)
    open_ahead()
    gc.collect()
    gc.freeze()
    close_gaps()


def close_gaps() -> None:
    """What a fork makes goes to pages of its own: of ours it would copy each that has a gap in it.

    CPython packs objects of a size in pools, up to 512 bytes; others are malloc's. What that has
    free at its end goes back to the kernel.
    """
    for size in range(48, 513, 16):
        FILLING.extend([bytes(size - bytes.__basicsize__) for _ in range(POOL_BYTES // size)])
    try:
        libc.malloc_trim(0)
    except AttributeError:  # Another allocator than glibc's.
        return
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    end = libc.malloc(LARGE_BYTES) or 0
    for size in range(1024, 16, -16):
        for _ in range(MOST_GAPS):
            if not 0 < (libc.malloc(size) or 0) < end:
                break
    libc.free(end)


def serve(link: _socket.socket) -> dict[str, Any]:
    """Fork for each seat. Returns in the forks alone: the job, and who wants to hear of it."""
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    while True:
        data, fds = receive(link)
        if not data:
            os._exit(0)
        if len(os.listdir("/proc/self/task")) > 1:
            raise RuntimeError("it has threads by now")
        check(libc.setns(fds[1], NEWPID))  # Of our children, not of us.
        middle = os.fork()
        if middle == 0:
            try:
                link.close()
                os.close(own)
                return take_seat(data == b"h", *fds)
            except BaseException:
                os._exit(1)
        os.waitpid(middle, 0)
        check(libc.setns(own, NEWPID))
        for fd in fds:
            os.close(fd)


def take_seat(hurry: bool, seat: int, pids: int, *namespaces: int) -> dict[str, Any]:
    if os.fork():
        os._exit(0)
    while os.getppid() != 1:  # Whoever forked us still leaves us to the slot's init.
        time.sleep(0.0002)
    os.close(pids)
    for fd in namespaces:
        check(libc.setns(fd, 0))
        os.close(fd)
    drop_bounds()
    init = _socket.socket(fileno=seat)
    init.send(b"here")
    _shown = None if hurry or is_asked(init) else rehearse()
    data, fds = receive(init)
    if not data:
        os._exit(0)
    *streams, memory = fds
    job: dict[str, Any] = marshal.loads(os.pread(memory, os.fstat(memory).st_size, 0))
    os.close(memory)
    enter(job, streams)
    init.send(b"on")
    init.close()
    return job


def drop_bounds() -> None:
    """What a program of the session can't have again, and none of what we still need."""
    for capability in range(64):
        if libc.prctl(24, capability, 0, 0, 0) < 0:  # PR_CAPBSET_DROP
            break
    libc.prctl(47, 4, 0, 0, 0)  # PR_CAP_AMBIENT, CLEAR_ALL
    os.setgroups([])
    os.setsid()


def is_asked(init: _socket.socket) -> bool:
    """Whether the job is there already, or never will be."""
    try:
        init.recv(1, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return True


def rehearse() -> dict[str, Any]:
    """Become some program, in all that does not last: each page that is shared with the interpreter
    is copied where it is written to first, and that takes longer than the work itself.

    What it returns is shown to ``ps``, and to be kept until something else is.
    """
    path = sys.path[:]
    job: dict[str, Any] = {"argv": [b"python3", b"-c", b"pass"], "tty": b""}
    job["env"] = dict(os.environ._data)  # type: ignore[attr-defined]
    try:
        show(job)
        text, name, scope = become(job)
        exec(compile(text or b"", name, "exec", dont_inherit=True), scope)
        print(1, file=NOWHERE)
    except Unlike:
        pass
    finally:
        sys.path[:] = path
    return job


def enter(job: dict[str, Any], streams: list[int]) -> None:
    """Be the session's user, at its terminal, under its filter; nothing is left to gain."""
    uid = job["uid"]
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    header = (0x20080522).to_bytes(4, "little") + bytes(4)
    check(libc.syscall(CAPSET, header, bytes(24)))
    check(libc.prctl(4, 1, 0, 0, 0))  # PR_SET_DUMPABLE, as after an execution
    os.chdir(job["cwd"])
    if job["tty"]:
        os.close(os.open(job["tty"], os.O_RDWR))
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
    for fd in set(streams):
        os.close(fd)
    show(job)
    program = job["filter"]
    packed = (len(program) // 8).to_bytes(8, "little") + address(program).to_bytes(8, "little")
    check(libc.prctl(22, 2, address(packed), 0, 0))  # PR_SET_SECCOMP


def show(job: dict[str, Any]) -> None:
    """``ps`` and ``/proc/PID/environ`` tell the program's own words, where the kernel lets us."""
    libc.prctl(15, address(job["argv"][0].rpartition(b"/")[2][:15]), 0, 0, 0)
    arguments = b"".join([word + b"\0" for word in job["argv"]])
    variables = b"".join([key + b"=" + value + b"\0" for key, value in job["env"].items()])
    job["shown"] = text = arguments + variables
    start = address(text)
    middle, end = start + len(arguments), start + len(text)
    stat = os.open("/proc/self/stat", os.O_RDONLY | os.O_CLOEXEC)
    fields = os.read(stat, 4096).rpartition(b")")[2].split()
    os.close(stat)
    code, stack, data, heap = fields[23:25], int(fields[25]), fields[42:44], int(fields[44])
    layout = [
        *map(int, code),
        *map(int, data),
        heap,
        libc.sbrk(0),
        stack,
        start,
        middle,
        middle,
        end,
        0,
    ]
    packed = b"".join([word.to_bytes(8, "little") for word in layout])
    packed += bytes(4) + b"\xff\xff\xff\xff"  # No vector, no other program.
    libc.prctl(35, 14, address(packed), len(packed), 0)  # PR_SET_MM, MAP


def address(text: bytes) -> int:
    """Where its bytes lie, while it is kept; ``ctypes`` would make a type for each size."""
    return id(text) + bytes.__basicsize__ - 1


# -- the program ---------------------------------------------------------------------------------


def become(job: dict[str, Any]) -> tuple[str | bytes | None, str, dict[str, Any]]:
    """(text, its name, scope) of the program, in an interpreter that looks newly started.

    Of a module only the name.
    """
    argv = [os.fsdecode(word) for word in job["argv"]]
    set_environment(job["env"])
    sys.executable = find(argv[0], job["env"])
    sys.orig_argv[:] = argv
    found = [*map(open_stream, range(3))] if job["tty"] else ready_streams()
    sys.stdin, sys.stdout, sys.stderr = found
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = found  # type: ignore[misc]
    renew_randomness()
    main: Any = type(sys)("__main__")
    sys.modules["__main__"] = main
    main.__annotations__ = {}
    main.__builtins__ = sys.modules["builtins"]
    main.__loader__ = sys.modules["_frozen_importlib"].BuiltinImporter
    if argv[1] == "-m":
        return run_module(argv)
    if argv[1] == "-c":
        return run_text(argv, main)
    return run_script(argv, main)


def set_environment(variables: dict[bytes, bytes]) -> None:
    """As ``os.environb`` would, with a tenth of the pages written to."""
    data: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
    for name in data:
        os.unsetenv(name)
    data.clear()
    for name, value in variables.items():
        os.putenv(name, value)
        data[name] = value


def run_module(argv: list[str]) -> tuple[None, str, dict[str, Any]]:
    begin(["-m", *argv[3:]], os.getcwd())
    return None, argv[2], {}


def run_text(argv: list[str], main: Any) -> tuple[str, str, dict[str, Any]]:
    begin(["-c", *argv[3:]], "", os.getcwd())
    return argv[2] + "\n", "<string>", main.__dict__


def run_script(argv: list[str], main: Any) -> tuple[bytes, str, dict[str, Any]]:
    path = argv[1]
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError as exc:
        raise Unlike from exc
    if path.endswith(".pyc") or b"\0" in text or b"PK\5\6" in text[-70_000:]:
        raise Unlike
    whole = path
    if not os.path.isabs(path):
        if (folder := os.getcwd()) == "/":
            raise Unlike
        whole = f"{folder}/{path.removeprefix('./')}"
    begin(argv[1:], os.path.dirname(os.path.realpath(path)))
    main.__file__ = whole
    main.__cached__ = None
    main.__loader__ = sys.modules["_frozen_importlib_external"].SourceFileLoader("__main__", whole)
    return text, whole, main.__dict__


def begin(argv: list[str], first: str, folder: str = "") -> None:
    """*first* of ``sys.path``. Raises Unlike where it hides something that is loaded already."""
    try:
        names = os.listdir(folder or first)
    except OSError as exc:
        raise Unlike from exc
    user_site = getattr(sys.modules.get("site"), "USER_SITE", None)
    if user_site and os.path.isdir(user_site):
        raise Unlike
    for name in names:
        if name.partition(".")[0] in LOADED:
            raise Unlike
    sys.argv = argv
    sys.path.insert(0, first)


def find(program: str, variables: dict[bytes, bytes]) -> str:
    """It has no slash in it."""
    for folder in os.fsdecode(variables.get(b"PATH", os.defpath.encode())).split(":"):
        path = f"{folder.rstrip('/')}/{program}" if folder else program
        if os.access(path, os.X_OK):
            return path
    raise Unlike


def open_stream(number: int) -> io.TextIOWrapper:
    """As ``create_stdio`` of CPython makes it."""
    old, mode = STANDARD[number], "w" if number else "r"
    buffer: Any = open(number, mode + "b", -1, closefd=False)
    buffer.raw.name = old.name
    stream = io.TextIOWrapper(
        buffer,
        encoding=old.encoding,
        errors=old.errors,
        newline="\n",
        line_buffering=buffer.raw.isatty() or number == 2,
    )
    stream.mode = mode  # type: ignore[misc]
    return stream


def open_ahead() -> None:
    """Streams of programs that have no terminal: theirs are pipes, or nothing to read from."""
    kept = [os.dup(number) for number in range(3)]
    READY.append(open_stream(0))
    reader, writer = os.pipe()
    for number, fd in enumerate((reader, writer, writer)):
        os.dup2(fd, number)
        READY.append(open_stream(number))
    for number, fd in enumerate(kept):
        os.dup2(fd, number)
    for fd in (reader, writer, *kept):
        os.close(fd)


def ready_streams() -> list[io.TextIOWrapper]:
    is_pipe = os.fstat(0).st_mode & 0o170000 == 0o010000
    return [READY[is_pipe], *READY[2:]]


def renew_randomness() -> None:
    """``random`` does it by itself."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].current_process().authkey = os.urandom(32)


def hide_us() -> None:
    """Of a traceback that is about to be shown: its first frame is ours."""
    hook = sys.excepthook

    def shown(kind: Any, value: Any, trace: Any) -> None:
        sys.excepthook = hook
        trace = trace and trace.tb_next
        sys.last_traceback = trace
        hook(kind, value.with_traceback(trace), trace)

    sys.excepthook = shown


def main() -> dict[str, Any]:
    """The job of a fork; the interpreter itself never returns."""
    link = _socket.socket(fileno=int(sys.argv[1]))
    del sys.path[0]  # The working directory's place.
    try:
        load(sys.argv[2:])
        link.send(b"R")
        return serve(link)
    except Exception as exc:
        link.send(b"F" + f"{type(exc).__name__}: {exc}".encode("utf-8", "replace")[:500])
        os._exit(1)


if __name__ == "__main__":
    job = main()
    try:
        text, name, scope = become(job)
    except Unlike:
        path = find(os.fsdecode(job["argv"][0]), job["env"])
        os.execve(path, job["argv"], job["env"])
    try:
        if text is None:
            runpy._run_module_as_main(name)  # type: ignore[attr-defined]
        else:
            exec(compile(text, name, "exec", dont_inherit=True), scope)
    except BaseException:
        hide_us()
        raise
