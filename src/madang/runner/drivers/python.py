"""Driver of Python's cells (docs/reference/drivers.md): runs inside sessions, in any Python from
3.8 on, with nothing but its standard library.

It is started as text, and every interpreter compiles it anew: so only what stands above ``MARK`` is
run at the start, with modules that Python has loaded by itself; the rest once it is needed.
"""

from __future__ import annotations

import _ast
import _signal  # type: ignore[import-not-found]
import _thread
import builtins
import fcntl
import io
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MARK = "#" + " What not every cell needs "
ATOMIC = 4096 - 300
"""Bytes of a payload that are written at once, so that nobody writes into the middle of it."""
METADATA = "application/vnd.madang.metadata+json"
AWAIT = 0x2000
"""``ast.PyCF_ALLOW_TOP_LEVEL_AWAIT``"""
COROUTINE = 0x80
KEPT = 1000
"""Cells whose sources tracebacks can show, and whose ids are known."""
PLAIN = {int, float, complex, bool, str, bytes}
TEXT = os.environ.pop("DRIVER", "")


class Pipes:
    """The ways in and out, apart from the descriptors 0 to 2 that the user's code may close."""

    def __init__(self) -> None:
        self.mark = b"\x1e" + os.environ.pop("MADANG_NONCE", "").encode() + b" "
        self.ops, self.out, self.err = (
            fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 200) for fd in range(3)
        )
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        self.lock: Any = _thread.RLock()
        self._buffer = b""

    def frame(self, kind: str, cell: str, arg: str = "-", payload: bytes = b"") -> None:
        with self.lock:
            while len(payload) > ATOMIC:
                self._write(self.out, "more", cell, "-", payload[:ATOMIC])
                payload = payload[ATOMIC:]
            self._write(self.out, kind, cell, arg, payload)

    def fence(self, cell: str) -> None:
        self._write(self.err, "fence", cell, "-", b"")

    def _write(self, fd: int, kind: str, cell: str, arg: str, payload: bytes) -> None:
        head = f"{kind} {cell} {arg} {len(payload)}\n".encode()
        view = memoryview(self.mark + head + payload + b"\n")
        while view:
            view = view[os.write(fd, view) :]

    def next(self) -> tuple[str, str, bytes]:
        """The next thing to do. Raises EOFError."""
        while b"\n" not in self._buffer:
            self._more()
        head, _, self._buffer = self._buffer.partition(b"\n")
        words = head.decode("ascii", "replace").split(" ")
        if len(words) != 3 or not words[2].isdigit():
            return "", "", b""
        size = int(words[2])
        while len(self._buffer) < size:
            self._more()
        payload, self._buffer = self._buffer[:size], self._buffer[size:]
        return words[0], words[1], payload

    @property
    def full(self) -> bool:
        return bool(self._buffer)

    def _more(self) -> None:
        data = os.read(self.ops, 1 << 20)
        if not data:
            raise EOFError
        self._buffer += data

    def mend(self) -> None:
        """Open again what a cell closed."""
        for fd, kept in ((1, self.out), (2, self.err)):
            try:
                fcntl.fcntl(fd, fcntl.F_GETFD)
            except OSError:
                os.dup2(kept, fd)


class Raw(io.RawIOBase):
    """Descriptor 1 or 2; never in the middle of a frame."""

    def __init__(self, fd: int, pipes: Pipes) -> None:
        self._fd = fd
        self._pipes = pipes

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Any) -> int:
        with self._pipes.lock:
            return os.write(self._fd, data)


class Stdin(io.TextIOBase):
    """What the code reads is asked of whoever looks."""

    encoding = "utf-8"

    def __init__(self, ask: Callable[[str, bool], str]) -> None:
        self._ask = ask

    def readable(self) -> bool:
        return True

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        try:
            line = self._ask("", False) + "\n"
        except EOFError:
            return ""
        return line if size < 0 else line[:size]

    def read(self, size: int | None = -1) -> str:
        return self.readline() if size else ""


