"""A program of a few hundred bytes that puts a system call filter on and executes another.

For runtimes whose kernel is not the machine's (see ``gvisor``): there, neither the init nor the
runtime can install the session's filter in a program before it begins. It reads no file, no
variable and no memory but its own; whoever names it a library to load is not heard.

    gate PATH ARGUMENT...    becomes PATH, with these arguments (the first: the program's name)
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


def program(seccomp_filter: bytes) -> bytes:
    """The executable file. *seccomp_filter*: as ``seccomp.program`` makes it."""
    rest = _EXECUTE + _OFFSET.pack(len(_LEAVE)) + _LEAVE + _WORDS
    code = _INSTALL + _OFFSET.pack(len(rest)) + rest
    at = _BASE + _START + len(code) + _FILTER.size
    content = code + _FILTER.pack(len(seccomp_filter) // _INSTRUCTION_BYTES, at) + seccomp_filter
    size = _START + len(content)
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = _ELF.pack(
        *(identity, _EXECUTABLE, _X86_64, 1, _BASE + _START, _ELF.size, 0),
        *(0, _ELF.size, _SEGMENT.size, 1, 0, 0, 0),
    )
    segment = _SEGMENT.pack(_LOAD, _READ_EXECUTE, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + content
