"""Driver of cells over the image's own ipykernel, for whoever wants its magics and displays.

Started with ``python3 -c``; needs ``ipykernel`` in the image, which brings ``jupyter_client``. The
kernel is a child of ours, reached over Unix sockets in a folder that only we can enter.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import zmq
from jupyter_client import BlockingKernelClient, KernelManager

READY_S: Final = 60
END_OF_INPUT: Final = "\x04"
"""An answer that ipykernel takes for none."""
METADATA: Final = "application/vnd.madang.metadata+json"
_BINARY: Final = re.compile(r"(?:image/(?!svg)|audio/|video/|application/(?:pdf|octet-stream))")
_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
_LINE: Final = re.compile(r"(?:Cell )?In ?\[\d+\], line (\d+)")
_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")


class Out:
    """Our stdout: frames, and the cell's text between them."""

    def __init__(self, nonce: str) -> None:
        self._mark: Final = f"\x1e{nonce} "

    def text(self, fd: int, text: str) -> None:
        _write(fd, text.encode("utf-8", "replace"))

    def frame(self, kind: str, cell: str, arg: str, payload: str | bytes = b"") -> None:
        data = payload.encode("utf-8", "replace") if isinstance(payload, str) else payload
        head = f"{self._mark}{kind} {cell} {arg or '-'} {len(data)}\n"
        _write(1, head.encode() + data + b"\n")

    def fence(self, cell: str) -> None:
        """On stderr: all that the cell wrote there stands before it."""
        _write(2, f"{self._mark}fence {cell} - 0\n\n".encode())