class Hook:
    """Does something to a module once it has been imported."""

    def __init__(self, after: dict[str, Callable[[Any], None]]) -> None:
        self._after = after
        for name in list(after):
            if name in sys.modules:
                after.pop(name)(sys.modules[name])

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        after = self._after.pop(name, None)
        if after is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                self._wrap(spec.loader, after)
                return spec
        self._after[name] = after
        return None

    def _wrap(self, loader: Any, after: Callable[[Any], None]) -> None:
        execute = loader.exec_module

        def then(module: Any) -> None:
            execute(module)
            after(module)

        loader.exec_module = then


class Driver:
    def __init__(self) -> None:
        self.pipes = Pipes()
        self.pid = os.getpid()
        self.thread = _thread.get_ident()
        self.cell = "-"
        self.busy = False
        self.known: dict[str, None] = {}
        """Cells that were begun: none is twice, even if it comes twice."""
        self.waiting: list[tuple[str, str, bytes]] = []
        self.names = 0
        self.sources: dict[str, str] = {}
        self.loop: Any = None
        self.libc: Any = None
        self.kept = sys.modules["__main__"]
        self.main = type(sys)("__main__")
        self.space = self.main.__dict__
        self.space["__builtins__"] = builtins
        sys.modules["__main__"] = self.main
        sys.argv = [""]
        self.streams: dict[str, Any] = {}
        self._open_streams()
        self._offer()
        self.modules = len(sys.modules)

    def _open_streams(self) -> None:
        for fd, name in ((1, "stdout"), (2, "stderr")):
            old = self.streams.get(name)
            if old is None or old.closed:
                buffer = io.BufferedWriter(Raw(fd, self.pipes), 1 << 15)
                new = io.TextIOWrapper(buffer, "utf-8", "backslashreplace", line_buffering=True)
                self.streams[name] = new
                if old is None or getattr(sys, name, None) is old:
                    setattr(sys, name, new)

    def _offer(self) -> None:
        """What cells find beside the language itself."""
        sys.stdin = Stdin(self.ask)
        builtins.input = self.input
        builtins.display = self.display  # type: ignore[attr-defined]
        os.register_at_fork(before=self.flush, after_in_child=lambda: late("forked")(self))
        os.system = self._flushing(os.system)
        for name in ("posix_spawn", "posix_spawnp"):
            setattr(os, name, self._flushing(getattr(os, name)))
        try:
            import _posixsubprocess as spawning

            spawning.fork_exec = self._flushing(spawning.fork_exec)
        except ImportError:
            pass
        sys.meta_path.insert(0, Hook({
            "linecache": self._show_sources,
            "getpass": lambda module: late("hide_passwords")(self, module),
            "matplotlib.pyplot": lambda module: late("draw_inline")(self, module),
            "IPython.core.display_functions": lambda module: late("be_ipython")(self, module),
        }))  # fmt: skip

    def _flushing(self, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.flush()
            return function(*args, **options)

        return call

    # Its life

    def serve(self) -> None:
        _signal.signal(_signal.SIGINT, self._interrupted)
        self.pipes.frame("ready", "-", "-", sys.version.split()[0].encode())
        while True:
            try:
                op, cell, payload = self.waiting.pop(0) if self.waiting else self._next()
            except EOFError:
                break
            if op == "quit":
                break
            self.do(op, cell, payload)
        self.flush()

    def _next(self) -> tuple[str, str, bytes]:
        if self.loop is not None and not self.loop.is_closed() and not self.pipes.full:
            late("idle")(self)
        return self.pipes.next()

    def do(self, op: str, cell: str, payload: bytes) -> None:
        if op == "run" and cell not in self.known:
            self.known[cell] = None
            if len(self.known) > KEPT:
                del self.known[next(iter(self.known))]
            self.run(cell, payload.decode("utf-8", "replace"))
        elif op in {"complete", "inspect"}:
            late("answer")(self, op, cell, payload)

    def _interrupted(self, number: int, frame: Any) -> None:
        if self.busy and os.getpid() == self.pid:
            raise KeyboardInterrupt

    # Cells

    def run(self, cell: str, code: str) -> None:
        self.cell = cell
        self.pipes.mend()
        self._open_streams()
        if _signal.getsignal(_signal.SIGINT) != self._interrupted:
            _signal.signal(_signal.SIGINT, self._interrupted)
        self.pipes.frame("begin", cell)
        wall, cpu, ok = time.perf_counter(), os.times(), True
        try:
            try:
                self.busy = True
                self._execute(cell, code)
            finally:
                self.busy = False
                self._end_of_child()
                if "madang_inline" in sys.modules:
                    late("show_figures")(self)
        except BaseException as exc:
            self.busy = False
            self._end_of_child(1)
            ok = isinstance(exc, SystemExit) and exc.code in (None, 0)
            if not ok:
                late("report")(self, cell)
        self.flush()
        self._flush_c()
        wall = time.perf_counter() - wall
        used = sum(os.times()[:4]) - sum(cpu[:4])
        figures = f"wall_us={round(wall * 1e6)}\ncpu_us={round(used * 1e6)}\nmem_bytes={memory()}\n"
        self.pipes.mend()
        self.pipes.fence(cell)
        self.pipes.frame("done", cell, "ok" if ok else "error", figures.encode())
        self.cell = "-"

    def _execute(self, cell: str, code: str) -> None:
        name = f"<cell {cell}>"
        self.sources[name] = code
        if len(self.sources) > KEPT:
            del self.sources[next(iter(self.sources))]
        if "linecache" in sys.modules:
            self._show_sources(sys.modules["linecache"])
        tree: Any = compile(code, name, "exec", _ast.PyCF_ONLY_AST | AWAIT, dont_inherit=True)
        last = None
        if tree.body and isinstance(tree.body[-1], _ast.Expr):
            last = _ast.Expression(tree.body.pop().value)
        codes = [compile(tree, name, "exec", AWAIT, dont_inherit=True)] if tree.body else []
        if last is not None:
            codes.append(compile(last, name, "eval", AWAIT, dont_inherit=True))
        value = self._evaluate(codes)
        if last is not None and value is not None and not code.rstrip().endswith(";"):
            self.space["_"] = value
            self._show(value)

    def _evaluate(self, codes: list[Any]) -> Any:
        if any(code.co_flags & COROUTINE for code in codes):
            return late("evaluate_async")(self, codes)
        value = None
        for code in codes:
            value = eval(code, self.space)  # noqa: S307 - what we are for
        return value

    def _show(self, value: Any) -> None:
        self.flush()
        if type(value) in PLAIN and len(text := repr(value)) < ATOMIC:
            self.pipes.frame("result", self.cell, "text/plain", text.encode())
        else:
            late("show")(self, value, "result")

    def _show_sources(self, linecache: Any) -> None:
        """Tracebacks show the cells' lines."""
        for name, code in self.sources.items():
            if name not in linecache.cache:
                lines = [line + "\n" for line in code.split("\n")]
                linecache.cache[name] = (len(code), None, lines, name)

    def _end_of_child(self, code: int = 0) -> None:
        if os.getpid() != self.pid:  # the cell has forked, and forgotten to end the child
            if code:
                late("complain")()
            self.flush()
            os._exit(code)

    def flush(self) -> None:
        for stream in (*self.streams.values(), *map(sys.__dict__.get, ("stdout", "stderr"))):
            try:
                stream.flush()
            except Exception:  # noqa: S110 - closed, or not even a stream
                pass

    def _flush_c(self) -> None:
        """What C has printed, if a cell has brought in any."""
        if len(sys.modules) != self.modules:
            late("find_c")(self)
        if self.libc:
            self.libc.fflush(None)

    # Input and output

    def ask(self, prompt: str, hidden: bool) -> str:
        """Raises EOFError where nobody answers."""
        return late("ask")(self, prompt, hidden)  # type: ignore[no-any-return]

    def input(self, prompt: object = "", /) -> str:
        """Ask whoever looks at the cell for a line."""
        return self.ask(str(prompt), False)

    def display(self, *values: Any, **options: Any) -> Any:
        """Show *values*, rich where they can be; with ``display_id`` they can be changed later."""
        return late("display")(self, *values, **options)


def memory() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read(100).split()[1]) * 4096
    except (OSError, ValueError, IndexError):
        return 0


