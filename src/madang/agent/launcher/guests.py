"""Two programs for sessions whose kernel is gVisor's, of a few hundred bytes each.

They must be there in any image, do one thing, and not hear those whom they serve: they read no
file, no variable and no library, so they are written in the processor's instructions.

``gate`` puts a system call filter on and executes another program. In gVisor neither the init nor
runsc can install the session's filter in a program before it begins::

    gate PATH ARGUMENT...    becomes PATH, with these arguments (the first: the program's name)

``one`` is process 1. It signals what the init tells it to (8 bytes at its standard input: signal
and process, or minus its group, or -1), lets nothing that has ended and has no parent be left over,
and ends at the end of its input.
"""

from __future__ import annotations

import struct
from typing import Final

MACHINE: Final = "x86_64"
"""Whose instructions these are."""
_BASE: Final = 0x400000
_ELF: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_FILTER: Final = struct.Struct("<HxxxxxxQ")
_OFFSET: Final = struct.Struct("<i")
_INSTRUCTION_BYTES: Final = 8
_START: Final = _ELF.size + _SEGMENT.size
_EXECUTABLE, _X86_64, _LOAD, _READ_EXECUTE = 2, 62, 1, 5

_ORDER: Final = struct.Struct("<ii")
_WORDS: Final = b"madang: can't be executed: no such file, or its interpreter is missing\n"
_INSTALL: Final = bytes.fromhex(
    "bf26000000"  # mov edi, 38          PR_SET_NO_NEW_PRIVS
    "be01000000"  # mov esi, 1
    "31d2"  # xor edx, edx
    "4531d2"  # xor r10d, r10d
    "4531c0"  # xor r8d, r8d
    "b89d000000"  # mov eax, 157         prctl
    "0f05"  # syscall
    "bf01000000"  # mov edi, 1           SECCOMP_SET_MODE_FILTER
    "31f6"  # xor esi, esi
    "488d15"  # lea rdx, [rip+...]       the filter
)
_EXECUTE: Final = bytes.fromhex(
    "b83d010000"  # mov eax, 317         seccomp
    "0f05"  # syscall
    "85c0"  # test eax, eax
    "7532"  # jnz +50                    to the end
    "488b0c24"  # mov rcx, [rsp]         how many arguments
    "488b7c2410"  # mov rdi, [rsp+16]    PATH
    "488d742418"  # lea rsi, [rsp+24]    what follows it
    "488d54cc10"  # lea rdx, [rsp+rcx*8+16]  the environment
    "b83b000000"  # mov eax, 59          execve
    "0f05"  # syscall
    "bf02000000"  # mov edi, 2           standard error
    "488d35"  # lea rsi, [rip+...]       words
)
_LEAVE: Final = bytes.fromhex(
    f"ba{len(_WORDS):02x}000000"  # mov edx, ...        how many
    "b801000000"  # mov eax, 1           write
    "0f05"  # syscall
    "bf7e000000"  # mov edi, 126
    "b8e7000000"  # mov eax, 231         exit_group
    "0f05"  # syscall
)


_ONE: Final = bytes.fromhex(
    "bf11000000"  # mov edi, 17          SIGCHLD
    "488d353c000000"  # lea rsi, [rip+60]    is ignored
    "31d2"  # xor edx, edx
    "41ba08000000"  # mov r10d, 8
    "b80d000000"  # mov eax, 13          rt_sigaction
    "0f05"  # syscall
    "31ff"  # xor edi, edi         again:
    "4889e6"  # mov rsi, rsp
    "ba08000000"  # mov edx, 8
    "31c0"  # xor eax, eax         read
    "0f05"  # syscall
    "83f808"  # cmp eax, 8
    "7511"  # jne +17              to the end
    "8b742400"  # mov esi, [rsp]
    "8b7c2404"  # mov edi, [rsp+4]
    "b83e000000"  # mov eax, 62          kill
    "0f05"  # syscall
    "ebdc"  # jmp -36              again
    "31ff"  # xor edi, edi
    "b8e7000000"  # mov eax, 231         exit_group
    "0f05"  # syscall
)
_IGNORE: Final = struct.pack("<QQQQ", 1, 0, 0, 0)


def gate(seccomp_filter: bytes) -> bytes:
    """The executable file. *seccomp_filter*: as ``seccomp.program`` makes it."""
    rest = _EXECUTE + _OFFSET.pack(len(_LEAVE)) + _LEAVE + _WORDS
    code = _INSTALL + _OFFSET.pack(len(rest)) + rest
    at = _BASE + _START + len(code) + _FILTER.size
    told = _FILTER.pack(len(seccomp_filter) // _INSTRUCTION_BYTES, at)
    return _executable(code + told + seccomp_filter)


def one() -> bytes:
    """The executable file of process 1."""
    return _executable(_ONE + _IGNORE)


def order(number: int, target: int) -> bytes:
    """What process 1 is told to signal."""
    return _ORDER.pack(number, target)


def _executable(content: bytes) -> bytes:
    size = _START + len(content)
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = _ELF.pack(
        *(identity, _EXECUTABLE, _X86_64, 1, _BASE + _START, _ELF.size, 0),
        *(0, _ELF.size, _SEGMENT.size, 1, 0, 0, 0),
    )
    segment = _SEGMENT.pack(_LOAD, _READ_EXECUTE, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + content
