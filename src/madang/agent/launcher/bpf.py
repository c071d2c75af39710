"""bpf(2) from Python: maps, a ring buffer, programs, and their assembler.

Instructions are written by hand (``Code``): nothing is compiled on a node, no library is needed.
Each call raises OSError like ``os`` does. Kernel 5.12 or newer; root of the machine.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Iterator
from functools import cache
from typing import Final

from madang.agent.launcher import syscalls

ARRAY, LPM_TRIE, RINGBUF = 2, 11, 27
"""Kinds of maps."""
SOCK, RAW_TRACEPOINT, SOCK_ADDR = 9, 17, 18
"""Kinds of programs."""
SOCK_CREATE, BIND4, BIND6, CONNECT4, CONNECT6, SENDMSG4, SENDMSG6 = 2, 8, 9, 10, 11, 14, 15
"""Where a program is attached."""
LOOKUP, GET_PID, GET_CGROUP, RINGBUF_OUTPUT, SET_RETVAL = 1, 14, 80, 130, 187
"""Functions of the kernel's that a program calls."""

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _PROG_LOAD, _ATTACH, _DETACH = 0, 1, 2, 5, 8, 9
_FD_BY_ID, _INFO, _QUERY, _TRACE = 13, 15, 16, 17
_NO_PREALLOC: Final = 1
_MULTI, _REPLACE = 2, 4
_ATTR_BYTES: Final = 160
_LOG_BYTES: Final = 64 * 1024
_MAX_ATTACHED: Final = 64
_WORD: Final = 0xFFFF_FFFF
_NUMBERS: Final = {"x86_64": 321, "aarch64": 280}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _bpf(command: int, layout: str, *fields: int | bytes) -> tuple[int, bytes]:
    """The result, and the attributes as the kernel left them."""
    attr = _attr(layout, *fields)
    result = _libc.syscall(_number(), command, attr, _ATTR_BYTES)
    return syscalls.check(result, "bpf"), attr.raw


def _attr(layout: str, *fields: int | bytes) -> ctypes.Array[ctypes.c_char]:
    data = struct.pack(f"={layout}", *fields)
    return ctypes.create_string_buffer(data + bytes(_ATTR_BYTES - len(data)), _ATTR_BYTES)


@cache
def _number() -> int:
    return _NUMBERS[os.uname().machine]


class Map:
    """One map. A program that uses it keeps it alive after ``close``."""

    def __init__(self, kind: int, key_bytes: int, value_bytes: int, entries: int) -> None:
        flags = _NO_PREALLOC if kind == LPM_TRIE else 0
        fields = (kind, key_bytes, value_bytes, entries, flags, 0, 0, b"madang")
        self.fd, _ = _bpf(_MAP_CREATE, "7I16s", *fields)
        self._key = ctypes.create_string_buffer(key_bytes)
        self._value = ctypes.create_string_buffer(value_bytes)
        where = (ctypes.addressof(self._key), ctypes.addressof(self._value))
        self._attr = _attr("IIQQQ", self.fd, 0, *where, 0)

    def put(self, key: bytes, value: bytes) -> None:
        self._key.raw, self._value.raw = key, value
        self._call(_MAP_UPDATE)

    def get(self, key: bytes) -> bytes:
        self._key.raw = key
        self._call(_MAP_LOOKUP)
        return self._value.raw

    def _call(self, command: int) -> None:
        """Thousands of times for some rules: nothing is made anew."""
        syscalls.check(_libc.syscall(_number(), command, self._attr, _ATTR_BYTES), "bpf")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Ring(Map):
    """What programs tell us. Its descriptor can be read from when there is news."""

    _HEADER: Final = 8
    _BUSY, _DISCARDED = 1 << 31, 1 << 30

    def __init__(self, size_bytes: int) -> None:
        """*size_bytes*: a power of two, of whole pages. What doesn't fit is dropped."""
        super().__init__(RINGBUF, 0, 0, size_bytes)
        self._size, page = size_bytes, mmap.PAGESIZE
        self._ours = mmap.mmap(self.fd, page)
        self._theirs = mmap.mmap(self.fd, page + 2 * size_bytes, prot=mmap.PROT_READ, offset=page)

    def read(self) -> Iterator[bytes]:
        """Records that are complete; each is gone once the next is asked for."""
        place: int = struct.unpack_from("=Q", self._ours, 0)[0]
        while place < struct.unpack_from("=Q", self._theirs, 0)[0]:
            start = mmap.PAGESIZE + place % self._size
            head: int = struct.unpack_from("=I", self._theirs, start)[0]
            if head & self._BUSY:
                return
            length = head & ~self._DISCARDED
            if not head & self._DISCARDED:
                yield self._theirs[start + self._HEADER : start + self._HEADER + length]
            place += (self._HEADER + length + 7) & ~7
            struct.pack_into("=Q", self._ours, 0, place)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()
        super().close()