def late(name: str) -> Any:
    """A function from below the mark."""
    if name not in globals():
        rest = TEXT.partition("\n" + MARK)[2].partition("\n")[2]
        exec(compile(rest, "<driver>", "exec"), globals())  # noqa: S102
    return globals()[name]


if __name__ == "__main__" and TEXT:
    Driver().serve()
    sys.exit()

# What not every cell needs ----------------------------------------------------------------------

MAX_REPR = 1 << 20
METHODS = (
    ("text/html", "_repr_html_"),
    ("text/markdown", "_repr_markdown_"),
    ("text/latex", "_repr_latex_"),
    ("image/svg+xml", "_repr_svg_"),
    ("image/png", "_repr_png_"),
    ("image/jpeg", "_repr_jpeg_"),
    ("application/pdf", "_repr_pdf_"),
    ("application/json", "_repr_json_"),
    ("application/javascript", "_repr_javascript_"),
)


class Handle:
    """A display that can be changed in place."""

    def __init__(self, driver: Driver, name: str) -> None:
        self._driver = driver
        self.display_id = name

    def display(self, value: Any, **options: Any) -> None:
        show(self._driver, value, "display", name=self.display_id, **options)

    def update(self, value: Any, **options: Any) -> None:
        show(self._driver, value, "update", name=self.display_id, **options)


