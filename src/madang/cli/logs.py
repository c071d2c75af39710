"""``madang logs``."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

import click

from madang.cli.context import connect
from madang.cli.terminal import write_all
from madang.client.events import Output
from madang.kit.codec import to_json
from madang.wire.errors import SizeInvalid
from madang.wire.log import LogGap, LogRecord, Stream
from madang.wire.size import format_bytes, parse_bytes, parse_duration

_LINES_UNIT: Final = frozenset("0123456789")


@click.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on until the session has ended.")
@click.option("--since", metavar="TIME", help="Only the last while, like 5m.")
@click.option("--tail", metavar="N", help="Only the last N lines, or bytes with a unit (64k).")
@click.option("--stdout", "only", flag_value="stdout", help="Only what went to stdout.")
@click.option("--stderr", "only", flag_value="stderr", help="Only what went to stderr.")
@click.option("--timestamps", is_flag=True, help="The time (UTC) before each line.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each piece of output.")
def logs(
    name: str,
    follow: bool,
    since: str | None,
    tail: str | None,
    only: str | None,
    timestamps: bool,
    as_json: bool,
) -> None:
    """Print a session's output, stdout to stdout and stderr to stderr."""
    lines, tail_bytes = _parse_tail(tail)
    since_at = None if since is None else time.time() - parse_duration(since, field="since")
    wanted = {*Stream} if only is None else {Stream[only.upper()]}
    printer = _Printer(timestamps=timestamps, as_json=as_json)
    with connect() as client:
        if lines is None:
            output = client.logs(name, tail_bytes=tail_bytes, since=since_at, follow=follow)
            printer.show_all(output, wanted)
            return
        kept, end = _last_lines(client.logs(name, since=since_at), wanted, lines)
        printer.show_all(kept, wanted)
        if follow:
            printer.show_all(client.logs(name, offset=end, follow=True), wanted)


def _parse_tail(text: str | None) -> tuple[int | None, int | None]:
    """Lines, or bytes."""
    if text is None:
        return None, None
    if not text or not set(text) <= _LINES_UNIT:
        return None, parse_bytes(text, field="tail")
    if len(text) > 12:
        raise SizeInvalid(f"tail: {text!r} is out of range.", field="tail")
    return int(text), None


def _last_lines(
    output: Iterable[Output], wanted: set[Stream], lines: int
) -> tuple[list[LogRecord], int]:
    """The last *lines* lines of the wanted streams, and the offset after all of the output.

    Keeps no more than it may need: records before the last *lines* line ends go at once.
    """
    kept: deque[LogRecord] = deque()
    ends = end = 0
    for item in output:
        end = item.end
        if isinstance(item, LogGap) or item.stream not in wanted:
            continue
        kept.append(item)
        ends += item.data.count(b"\n")
        while kept and ends - kept[0].data.count(b"\n") > lines:
            ends -= kept.popleft().data.count(b"\n")
    return _cut(kept, lines), end


def _cut(kept: deque[LogRecord], lines: int) -> list[LogRecord]:
    """Exactly the last *lines* lines of *kept*; one that is not ended counts."""
    whole = b"".join(record.data for record in kept)
    surplus = whole.count(b"\n") + (not whole.endswith(b"\n") and bool(whole)) - lines
    cut: list[LogRecord] = []
    for record in kept:
        data = record.data
        while surplus > 0 and data:
            _, newline, data = data.partition(b"\n")
            surplus -= bool(newline)
        if data and lines:
            cut.append(LogRecord(record.offset, record.at_us, record.stream, data))
    return cut


class _Printer:
    def __init__(self, *, timestamps: bool, as_json: bool) -> None:
        self._timestamps = timestamps
        self._as_json = as_json
        self._at_line_start = dict.fromkeys(Stream, True)

    def show_all(self, output: Iterable[Output], wanted: set[Stream]) -> None:
        sys.stdout.flush()
        for item in output:
            if isinstance(item, LogGap):
                gap = format_bytes(item.end - item.start)
                sys.stderr.write(f"note   about {gap} of output are no longer kept\n")
            elif item.stream in wanted:
                self._show(item)

    def _show(self, record: LogRecord) -> None:
        if self._as_json:
            write_all(1, _as_json(record))
            return
        data = b"".join(self._stamped(record)) if self._timestamps else record.data
        write_all(2 if record.stream is Stream.STDERR else 1, data)

    def _stamped(self, record: LogRecord) -> Iterator[bytes]:
        seconds, micros = divmod(record.at_us, 1_000_000)
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        stamp = f"{text}.{micros // 1000:03d}Z ".encode()
        for line in record.data.splitlines(keepends=True):
            if self._at_line_start[record.stream]:
                yield stamp
            yield line
            self._at_line_start[record.stream] = line.endswith((b"\n", b"\r"))


def _as_json(record: LogRecord) -> bytes:
    """``text`` is for people; ``data`` (base64) appears where it is not UTF-8."""
    shown: dict[str, object] = {
        "at": record.at_us / 1e6,
        "offset": record.offset,
        "stream": record.stream.name.lower(),
        "text": record.data.decode("utf-8", "replace"),
    }
    try:
        record.data.decode("utf-8")
    except UnicodeDecodeError:
        shown["data"] = record.data
    return to_json(shown) + b"\n"
