"""The link between manager and agent: two message queues and bulk streams.

On one machine both ends live in one process (``kit.link.memory_link``); between machines the same
messages travel as msgpack over WebSockets. A message may be lost with its connection; after a
reconnect the agent says Hello again and the manager answers with the full desired state.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from madang.wire.kernel import Desired, ExecSpec, Hello, KernelId, Reports
from madang.wire.log import LogGap, LogRecord
from madang.wire.policy import Refusal
from madang.wire.session import Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLog:
    """Output of a kernel, or of one exec in it.

    Answer: LogRecord, LogGap and, if ``follow`` and the process has ended, one Ended last.
    """

    kernel: KernelId
    exec_id: str | None = None
    offset: int = 0
    tail_bytes: int | None = None
    """Start so that about this much data remains, at a record's beginning."""
    since_us: int | None = None
    follow: bool = False
    refusals: bool = False
    """With ``follow``, of the main program: also a Refusal as soon as a rule refuses anything new.
    """
    visit: bool = True
    """With ``follow``, whether somebody is there: a session that is visited is not idle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRefusals:
    """What the sandbox policy refused a kernel. Answer: Refusal each, oldest first."""

    kernel: KernelId


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """stdin of a kernel or exec.

    Sent: bytes, Resize, Signal, StdinEnd. Answer: nothing, then the end.
    """

    kernel: KernelId
    exec_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StartExec:
    """Start one more program. Answer: ExecStarted; output by ReadLog, stdin by Attach."""

    kernel: KernelId
    spec: ExecSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SendSignal:
    """A signal to the main program's (or an exec's) process group.

    Answer: nothing, then the end.
    """

    kernel: KernelId
    exec_id: str | None = None
    signal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ListFiles:
    """Entries of a folder in a kernel. Answer: FileEntry each. ``path`` as in ``wire.paths``."""

    kernel: KernelId
    path: str
    recursive: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTar:
    """A file or folder as a tar stream (PAX, names as bytes). Answer: bytes."""

    kernel: KernelId
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteTar:
    """Unpack a tar stream below ``path``. Sent: bytes, then end. Answer: FilesWritten."""

    kernel: KernelId
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFile:
    """One file's bytes, from ``start``. Answer: FileEntry, then bytes."""

    kernel: KernelId
    path: str
    start: int = 0
    length: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteFile:
    """Replace one file, atomically. Sent: bytes, then end. Answer: FilesWritten."""

    kernel: KernelId
    path: str
    mode: int = 0o644


@dataclass(frozen=True, slots=True, kw_only=True)
class StatFile:
    """What a path leads to, links followed. Answer: FileEntry."""

    kernel: KernelId
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeFolder:
    """A folder with its parents; no error if it is there. Answer: FilesWritten."""

    kernel: KernelId
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveFile:
    """Give a file, link or folder another path, which must be free. Answer: FilesWritten."""

    kernel: KernelId
    path: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveFile:
    """A file, a link, or a folder with all that is in it. Answer: FilesWritten."""

    kernel: KernelId
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveLayer:
    """Keep what a kernel changed in its root as a layer; the answer is a LayerSaved.

    Also of one that has ended. Conflict if it has no root of its own, BuildFailed if it is no
    layer: too large, for one.
    """

    kernel: KernelId
    limit_bytes: int


FileRequest = (
    ListFiles
    | ReadTar
    | WriteTar
    | ReadFile
    | WriteFile
    | StatFile
    | MakeFolder
    | MoveFile
    | RemoveFile
)
StreamRequest = ReadLog | ReadRefusals | Attach | StartExec | SendSignal | FileRequest | SaveLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    path: str
    """Relative to the folder that was asked for; see ``wire.paths``."""
    kind: str
    """``file``, ``dir``, ``link``, ``other``"""
    size_bytes: int
    mode: int
    modified_at: float
    target: str | None = None
    """Where a symbolic link points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesWritten:
    files: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecStarted:
    exec_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSaved:
    """It lies on the node."""

    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resize:
    rows: int
    cols: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    signal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StdinEnd:
    pass


StreamItem = (
    bytes
    | LogRecord
    | LogGap
    | Ended
    | FileEntry
    | FilesWritten
    | ExecStarted
    | Resize
    | Signal
    | StdinEnd
    | Refusal
    | LayerSaved
)


class BulkStream(Protocol):
    """One bulk stream; both ends see the same face. Bounded: ``send`` waits for the reader."""

    async def send(self, item: StreamItem) -> None:
        """Hand over one item; raises ConnectionError once the other end has gone."""
        ...

    async def end(self) -> None:
        """Nothing more will be sent from this end; the other may still send."""
        ...

    async def fail(self, error: Exception) -> None:
        """End with an error: the other end's iteration raises it."""
        ...

    def __aiter__(self) -> AsyncIterator[StreamItem]:
        """What the other end sends, until its end."""
        ...

    async def close(self) -> None:
        """Give the stream up at once, both directions; idempotent."""
        ...


class ManagerEnd(Protocol):
    """The manager's end of one agent's link."""

    async def send(self, message: Desired) -> None: ...

    async def receive(self) -> Hello | Reports:
        """The agent's next message; raises ConnectionError at the end of the link."""
        ...

    async def open(self, request: StreamRequest) -> BulkStream: ...

    async def close(self) -> None: ...


class AgentEnd(Protocol):
    """The agent's end."""

    async def send(self, message: Hello | Reports) -> None: ...

    async def receive(self) -> Desired: ...

    async def accept(self) -> tuple[StreamRequest, BulkStream]: ...

    async def close(self) -> None: ...


class BlobSource(Protocol):
    """Where an agent gets the files of a working directory (content-addressed, SHA-256 hex)."""

    async def fetch(self, digest: str) -> str:
        """Path of a local, complete, read-only file; WorkspaceIncomplete if there is none."""
        ...