def idle(driver: Driver) -> None:
    """Tasks that cells have left go on between them."""
    import asyncio

    loop, fd = driver.loop, driver.pipes.ops
    if not asyncio.all_tasks(loop):
        return
    try:
        come = loop.create_future()
        loop.add_reader(fd, lambda: come.done() or come.set_result(None))
        try:
            loop.run_until_complete(come)
        finally:
            loop.remove_reader(fd)
    except BaseException:  # a task's own fault, such as sys.exit
        report(driver, "-")


def evaluate_async(driver: Driver, codes: list[Any]) -> Any:
    """A cell with ``await`` at its top."""
    import asyncio

    async def evaluate() -> Any:
        value = None
        for code in codes:
            value = eval(code, driver.space)  # noqa: S307 - what we are for
            if code.co_flags & COROUTINE:
                value = await value
        return value

    if driver.loop is None or driver.loop.is_closed():
        driver.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(driver.loop)
        if (wakes := getattr(driver.loop, "_csock", None)) is not None:
            # An interrupt that comes just before the loop waits must not wait with it.
            _signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    task = driver.loop.create_task(evaluate())
    try:
        return driver.loop.run_until_complete(task)
    except KeyboardInterrupt:
        if task.cancel():  # else it was hit itself, and waiting for it again would never end
            try:
                driver.loop.run_until_complete(task)
            except asyncio.CancelledError:
                pass
        raise


def forked(driver: Driver) -> None:
    """A child of a cell is no interpreter: it says nothing to whoever looks."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (driver.pipes.ops, driver.pipes.out, driver.pipes.err):
        os.dup2(null, fd, inheritable=False)
    os.close(null)
    driver.pipes.lock = _thread.RLock()


def complain() -> None:
    import traceback

    traceback.print_exc()


def report(driver: Driver, cell: str) -> None:
    """Tell the error that is being handled."""
    kind, error, trace = sys.exc_info()
    title = getattr(kind, "__name__", "Error")
    try:
        name, line = f"<cell {cell}>", None
        while trace is not None and trace.tb_frame.f_globals is not driver.space:
            trace = trace.tb_next
        at = trace
        while at is not None:
            if at.tb_frame.f_code.co_filename == name:
                line = at.tb_lineno
            at = at.tb_next
        if isinstance(error, SyntaxError) and error.filename == name:
            line = error.lineno
        import traceback

        told = traceback.TracebackException(type(error), error, trace)  # type: ignore[arg-type]
        ours = [frame.f_globals is globals() for frame, _ in traceback.walk_tb(trace)]
        told.stack[:] = [each for each, mine in zip(told.stack, ours) if not mine]  # noqa: B905
        lines = list(told.format())
        text = list(told.format_exception_only())[-1].strip().partition(": ")[2]
    except BaseException as exc:  # its own __str__, or too deep
        text, line = "", None
        lines = [f"{title} (it can't be shown: {type(exc).__name__})"]
    driver.flush()
    body = f"{title}\n{text}\n{''.join(lines)}".encode("utf-8", "backslashreplace")
    driver.pipes.frame("error", cell, "-" if line is None else str(line), body)


def find_c(driver: Driver) -> None:
    """The C library, whose output has a buffer of its own."""
    driver.modules = len(sys.modules)
    if driver.libc is None and not safe_modules():
        try:
            import ctypes

            driver.libc = ctypes.CDLL(None)
        except Exception:
            driver.libc = False
        driver.modules = len(sys.modules)


def safe_modules() -> bool:
    """Whether all that is loaded is Python's own."""
    own = (os.path.dirname(os.__file__), os.path.join(sys.prefix, "lib-dynload"))
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".so"):
            continue
        if "site-packages" in file or "dist-packages" in file or not file.startswith(own):
            return False
    return "ctypes" not in sys.modules and "cffi" not in sys.modules


