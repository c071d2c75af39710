"""Sizes: how much CPU, memory, processes, disk and time a session may use."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from madang.wire.errors import SizeInvalid

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

MIN_MEM_BYTES: Final = 16 * MIB
"""Below this no interpreter starts."""
MIN_CPU: Final = 0.01
MIN_PIDS: Final = 4
MIN_DISK_BYTES: Final = 4 * MIB

_UNITS: Final = {
    "": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1024 * GIB, "p": 1024 * 1024 * GIB,
}  # fmt: skip
_SPANS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([kmgtp]?)(?:i?b)?", re.IGNORECASE)
_SPAN: Final = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{1,6})?[smhd]?)+", re.IGNORECASE)
_SPAN_PART: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([smhd]?)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a session gets, exactly; hard limits."""

    cpu: float
    """Cores; 0.5 is half of one."""
    mem_bytes: int
    pids: int
    """Processes and threads at once."""
    disk_bytes: int
    """Of the session's writable folders together."""
    time_s: float | None = None
    """Seconds from RUNNING until the session is stopped; None: no limit."""


def check(size: Size) -> Size:
    """Return *size* if each field makes sense, else raise SizeInvalid naming the field."""
    rules = (
        ("cpu", size.cpu, MIN_CPU, 1e5),
        ("mem", size.mem_bytes, MIN_MEM_BYTES, 1e17),
        ("pids", size.pids, MIN_PIDS, 1e7),
        ("disk", size.disk_bytes, MIN_DISK_BYTES, 1e18),
        ("time", 1.0 if size.time_s is None else size.time_s, 0.1, 1e9),
    )
    for name, value, low, high in rules:
        if not (math.isfinite(value) and low <= value <= high):
            shown = _show_bytes if name in {"mem", "disk"} else "{:g}".format
            bound = f"least is {shown(low)}" if value < low else f"most is {shown(high)}"
            text = f"{name}: {shown(value)} makes no sense; the {bound}."
            raise SizeInvalid(text, field=name)
    return size


def _show_bytes(value: float) -> str:
    return format_bytes(int(value)) if math.isfinite(value) else f"{value:g}"


def parse_cpu(text: str) -> float:
    """``0.5``, ``2``, ``500m`` (thousandths) as cores."""
    raw = text.strip().lower()
    scale = 1.0
    if raw.endswith("m"):
        raw, scale = raw[:-1], 0.001
    try:
        value = float(raw) * scale
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        raise SizeInvalid(f"cpu: {text!r} is not a number of cores above zero (like 0.5 or 2).")
    return value


def parse_bytes(text: str, *, field: str = "size") -> int:
    """``512m``, ``2GiB``, ``1048576`` as bytes; all units are powers of 1024."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise SizeInvalid(f"{field}: {text!r} is not a size (like 512m or 2g).", field=field)
    value = round(float(match[1]) * _UNITS[match[2].lower()])
    if not 0 < value <= 10**18:
        raise SizeInvalid(f"{field}: {text!r} is out of range.", field=field)
    return value


def parse_duration(text: str, *, field: str = "time") -> float:
    """``90``, ``90s``, ``2h30m``, ``1.5d`` as seconds."""
    raw = text.strip()
    if not _SPAN.fullmatch(raw):
        raise SizeInvalid(f"{field}: {text!r} is not a duration (like 90s or 2h30m).", field=field)
    value = sum(float(n) * _SPANS[unit.lower()] for n, unit in _SPAN_PART.findall(raw))
    if not 0 < value <= 1e9:
        raise SizeInvalid(f"{field}: {text!r} is out of range.", field=field)
    return value


def format_bytes(count: int) -> str:
    """``1536`` → ``1.5 KiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
        value /= 1024
    return f"{count} B"


def format_duration(seconds: float) -> str:
    """``0.0123`` → ``12 ms``, ``75`` → ``1m15s``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    parts = ((days, "d"), (hours, "h"), (minutes, "m"), (secs, "s"))
    return "".join(f"{n}{u}" for n, u in parts if n) or "0s"
