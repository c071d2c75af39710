"""Jupyter names kernels by UUID; a session's id has as many bits."""

from __future__ import annotations

import uuid
from typing import Final

from madang.wire.errors import NotFound

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_SHIFTS: Final = range(125, -1, -5)


def kernel_id(session_id: str) -> str:
    """The session's id, as a UUID."""
    value = 0
    for letter in session_id:
        value = value << 5 | _ALPHABET.index(letter)
    return str(uuid.UUID(int=value))


def session_id(kernel: str) -> str:
    """Raises NotFound for what is no kernel's id."""
    try:
        value = uuid.UUID(kernel).int
    except ValueError as exc:
        raise NotFound(f"no kernel {kernel[:64]!r}.", kernel=kernel[:64]) from exc
    return "".join(_ALPHABET[value >> shift & 31] for shift in _SHIFTS)