# Input


def ask(driver: Driver, prompt: str, hidden: bool) -> str:
    if _thread.get_ident() != driver.thread or os.getpid() != driver.pid or driver.cell == "-":
        raise EOFError("only the cell itself can ask for input")
    driver.flush()
    kind = "password" if hidden else "prompt"
    driver.pipes.frame("input", driver.cell, kind, prompt.encode("utf-8", "backslashreplace"))
    while True:
        op, cell, payload = driver.pipes.next()
        if op == "input" and cell == driver.cell:
            return payload.decode("utf-8", "replace")
        if op == "eof":
            raise EOFError("nobody answers")
        if op in {"complete", "inspect"}:
            driver.do(op, cell, payload)
        elif op not in {"input", ""}:
            driver.waiting.append((op, cell, payload))


def hide_passwords(driver: Driver, module: Any) -> None:
    module.getpass = lambda prompt="Password: ", stream=None, **_: driver.ask(prompt, True)


# Output


def display(
    driver: Driver,
    *values: Any,
    display_id: Any = None,
    metadata: Any = None,
    raw: bool = False,
    clear: bool = False,
    **_: Any,
) -> Handle | None:
    if clear:
        clear_output(driver, wait=True)
    name = ""
    if display_id is not None and display_id is not False:
        driver.names += 1
        name = f"{driver.pid}-{driver.names}" if display_id is True else str(display_id)
    for value in values:
        if raw and isinstance(value, dict):
            send(driver, "display", value, metadata, name)
        else:
            show(driver, value, "display", name=name, metadata=metadata)
    return Handle(driver, name) if name else None


def clear_output(driver: Driver, wait: bool = False) -> None:
    """What the cell has shown so far goes; with *wait*, once the next comes."""
    driver.flush()
    driver.pipes.frame("clear", driver.cell, "wait" if wait else "now")


def show(
    driver: Driver, value: Any, kind: str, *, name: str = "", metadata: Any = None, **_: Any
) -> None:
    data, more = bundle(value)
    send(driver, kind, data, {**more, **(metadata or {})}, name)


def send(driver: Driver, kind: str, data: dict[str, Any], metadata: Any, name: str) -> None:
    driver.flush()
    parts = [(mime, as_bytes(value)) for mime, value in data.items() if value is not None]
    if metadata:
        parts.insert(0, (METADATA, as_bytes(metadata)))
    suffix = ";display=" + "".join(c if c.isalnum() else "-" for c in name)[:64] if name else ""
    pipes, cell = driver.pipes, driver.cell
    with pipes.lock:
        for mime, payload in parts[:-1]:
            pipes.frame("part", cell, mime.replace(" ", ""), payload)
        mime, payload = parts[-1] if parts else ("text/plain", b"")
        pipes.frame(kind, cell, mime.replace(" ", "") + suffix, payload)


# Pictures


def draw_inline(driver: Driver, pyplot: Any) -> None:
    """Figures are shown at the end of their cell, unless the user has chosen a backend."""
    import matplotlib as mpl
    from matplotlib import rcsetup

    chosen = dict.__getitem__(mpl.rcParams, "backend")
    if chosen is not getattr(rcsetup, "_auto_backend_sentinel", None):
        return
    inline: Any = type(sys)("madang_inline")
    sys.modules["madang_inline"] = inline
    fill_backend(inline, lambda: show_figures(driver))
    mpl.use("module://madang_inline")


