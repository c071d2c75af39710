"""Bodies of requests: bounded, in time, and what was signed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator
from typing import Final

from aiohttp import StreamReader, web

from madang.wire.errors import InvalidRequest, SignatureInvalid, TooLarge
from madang.wire.size import format_bytes

_TIMEOUT_S: Final = 60.0
_NO_SIGNED: Final = "the signature covers another body than the one that came."


class Body:
    """A body that is read as a stream; at its end it must be the one that was signed."""

    def __init__(self, content: StreamReader, signed: str | None) -> None:
        """*signed*: SHA-256 in hex; None: nothing was said about it."""
        self._content: Final = content
        self._signed: Final = signed
        self._hash: Final = hashlib.sha256()

    async def read(self, size: int) -> bytes:
        """At most *size* bytes; empty at the end. Raises SignatureInvalid there."""
        data = await self._content.read(size)
        if self._signed is not None:
            if data:
                self._hash.update(data)
            elif not hmac.compare_digest(self._hash.hexdigest(), self._signed):
                raise SignatureInvalid(_NO_SIGNED)
        return data

    async def chunks(self, size: int) -> AsyncIterator[bytes]:
        while data := await self.read(size):
            yield data


async def read_whole(request: web.Request, limit: int, signed: str | None) -> bytes:
    """At most *limit* bytes. Raises TooLarge, SignatureInvalid."""
    text = f"the request's body is larger than {format_bytes(limit)}."
    if (request.content_length or 0) > limit:
        raise TooLarge(text, limit=limit)
    found = bytearray()
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            async for chunk in request.content.iter_any():
                found += chunk
                if len(found) > limit:
                    raise TooLarge(text, limit=limit)
    except TimeoutError as exc:
        raise InvalidRequest("the request's body did not come in time.") from exc
    if signed is not None and not hmac.compare_digest(hashlib.sha256(found).hexdigest(), signed):
        raise SignatureInvalid(_NO_SIGNED)
    return bytes(found)