class Code:
    """Instructions in their order. Registers are numbers: 0 the result, 1 to 5 the arguments of a
    call (gone after it), 6 to 9 kept, 10 the stack's end. Jumps go forward, to a name.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[int, int, int, int, int]] = []
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []

    def _emit(self, op: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> None:
        self._parts.append((op, to, source, offset, value))

    def move(self, to: int, source: int) -> None:
        self._emit(0xBF, to, source)

    def set(self, to: int, value: int) -> None:
        self._emit(0xB7, to, value=value)

    def set64(self, to: int, value: int) -> None:
        self._emit(0x18, to, value=value)
        self._emit(0, value=value >> 32)

    def stack(self, to: int, offset: int) -> None:
        """The address of the stack's byte *offset* (below 0)."""
        self.move(to, 10)
        self._emit(0x07, to, value=offset)

    def load64(self, to: int, source: int, offset: int) -> None:
        self._emit(0x79, to, source, offset)

    def load32(self, to: int, source: int, offset: int) -> None:
        self._emit(0x61, to, source, offset)

    def load16(self, to: int, source: int, offset: int) -> None:
        self._emit(0x69, to, source, offset)

    def store64(self, offset: int, source: int) -> None:
        self._emit(0x7B, 10, source, offset)

    def store32(self, offset: int, source: int) -> None:
        self._emit(0x63, 10, source, offset)

    def store16(self, offset: int, source: int) -> None:
        self._emit(0x6B, 10, source, offset)

    def put32(self, offset: int, value: int) -> None:
        self._emit(0x62, 10, 0, offset, value)

    def put16(self, offset: int, value: int) -> None:
        self._emit(0x6A, 10, 0, offset, value)

    def put64(self, to: int, value: int) -> None:
        """Where *to* points at."""
        self._emit(0x7A, to, value=value)

    def add_atomically(self, to: int, source: int) -> None:
        """To the 64 bits that *to* points at."""
        self._emit(0xDB, to, source)

    def map(self, to: int, found: Map) -> None:
        self._emit(0x18, to, 1, 0, found.fd)
        self._emit(0)

    def call(self, function: int) -> None:
        self._emit(0x85, value=function)

    def if_equal(self, register: int, value: int, label: str) -> None:
        self._jumps.append((len(self._parts), label))
        self._emit(0x15, register, value=value)

    def if_same(self, register: int, other: int, label: str) -> None:
        self._jumps.append((len(self._parts), label))
        self._emit(0x1D, register, other)

    def label(self, name: str) -> None:
        self._labels[name] = len(self._parts)

    def leave(self, result: int) -> None:
        self.set(0, result)
        self._emit(0x95)

    def bytes(self) -> bytes:
        jumps = {at: self._labels[name] - at - 1 for at, name in self._jumps}
        return b"".join(
            struct.pack("=BBhI", op, to | source << 4, jumps.get(at, offset), value & _WORD)
            for at, (op, to, source, offset, value) in enumerate(self._parts)
        )


def load(kind: int, place: int, code: bytes, name: str) -> int:
    """A descriptor of the program. The verifier's last words are in the error's text."""
    text, licence = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(_LOG_BYTES)
    begin = (kind, len(code) // 8, ctypes.addressof(text), ctypes.addressof(licence))
    rest = (0, 0, name.encode()[:15], 0, place)
    layout = "IIQQIIQII16sII"
    try:
        return _bpf(_PROG_LOAD, layout, *begin, 0, 0, 0, *rest)[0]
    except OSError as exc:
        if exc.errno not in {errno.EINVAL, errno.EACCES}:
            raise
    try:
        return _bpf(_PROG_LOAD, layout, *begin, 1, _LOG_BYTES, ctypes.addressof(log), *rest)[0]
    except OSError as exc:
        words = log.value.decode("ascii", "replace").strip().splitlines()[-3:]
        raise OSError(exc.errno, f"{exc.strerror}: {'; '.join(words)}") from exc


def attach(group: int, program: int, place: int, former: int | None = None) -> None:
    """To the group, for all that is in it or will be; in *former*'s place at once, if given.

    It stays when we are gone, until the group is removed.
    """
    if former is None:
        _bpf(_ATTACH, "5I", group, program, place, _MULTI, 0)
    else:
        _bpf(_ATTACH, "5I", group, program, place, _MULTI | _REPLACE, former)


def detach(group: int, program: int, place: int) -> None:
    _bpf(_DETACH, "3I", group, program, place)


def attached(group: int, place: int) -> list[int]:
    """Descriptors of the programs that are attached to the group itself."""
    ids = (ctypes.c_uint32 * _MAX_ATTACHED)()
    where = ctypes.addressof(ids)
    _, attr = _bpf(_QUERY, "IIIIQI", group, place, 0, 0, where, _MAX_ATTACHED)
    count = struct.unpack_from("=I", attr, 24)[0]
    return [_bpf(_FD_BY_ID, "I", number)[0] for number in ids[:count]]


def trace(event: str, program: int) -> int:
    """Run the program at each *event* of the machine, until the descriptor is closed."""
    name = ctypes.create_string_buffer(event.encode())
    return _bpf(_TRACE, "QI", ctypes.addressof(name), program)[0]