def show_figures(driver: Driver) -> None:
    helpers = sys.modules.get("matplotlib._pylab_helpers")
    managers = helpers.Gcf.get_all_fig_managers() if helpers is not None else []
    try:
        for manager in managers:
            figure = manager.canvas.figure
            if figure.axes or figure.lines or figure.texts or figure.images:
                send(driver, "display", figure_bundle(figure), None, "")
    finally:
        if managers:
            sys.modules["matplotlib.pyplot"].close("all")


def be_ipython(driver: Driver, module: Any) -> None:
    """``IPython.display`` works as in a notebook."""
    module.display = driver.display
    module.clear_output = lambda wait=False: clear_output(driver, wait)

    def update_display(value: Any, *, display_id: Any, **options: Any) -> None:
        show(driver, value, "update", name=str(display_id), **options)

    module.update_display = update_display


# What is shown


def bundle(value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """MIME type → content, and metadata. Never raises for what the value's own methods do."""
    kind = type(value)
    data: dict[str, Any] = {}
    metadata: Any = {}
    if not isinstance(value, type):
        given = _try(value, "_repr_mimebundle_")
        if isinstance(given, tuple) and len(given) == 2:
            given, metadata = given
        if isinstance(given, dict):
            data = {str(mime): content for mime, content in given.items()}
        for mime, method in METHODS if not data else ():
            content = _try(value, method)
            if isinstance(content, tuple) and len(content) == 2:
                content, metadata[mime] = content
            if content is not None:
                data[mime] = content
        if kind.__module__ == "matplotlib.figure" and "image/png" not in data:
            data.update(loose_figure(value))
    if "text/plain" not in data:
        data = {**data, "text/plain": plain(value)}
    return data, metadata if isinstance(metadata, dict) else {}


def _try(value: Any, method: str) -> Any:
    if not callable(getattr(type(value), method, None)):
        return None
    try:
        return getattr(value, method)()
    except NotImplementedError:
        return None
    except Exception:
        import traceback

        traceback.print_exc()
        return None


def plain(value: Any) -> str:
    text = repr(value)
    if type(value) in {dict, list, tuple, set, frozenset} and 100 < len(text) < 20_000:
        import pprint

        text = pprint.pformat(value, width=100, compact=True, sort_dicts=False)
    if len(text) > MAX_REPR:
        text = f"{text[:MAX_REPR]}… ({len(text) - MAX_REPR} characters more)"
    return text


def as_bytes(content: Any) -> bytes:
    if isinstance(content, (bytes, bytearray, memoryview)):
        return bytes(content)
    if isinstance(content, str):
        return content.encode("utf-8", "backslashreplace")
    import json

    return json.dumps(content, default=str).encode()


def fill_backend(module: Any, show: Callable[[], None]) -> None:
    """A backend of matplotlib."""
    from matplotlib.backend_bases import FigureManagerBase
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def given(number: Any, figure: Any) -> Any:
        return FigureManagerBase(FigureCanvasAgg(figure), number)

    def new(number: Any, *args: Any, FigureClass: Any = Figure, **options: Any) -> Any:  # noqa: N803
        return given(number, FigureClass(*args, **options))

    module.FigureCanvas = FigureCanvasAgg
    module.FigureManager = FigureManagerBase
    module.new_figure_manager = new
    module.new_figure_manager_given_figure = given
    module.draw_if_interactive = lambda: None
    module.show = lambda *args, **options: show()


def figure_bundle(figure: Any) -> dict[str, Any]:
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    return {"image/png": file.getvalue(), "text/plain": repr(figure)}


def loose_figure(figure: Any) -> dict[str, Any]:
    """The picture of one that is not shown at the end of the cell anyway."""
    helpers = sys.modules.get("matplotlib._pylab_helpers")
    managers = helpers.Gcf.get_all_fig_managers() if helpers is not None else []
    if any(manager.canvas.figure is figure for manager in managers):
        return {}
    return figure_bundle(figure)


# Questions about code


def answer(driver: Driver, op: str, cell: str, payload: bytes) -> None:
    cursor, _, code = payload.decode("utf-8", "replace").partition("\n")
    try:
        if op == "complete":
            told = complete(driver.space, code, int(cursor))
        else:
            told = inspect_(driver.space, code, int(cursor))
    except BaseException:
        told = ("completions", "0,0", "") if op == "complete" else ("inspection", "none", "")
    kind, arg, text = told
    driver.pipes.frame(kind, cell, arg, text.encode("utf-8", "backslashreplace"))


def complete(space: dict[str, Any], code: str, cursor: int) -> tuple[str, str, str]:
    before = code[:cursor]
    found = _jedi(space, code, before)
    if found is None:
        found = _imports(before) or _names(space, before)
    start, matches = found
    return "completions", f"{start},{cursor}", "\n".join(dict.fromkeys(matches))


def _jedi(space: dict[str, Any], code: str, before: str) -> tuple[int, list[str]] | None:
    try:
        import jedi  # type: ignore[import-not-found]
    except ImportError:
        return None
    try:
        lines = before.split("\n")
        found = jedi.Interpreter(code, [space]).complete(len(lines), len(lines[-1]))
        if not found:
            return len(before), []
        return len(before) - found[0].get_completion_prefix_length(), [each.name for each in found]
    except Exception:
        return None


def _imports(before: str) -> tuple[int, list[str]] | None:
    import re

    match = re.search(r"(?:^|\n|;)\s*(?:import|from)\s+(?:[\w.]+\s*,\s*)*([\w.]*)$", before)
    if match is None:
        return None
    import importlib
    import pkgutil

    package, _, word = match.group(1).rpartition(".")
    path = getattr(importlib.import_module(package), "__path__", []) if package else None
    names = {module.name for module in pkgutil.iter_modules(path)}
    if not package:
        names.update(sys.builtin_module_names)
    return len(before) - len(word), sorted(name for name in names if name.startswith(word))


def _names(space: dict[str, Any], before: str) -> tuple[int, list[str]]:
    import re
    import rlcompleter

    match = re.search(r"[\w.]*$", before)
    word = match.group() if match else ""
    completer = rlcompleter.Completer(space)
    head, dot, tail = word.rpartition(".")
    found = completer.attr_matches(word) if dot else completer.global_matches(word)
    names = [each[len(head) + len(dot) :].rstrip("( :") for each in found]
    return len(before) - len(tail), [name for name in names if name.startswith(tail)]


def inspect_(space: dict[str, Any], code: str, cursor: int) -> tuple[str, str, str]:
    value = _named(space, code, cursor)
    if value is _NOTHING:
        return "inspection", "none", ""
    import inspect

    lines = []
    if callable(value):
        try:
            name = getattr(value, "__qualname__", type(value).__name__)
            lines.append(f"{name}{inspect.signature(value)}")
        except (TypeError, ValueError):
            pass
    else:
        lines.append(f"{type(value).__name__}: {plain(value)[:2000]}")
    lines.append(inspect.getdoc(value) or "")
    return "inspection", "found", "\n\n".join(line for line in lines if line)


_NOTHING = object()


def _named(space: dict[str, Any], code: str, cursor: int) -> Any:
    """What the name at the cursor stands for, or the function that is being called there."""
    import re

    before = code[:cursor]
    after = re.match(r"\w*", code[cursor:])
    word = re.search(r"[\w.]*$", before)
    name = (word.group() if word else "") + (after.group() if after else "")
    if not name.strip("."):
        depth, at = 0, len(before) - 1
        while at >= 0 and not (before[at] == "(" and depth == 0):
            depth += {")": 1, "(": -1}.get(before[at], 0)
            at -= 1
        word = re.search(r"[\w.]+$", before[: max(at, 0)])
        name = word.group() if word else ""
    first, *rest = name.split(".")
    value = space.get(first, getattr(builtins, first, _NOTHING) if first else _NOTHING)
    for each in rest:
        value = getattr(value, each, _NOTHING) if value is not _NOTHING else _NOTHING
    return value
