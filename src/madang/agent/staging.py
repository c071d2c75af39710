"""Archives of layers on their way from a session into the layer store."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import BinaryIO, Final, cast

from madang.agent.layers import Staged, remove_tree

_BUFFER: Final = 1024 * 1024


async def stage(
    chunks: AsyncGenerator[bytes, None], unpack: Callable[[BinaryIO], Staged]
) -> Staged:
    """*unpack* in a thread, fed through a socket; closing it ends the thread."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    poured, staged = await asyncio.gather(
        _pour(chunks, ours),
        asyncio.to_thread(_read, theirs, unpack),
        return_exceptions=True,
    )
    if isinstance(poured, BaseException):
        if isinstance(staged, Staged):
            await asyncio.to_thread(remove_tree, staged.path)
        raise poured
    if isinstance(staged, BaseException):
        raise staged
    return staged


async def _pour(chunks: AsyncGenerator[bytes, None], target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with target:
        async with aclosing(chunks):
            async for chunk in chunks:
                try:
                    await loop.sock_sendall(target, chunk)
                except (BrokenPipeError, ConnectionResetError):
                    return  # the unpacker has stopped; it says why


def _read(source: socket.socket, unpack: Callable[[BinaryIO], Staged]) -> Staged:
    with source, source.makefile("rb", buffering=_BUFFER) as archive:
        return unpack(cast(BinaryIO, archive))