class Driver:
    """One kernel, asked by our stdin."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient, out: Out) -> None:
        self._manager: Final = manager
        self._client: Final = client
        self._out: Final = out
        self._input = b""
        self._asked: Final[dict[str, tuple[str, str]]] = {}
        """Message → what was asked, and for which id."""
        self._began: Final[dict[str, tuple[float, float]]] = {}
        """Running cell's message → clock and CPU time at its beginning."""
        self._replies: Final[dict[str, dict[str, Any]]] = {}
        self._idle: Final[set[str]] = set()
        self._asks = False

    def serve(self) -> None:
        """Until ``quit``, the end of our input, or the kernel's end."""
        channels = {
            self._client.iopub_channel: self._published,
            self._client.shell_channel: self._replied,
            self._client.stdin_channel: self._wants_input,
        }
        poller = zmq.Poller()
        poller.register(0, zmq.POLLIN)
        for channel in channels:
            poller.register(channel.socket, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(1000))
            if not ready and not self._manager.is_alive():
                sys.exit("madang: ipykernel has ended")
            for channel, take in channels.items():
                while channel.socket in ready and channel.msg_ready():
                    take(channel.get_msg())
            if 0 in ready and not self._read():
                return

    def interrupt(self) -> None:
        self._manager.interrupt_kernel()

    # From the manager

    def _read(self) -> bool:
        data = os.read(0, 1 << 16)
        self._input += data
        for op, cell, text in self._requests():
            if op == "quit":
                return False
            self._do(op, cell, text)
        return bool(data)

    def _requests(self) -> Iterator[tuple[str, str, str]]:
        while (end := self._input.find(b"\n")) >= 0:
            op, cell, length = self._input[:end].decode().split(" ")
            stop = end + 1 + int(length)
            if len(self._input) < stop:
                return
            text = self._input[end + 1 : stop].decode("utf-8", "replace")
            self._input = self._input[stop:]
            yield op, cell, text

    def _do(self, op: str, cell: str, text: str) -> None:
        if op == "run":
            message = self._client.execute(text, allow_stdin=True, stop_on_error=False)
            self._asked[message] = ("run", cell)
        elif op in {"input", "eof"} and self._asks:
            self._asks = False
            self._client.input(text if op == "input" else END_OF_INPUT)
        elif op in {"complete", "inspect"}:
            cursor, _, code = text.partition("\n")
            message = getattr(self._client, op)(code, int(cursor))
            self._asked[message] = (op, cell)

    # From the kernel

    def _published(self, message: Mapping[str, Any]) -> None:
        parent = message["parent_header"].get("msg_id", "")
        op, cell = self._asked.get(parent, ("", ""))
        content, kind = message["content"], message["msg_type"]
        if kind == "stream":
            self._out.text(1 if content["name"] == "stdout" else 2, content["text"])
        elif op != "run":
            return
        elif kind == "status" and content["execution_state"] == "busy":
            self._began[parent] = (time.monotonic(), self._cpu_s())
            self._out.frame("begin", cell, "")
        elif kind == "status" and content["execution_state"] == "idle":
            self._idle.add(parent)
            self._finish(parent)
        elif kind in {"display_data", "execute_result", "update_display_data"}:
            self._show(kind, cell, content)
        elif kind == "clear_output":
            self._out.frame("clear", cell, "wait" if content.get("wait") else "now")
        elif kind == "error":
            self._fail(cell, content)

    def _show(self, kind: str, cell: str, content: Mapping[str, Any]) -> None:
        data = dict(content["data"])
        if content.get("metadata"):
            data = {METADATA: content["metadata"], **data}
        parts = [(mime, _bytes(mime, value)) for mime, value in data.items()]
        for mime, payload in parts[:-1]:
            self._out.frame("part", cell, mime, payload)
        mime, payload = parts[-1] if parts else ("text/plain", b"")
        if display := str(content.get("transient", {}).get("display_id") or ""):
            mime += f";display={re.sub(r'[^!-~]', '_', display)}"
        frame = {"display_data": "display", "execute_result": "result"}.get(kind, "update")
        self._out.frame(frame, cell, mime, payload)

    def _fail(self, cell: str, content: Mapping[str, Any]) -> None:
        traceback = "\n".join(content["traceback"])
        lines = _LINE.findall(_ANSI.sub("", traceback))
        text = " ".join(str(content["evalue"]).splitlines())
        line = lines[-1] if lines else ""
        self._out.frame("error", cell, line, f"{content['ename']}\n{text}\n{traceback}")

    def _wants_input(self, message: Mapping[str, Any]) -> None:
        _, cell = self._asked.get(message["parent_header"].get("msg_id", ""), ("", "-"))
        content = message["content"]
        self._asks = True
        how = "password" if content.get("password") else "prompt"
        self._out.frame("input", cell, how, content.get("prompt", ""))

    def _replied(self, message: Mapping[str, Any]) -> None:
        parent = message["parent_header"].get("msg_id", "")
        op, cell = self._asked.get(parent, ("", ""))
        content = message["content"]
        if op == "run":
            self._replies[parent] = content
            self._finish(parent)
        elif op:
            del self._asked[parent]
            self._tell(op, cell, content)

    def _tell(self, op: str, cell: str, content: Mapping[str, Any]) -> None:
        if op == "complete":
            place = f"{content.get('cursor_start', 0)},{content.get('cursor_end', 0)}"
            self._out.frame("completions", cell, place, "\n".join(content.get("matches", [])))
        else:
            text = content.get("data", {}).get("text/plain", "")
            found = "found" if content.get("found") else "none"
            self._out.frame("inspection", cell, found, _ANSI.sub("", text))

    def _finish(self, parent: str) -> None:
        """Once both the reply and the last output are there."""
        if parent not in self._replies or parent not in self._idle:
            return
        reply, (_, cell) = self._replies.pop(parent), self._asked.pop(parent)
        self._idle.discard(parent)
        began, cpu_s = self._began.pop(parent, (time.monotonic(), self._cpu_s()))
        took = {
            "wall_us": int((time.monotonic() - began) * 1e6),
            "cpu_us": int((self._cpu_s() - cpu_s) * 1e6),
            "mem_bytes": self._mem_bytes(),
        }
        self._out.fence(cell)
        told = "\n".join(f"{name}={value}" for name, value in took.items())
        self._out.frame("done", cell, "ok" if reply["status"] == "ok" else "error", told)

    def _pid(self) -> int:
        return int(getattr(self._manager.provisioner, "pid", 0) or 0)

    def _cpu_s(self) -> float:
        try:
            with open(f"/proc/{self._pid()}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) * _TICK_S

    def _mem_bytes(self) -> int:
        try:
            with open(f"/proc/{self._pid()}/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0


def _bytes(mime: str, value: Any) -> bytes:
    if not isinstance(value, str):
        return json.dumps(value).encode()
    if _BINARY.match(mime):
        with contextlib.suppress(ValueError):
            return base64.b64decode(value)
    return value.encode("utf-8", "replace")


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def main() -> None:
    out = Out(os.environ.pop("MADANG_NONCE"))
    os.environ.pop("DRIVER", None)
    folder = tempfile.mkdtemp(prefix="ipykernel-")
    manager = KernelManager(
        transport="ipc", ip=os.path.join(folder, "k"), connection_file=os.path.join(folder, "c")
    )
    try:
        manager.start_kernel(stdin=-3, stdout=-3)  # -3: subprocess.DEVNULL
        client = manager.client()
        driver = Driver(manager, client, out)
        signal.signal(signal.SIGINT, lambda *_: driver.interrupt())
        client.start_channels(hb=False)
        client.wait_for_ready(timeout=READY_S)
        info = client.kernel_info(reply=True, timeout=READY_S)["content"]["language_info"]
        out.frame("ready", "-", "", info["version"])
        driver.serve()
    finally:
        manager.shutdown_kernel(now=True)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
