"""``madang console``, and what ``madang run -i`` becomes."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Final

import click

from madang.cli.config import load
from madang.cli.context import connect
from madang.cli.pictures import Pictures, protocol_of
from madang.cli.terminal import Notes, is_terminal
from madang.client import cellcalls
from madang.client.cells import Cells
from madang.client.cellstory import Story
from madang.client.sync import Client
from madang.wire.cells import Cell, CellEvent, CellStatus, EventKind
from madang.wire.errors import InterpreterEnded, PlatformError

HELP: Final = """\
.help     this            .history  the last cells
.restart  a fresh start   .detach   leave, and keep the session
.exit     leave (as Ctrl-D)
Ctrl-C interrupts a cell; a second one restarts the interpreter. Tab completes, NAME? explains."""
AGAIN_S: Final = 3.0
"""A second Ctrl-C within so long restarts."""
_OPENING, _CLOSING = "([{", ")]}"


@click.command()
@click.option("--language", default="python", show_default=True, help="Of the interpreter.")
@click.option("--driver", default="", help="Driver of another kind, like ipykernel.")
@click.option("--name", default="", help="Name of the interpreter. Default: of its language.")
@click.option("--new", is_flag=True, help="Start another, even if there is one.")
@click.argument("session")
def console(language: str, driver: str, name: str, new: bool, session: str) -> int:
    """Type cells into an interpreter of a running session.

    What was defined stays: in the interpreter, for the next console and for notebooks. Without a
    terminal, all of stdin is one cell.

    \b
    madang console calm-otter
    madang console calm-otter --language r
    echo 'print(6 * 7)' | madang console calm-otter
    """
    config = load()
    with connect(config) as client:
        chosen = client.get_session(session)
        with client.cells(chosen.id, language, driver=driver, name=name, new=new) as cells:
            return Console(client, cells, Notes(plain=config.plain)).run()


class Console:
    """One person at one interpreter."""

    def __init__(self, client: Client, cells: Cells, notes: Notes) -> None:
        self.detached = False
        """Whether the session shall go on after a console that was its reason."""
        self._client = client
        self._cells = cells
        self._notes = notes
        self._names = cells.interpreter.session_id, cells.interpreter.id
        self._language = cells.interpreter.language
        self._pictures = Pictures(protocol_of(os.environ) if is_terminal(1) else "")
        self._interrupted_at = -AGAIN_S
        self._matches: list[str] = []

    def run(self) -> int:
        """Until the person leaves; the exit code."""
        try:
            if not is_terminal(0):
                return self._one_cell(sys.stdin.read())
            return self._talk()
        except InterpreterEnded as exc:
            self._notes.error(exc.text)
            return 1

    def _one_cell(self, code: str) -> int:
        cell = self._execute(code)
        return 0 if cell.status is CellStatus.OK else 1

    def _talk(self) -> int:
        version = self._client.call(cellcalls.interpreter(*self._names)).version
        told = f"{self._language} {version}".strip()
        self._notes.line("cells", f"{told} in {self._cells.interpreter.session} · .help")
        with self._line_editing():
            while True:
                try:
                    code = self._ask()
                except EOFError:
                    print()
                    return 0
                except KeyboardInterrupt:
                    print()
                    continue
                if code.strip() in {".exit", ".detach"}:
                    self.detached = code.strip() == ".detach"
                    return 0
                self._do(code)

    def _ask(self) -> str:
        """A whole cell."""
        code = input(">>> ")
        while unfinished(self._language, code):
            code += "\n" + input("... ")
        return code

    def _do(self, code: str) -> None:
        word = code.strip()
        if not word:
            return
        if word == ".help":
            print(HELP)
        elif word == ".restart":
            self._restart()
        elif word == ".history":
            self._show_history()
        elif word.endswith("?") and "\n" not in word:
            found = self._cells.inspect(word.rstrip("?"))
            print(found.data.get("text/plain", "").rstrip() if found.found else "unknown.")
        else:
            try:
                self._execute(code)
            except InterpreterEnded:
                raise
            except PlatformError as exc:
                self._notes.error(exc.text)

    def _execute(self, code: str) -> Cell:
        """Run a cell to its end, whatever keys are pressed."""
        story = Story(self._cells.interpreter.id, code)
        story.id = self._cells.execute(code, stdin=is_terminal(0))
        while not story.ended:
            try:
                for event in self._cells.take():
                    if story.add(event):
                        self._show(event)
                        if story.asks:
                            story.asks = False
                            self._cells.input(_answer(event))
                    elif event.kind is EventKind.STATUS and event.text:
                        self._notes.line("cells", event.text)
                if self._cells.finished and not story.ended:
                    raise InterpreterEnded(f"the interpreter has ended: {self._cells.ended}")
                if not story.ended:
                    self._cells.pump(timeout_s=1.0)
            except KeyboardInterrupt:
                self._interrupt()
        return story.cell()

    def _interrupt(self) -> None:
        now = time.monotonic()
        if now - self._interrupted_at < AGAIN_S:
            self._restart()
            return
        self._interrupted_at = now
        self._cells.interrupt()

    def _restart(self) -> None:
        self._cells.restart()
        self._notes.line("cells", "restarted; nothing is defined any more.")

    def _show(self, event: CellEvent) -> None:
        if event.kind is EventKind.STREAM:
            out = sys.stdout if event.name == "stdout" else sys.stderr
            out.write(event.text)
            out.flush()
        elif event.kind in {EventKind.RESULT, EventKind.DISPLAY, EventKind.UPDATE}:
            picture = self._pictures.show(event.data)
            text = event.data.get("text/plain", "")
            print(picture if picture is not None else f"{text}\n", end="", flush=True)
        elif event.kind is EventKind.ERROR and event.error is not None:
            error = event.error
            lines = error.traceback or (f"{error.name}: {error.text}",)
            print("\n".join(lines), file=sys.stderr)

    def _show_history(self) -> None:
        for cell in self._client.call(cellcalls.history(*self._names, limit=50, before=None)):
            number = "-" if cell.count is None else str(cell.count)
            print(f"[{number}] " + cell.code.rstrip().replace("\n", "\n    "))

    @contextlib.contextmanager
    def _line_editing(self) -> Iterator[None]:
        """Completion by the interpreter, and the history of all consoles and notebooks on it."""
        try:
            import readline
        except ImportError:
            yield
            return
        readline.clear_history()
        for cell in self._client.call(cellcalls.history(*self._names, limit=500, before=None)):
            for line in cell.code.splitlines():
                readline.add_history(line)
        readline.set_completer_delims(" \t\n`!@#$%^&*()-=+[{]}\\|;:'\",<>/?")
        readline.set_completer(lambda word, state: self._complete(readline, word, state))
        readline.parse_and_bind("tab: complete")
        try:
            yield
        finally:
            readline.set_completer(None)

    def _complete(self, readline: object, word: str, state: int) -> str | None:
        """The next match for *word*, as readline asks for them."""
        if state == 0:
            line, end = readline.get_line_buffer(), readline.get_endidx()  # type: ignore[attr-defined]
            if not line[:end].strip():
                self._matches = ["    "]
                return "    "
            try:
                found = self._cells.complete(line, end)
            except PlatformError:
                return None
            before = line[end - len(word) : found.start]
            self._matches = [before + match for match in found.matches]
        return self._matches[state] if state < len(self._matches) else None


def unfinished(language: str, code: str) -> bool:
    """Whether more lines of a cell are to come; an empty line ends all but open brackets."""
    lines = code.split("\n")
    if language == "python":
        import codeop
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                # A block goes on until a line without indentation, or an empty one.
                if codeop.compile_command(code, "<cell>", "exec") is not None:
                    return len(lines) > 1 and lines[-1].startswith((" ", "\t"))
            except (SyntaxError, ValueError, OverflowError):
                return False
            return True
    if lines[-1].endswith("\\"):
        return True
    depth = sum(code.count(each) for each in _OPENING) - sum(code.count(each) for each in _CLOSING)
    return depth > 0


def _answer(event: CellEvent) -> str:
    """What the person types for a cell that asks."""
    if event.secret:
        from getpass import getpass

        return getpass(event.text)
    try:
        return input(event.text)
    except EOFError:
        return ""
