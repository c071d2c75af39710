"""What a session changed in its root, taken over as a layer. Nothing that comes is trusted: see
``rootlayers``, which reads it.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import BinaryIO, Final, cast

from madang.agent.files import read_changes
from madang.agent.layers import LayerStore, Staged, remove_tree
from madang.agent.runtime.contract import Runtime
from madang.wire.errors import BuildFailed, StorageFull
from madang.wire.kernel import KernelId
from madang.wire.link import LayerSaved


class Saver:
    """Of one node."""

    def __init__(self, runtime: Runtime, store: LayerStore) -> None:
        self._runtime: Final = runtime
        self._store: Final = store

    async def save(self, kernel: KernelId, limit_bytes: int) -> LayerSaved:
        """Raises Conflict, BuildFailed, StorageFull. Doing it again gives the same layer."""
        sock = await self._runtime.changes(kernel)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            poured, staged = await asyncio.gather(
                _pour(read_changes(sock), ours),
                asyncio.to_thread(self._stage, theirs, limit_bytes),
                return_exceptions=True,
            )
            if isinstance(staged, BaseException):
                raise staged
            if isinstance(poured, BaseException):
                await asyncio.to_thread(remove_tree, staged.path)
                raise poured
            await asyncio.to_thread(self._store.commit, (staged,))
        except ConnectionError as exc:
            raise BuildFailed(f"what {kernel} changed can't be read: its worker died") from exc
        except OSError as exc:
            if exc.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            raise StorageFull("the disk under the state folder is full: free space.") from exc
        return LayerSaved(digest=staged.digest, size_bytes=staged.size_bytes)

    def _stage(self, source: socket.socket, limit_bytes: int) -> Staged:
        with source, source.makefile("rb") as archive:
            return self._store.stage_root(cast(BinaryIO, archive), limit_bytes)


async def _pour(chunks: AsyncGenerator[bytes, None], target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with target:
        async with aclosing(chunks):
            async for chunk in chunks:
                try:
                    await loop.sock_sendall(target, chunk)
                except (BrokenPipeError, ConnectionResetError):
                    return  # The reader has stopped; it says why.
