"""``keeper.sock``: what the agent says to a keeper, and is told.

The first line of a connection is JSON and names the operation:

=====================================  ==========================================================
``{"op": "watch"}``                    lines ``{"end": OFFSET}``; ``{"stopping": true}`` once it is
                                       to end, also for its time limit: who froze it must thaw it;
                                       ``{"refusals": N}``: N grows when its policy has refused
                                       something, which stands in ``io/main/refusals``;
                                       the last one ``{"ended": true}``
``{"op": "stdin"}``                    then frames: kind u8, length u32 LE, payload. 0 data, 1 end
                                       of input, 2 resize (rows u16, cols u16), 3 signal (u8)
``{"op": "signal", "signal": N}``      ``{"ok": true}``
``{"op": "stop", "reason": …,
"text": …, "grace_s": …}``             ``{"ok": true}``; again with a shorter grace: sooner
``{"op": "exec", "exec": ID,
"spec": {…}}``                         ``{"ok": true, "at": …}`` once it runs (main's socket only)
``{"op": "guard"}``                    ``{"ok": true}``; of root alone, with a channel to a guard
=====================================  ==========================================================

A refused line is answered by ``{"error": CODE, "text": …}``. A slow watcher misses offsets, never
the newest; slow programs make ``stdin`` wait by not reading it.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any, Final

from madang.wire.errors import InvalidRequest, PlatformError

MAX_LINE: Final = 4 * 1024 * 1024
MAX_PAYLOAD: Final = 1024 * 1024
_FRAME: Final = struct.Struct("<BI")
_RESIZE: Final = struct.Struct("<HH")

DATA, END, RESIZE, SIGNAL = range(4)


class Client:
    """One connection; non-blocking."""

    def __init__(self, link: socket.socket) -> None:
        link.setblocking(False)
        self.link = link
        self.watching = False
        self.feeding = False
        self.told_end = -1
        self.attached: list[int] = []
        """Descriptors that came with what was read; at most one, of root alone."""
        self._in = bytearray()
        self._out = bytearray()

    def read(self) -> bool:
        """Take in what is there; False once the peer is gone or says too much."""
        try:
            data, fds, _, _ = socket.recv_fds(self.link, 256 * 1024, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._in += data
        self._attach(fds)
        return bool(data) and len(self._in) <= MAX_LINE + MAX_PAYLOAD

    def _attach(self, fds: list[int]) -> None:
        room = not self.attached and self.peer_is_root
        for fd in fds:
            if room:
                self.attached = [fd]
            else:
                os.close(fd)

    @property
    def peer_is_root(self) -> bool:
        data = self.link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        uid: int = struct.unpack("iII", data)[1]
        return uid == 0

    def close(self) -> None:
        self.link.close()
        for fd in self.attached:
            os.close(fd)
        self.attached = []

    def lines(self) -> Iterator[dict[str, Any]]:
        """Requests that are complete, until one of them starts ``stdin``."""
        while not self.feeding and (end := self._in.find(b"\n")) >= 0:
            line = bytes(self._in[:end])
            del self._in[: end + 1]
            yield _parse(line)

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Frames that are complete. Raises InvalidRequest on garbage."""
        while len(self._in) >= _FRAME.size:
            kind, length = _FRAME.unpack_from(self._in)
            if kind > SIGNAL or length > MAX_PAYLOAD:
                raise InvalidRequest(f"stdin: frame of kind {kind} and {length} bytes.")
            end = _FRAME.size + length
            if len(self._in) < end:
                return
            payload = bytes(self._in[_FRAME.size : end])
            del self._in[:end]
            yield kind, payload

    def tell(self, message: dict[str, Any]) -> None:
        self._out += json.dumps(message).encode() + b"\n"
        self.flush()

    def tell_end(self, end: int) -> None:
        """Tell a watcher the newest offset, unless it is behind already."""
        if end > self.told_end and not self._out:
            self.told_end = end
            self.tell({"end": end})

    def tell_refusals(self, number: int) -> None:
        """Not to a watcher that is behind: it reads them when it has caught up."""
        if number and not self._out:
            self.tell({"refusals": number})

    def refuse(self, error: PlatformError) -> None:
        self.tell({"error": error.code, "text": error.text})

    def flush(self) -> bool:
        """Send what fits; whether nothing is left."""
        try:
            while self._out:
                del self._out[: self.link.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()
        return not self._out

    @property
    def waiting(self) -> bool:
        """Whether there is something to send yet."""
        return bool(self._out)


def resize(payload: bytes) -> tuple[int, int]:
    """(rows, columns)"""
    if len(payload) != _RESIZE.size:
        raise InvalidRequest("stdin: a resize has rows and columns, 4 bytes.")
    rows, cols = _RESIZE.unpack(payload)
    return rows, cols


def signal_number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64:
        raise InvalidRequest(f"signal: {str(value)[:20]!r} must be a number from 1 to 64.")
    return value


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest("the line is no JSON.") from exc
    if not isinstance(message, dict):
        raise InvalidRequest("the line is no JSON object.")
    return message
