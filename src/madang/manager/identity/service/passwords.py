"""Passwords, by argon2id: slow and large on purpose, so never in the event loop."""

from __future__ import annotations

import asyncio
from typing import Final

AT_ONCE: Final = 2
"""Each takes 64 MiB and a core for a moment."""


class Passwords:
    def __init__(self) -> None:
        self._turns: Final = asyncio.Semaphore(AT_ONCE)
        self._nobody = ""

    async def hash(self, password: str) -> str:
        async with self._turns:
            return await asyncio.to_thread(_hash, password)

    async def verify(self, stored: str | None, password: str) -> bool:
        """Takes as long where nobody has that name, or they have no password."""
        if not self._nobody:
            self._nobody = await self.hash("nobody's")
        async with self._turns:
            right = await asyncio.to_thread(_verify, stored or self._nobody, password)
        return right and stored is not None


def _hash(password: str) -> str:
    from argon2 import PasswordHasher

    return PasswordHasher().hash(_text(password))


def _verify(stored: str, password: str) -> bool:
    from argon2 import PasswordHasher
    from argon2.exceptions import InvalidHashError, VerificationError

    try:
        return PasswordHasher().verify(stored, _text(password))
    except (VerificationError, InvalidHashError):
        return False


def _text(password: str) -> bytes:
    """JSON can carry lone surrogates; they are bytes like others."""
    return password.encode("utf-8", "surrogatepass")
