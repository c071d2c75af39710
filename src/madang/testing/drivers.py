"""A driver of cells as a local child process, spoken to as the server does.

>>> with Driver.start(Languages(), "lua") as driver:
...     driver.run("return 1 + 1").result
'2'
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Final, Self

from madang.kit.languages import Languages, cells_command

PATIENCE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Frame:
    kind: str
    id: str
    arg: str
    payload: bytes

    @property
    def text(self) -> str:
        return self.payload.decode()


@dataclass(kw_only=True)
class Outcome:
    """What came of a cell."""

    id: str
    frames: list[Frame] = field(default_factory=list)
    stdout: bytes = b""
    stderr: bytes = b""

    def all(self, kind: str) -> list[Frame]:
        return [frame for frame in self.frames if frame.kind == kind]

    @property
    def status(self) -> str:
        return self.all("done")[0].arg

    @property
    def figures(self) -> dict[str, int]:
        lines = self.all("done")[0].text.splitlines()
        return {key: int(value) for key, _, value in (line.partition("=") for line in lines)}

    @property
    def result(self) -> str | None:
        found = [frame.text for frame in self.all("result") if frame.arg == "text/plain"]
        return found[0] if found else None

    @property
    def error(self) -> tuple[str, str, int | None] | None:
        """Name, text, line."""
        for frame in self.all("error"):
            name, text, *_ = frame.text.split("\n", 2)
            return name, text, None if frame.arg == "-" else int(frame.arg)
        return None


class Driver:
    def __init__(self, command: str, text: str, environment: Mapping[str, str]) -> None:
        self.nonce: Final = secrets.token_hex(16)
        env = {**environment, "DRIVER": text, "MADANG_NONCE": self.nonce}
        self.process: Final = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
        self._items: Final[queue.Queue[tuple[str, bytes | Frame]]] = queue.Queue()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._readers: Final = [
            threading.Thread(target=self._read, args=(stream, name), daemon=True)
            for stream, name in ((self.process.stdout, "out"), (self.process.stderr, "err"))
        ]
        for reader in self._readers:
            reader.start()
        self._ids = 0

    @classmethod
    def start(
        cls, languages: Languages, name: str, environment: Mapping[str, str] | None = None
    ) -> Self:
        """One that is ready."""
        language = languages.get(name)
        env = {"LANG": "C.UTF-8"} | dict(os.environ if environment is None else environment)
        driver = cls(cells_command(language), languages.driver(language), env)
        try:
            driver.ready = driver.wait_for("ready").text
        except BaseException:
            driver.close()
            raise
        return driver

    ready: str = ""
    """What it said of its version."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for reader in self._readers:
            reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def send(self, op: str, ident: str, payload: str | bytes = b"") -> None:
        data = payload.encode("utf-8", "surrogateescape") if isinstance(payload, str) else payload
        assert self.process.stdin is not None
        self.process.stdin.write(b"%s %s %d\n%s" % (op.encode(), ident.encode(), len(data), data))
        self.process.stdin.flush()

    def interrupt(self) -> None:
        """As the server does: the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def new_id(self) -> str:
        self._ids += 1
        return f"c{self._ids}"

    def run(
        self, code: str, *answers: str | None, when: Callable[[Outcome], Any] | None = None
    ) -> Outcome:
        """A cell to its end. *answers*: to its requests, in turn; None: nobody answers. *when* is
        called each time something came, until it returns something true.
        """
        outcome = Outcome(id=self.new_id())
        self.send("run", outcome.id, code)
        left = list(answers)
        waiting = {"done", "fence"}
        while waiting:
            stream, item = self.next()
            if isinstance(item, bytes):
                if stream == "out":
                    outcome.stdout += item
                else:
                    outcome.stderr += item
            elif item.id == outcome.id:
                outcome.frames.append(item)
                waiting.discard(item.kind)
                if item.kind == "input" and left:
                    answer = left.pop(0)
                    if answer is None:
                        self.send("eof", outcome.id)
                    else:
                        self.send("input", outcome.id, answer)
            if when is not None and when(outcome):
                when = None
        return outcome

    def ask(self, op: str, code: str, cursor: int | None = None) -> Frame:
        """``complete`` or ``inspect``."""
        ident = self.new_id()
        self.send(op, ident, f"{len(code) if cursor is None else cursor}\n{code}")
        return self.wait_for({"complete": "completions", "inspect": "inspection"}[op], ident)

    def wait_for(self, kind: str, ident: str | None = None) -> Frame:
        seen: list[bytes | Frame] = []
        while True:
            _, item = self.next(seen)
            if isinstance(item, Frame) and item.kind == kind and ident in {None, item.id}:
                return item
            seen.append(item)

    def next(self, seen: list[Any] | None = None) -> tuple[str, bytes | Frame]:
        try:
            stream, item = self._items.get(timeout=PATIENCE_S)
        except queue.Empty as exc:
            raise TimeoutError(f"the driver says nothing; before: {seen}") from exc
        if item == b"":
            raise EOFError(f"the driver closed its std{stream}; before: {seen}")
        return stream, item

    def _read(self, stream: IO[bytes], name: str) -> None:
        mark = b"\x1e" + self.nonce.encode() + b" "
        data = b""
        while True:
            more = stream.read1(65536)  # type: ignore[attr-defined]
            data += more
            data = self._split(data, mark, name, last=not more)
            if not more:
                self._items.put((name, b""))
                return

    def _split(self, data: bytes, mark: bytes, name: str, *, last: bool) -> bytes:
        """Hands on what is complete; what is left."""
        while data:
            start = data.find(mark)
            if start < 0:
                keep = 0 if last else next(
                    (n for n in range(min(len(mark), len(data)), 0, -1) if data.endswith(mark[:n])),
                    0,
                )  # fmt: skip
                if data[: len(data) - keep]:
                    self._items.put((name, data[: len(data) - keep]))
                return data[len(data) - keep :]
            if start:
                self._items.put((name, data[:start]))
                data = data[start:]
            header, newline, rest = data[len(mark) :].partition(b"\n")
            if not newline:
                return data
            kind, ident, arg, length = header.decode().split(" ")
            if len(rest) <= int(length):
                return data
            assert rest[int(length) : int(length) + 1] == b"\n", "a frame ends with a newline"
            self._items.put((name, Frame(kind, ident, arg, rest[: int(length)])))
            data = rest[int(length) + 1 :]
        return b""
