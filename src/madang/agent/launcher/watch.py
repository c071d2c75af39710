"""Which system calls the programs of a session make: a program in the kernel writes them down.

It is run at each system call of the machine, looks whether the caller is in the session's control
group (of version 2), and sets the number's entry in a table. It sees what the filters have let pass
alone, decides nothing, and nothing waits for it. While anybody is watched, all system calls of the
machine take the kernel's longer way; so this is for learning.
"""

from __future__ import annotations

import contextlib
import os
import platform
import struct
from typing import Final

from madang.agent.launcher import bpf
from madang.agent.launcher.bpf import Code, Map
from madang.agent.launcher.cgroups import Group
from madang.wire.errors import PolicyUnkept
from madang.wire.syscalls import numbers

TAKES: Final = "writing calls down takes root, control groups of version 2 and a kernel with BPF"
PERIOD_S: Final = 1.0
"""How often the table is read."""
_EVENT: Final = "sys_enter"
_ENTRIES: Final = 1024
_NUMBER: Final = 8
"""Where it lies in what the program is given: after the registers."""
_SEEN: Final = struct.pack("=Q", 1)


class Watch:
    """Of one control group, until it is closed."""

    def __init__(self, group: int) -> None:
        """*group*: the number of its folder. Raises OSError."""
        self._names = {number: name for name, number in numbers(platform.machine()).items()}
        self._unseen = set(self._names)
        self._table = Map(bpf.ARRAY, 4, 8, _ENTRIES)
        self._event = -1
        try:
            program = _program(group, self._table)
            try:
                self._event = bpf.trace(_EVENT, program)
            finally:
                os.close(program)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, group: Group) -> Watch:
        """Raises PolicyUnkept, OSError."""
        folder = group.net_folder
        if folder is None:
            raise PolicyUnkept(f"system calls can't be written down here: {TAKES}.")
        return cls(os.stat(folder).st_ino)

    def read(self) -> list[str]:
        """Names of the calls that were made since it was read last, and never before."""
        found = [number for number in self._unseen if self._is_seen(number)]
        self._unseen.difference_update(found)
        return [self._names[number] for number in found]

    def _is_seen(self, number: int) -> bool:
        return self._table.get(struct.pack("=I", number)) == _SEEN

    def close(self) -> None:
        self._table.close()
        if self._event >= 0:
            os.close(self._event)
            self._event = -1


def possible() -> bool:
    """Whether this machine can do it; nothing is watched meanwhile."""
    with contextlib.suppress(OSError):
        table = Map(bpf.ARRAY, 4, 8, _ENTRIES)
        try:
            os.close(_program(0, table))
        finally:
            table.close()
        return True
    return False


def _program(group: int, table: Map) -> int:
    return bpf.load(bpf.RAW_TRACEPOINT, 0, _code(group, table), "madang_watch")


def _code(group: int, table: Map) -> bytes:
    number, key = 6, -4
    code = Code()
    code.load64(number, 1, _NUMBER)
    code.call(bpf.GET_CGROUP)
    code.set64(1, group)
    code.if_same(0, 1, "ours")
    code.leave(0)
    code.label("ours")
    code.store32(key, number)
    code.map(1, table)
    code.stack(2, key)
    code.call(bpf.LOOKUP)
    code.if_equal(0, 0, "unknown")
    code.put64(0, 1)
    code.label("unknown")
    code.leave(0)
    return code.bytes()
