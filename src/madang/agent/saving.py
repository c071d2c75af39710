"""What a session changed in its root, taken over as a layer. Nothing that comes is trusted: see
``rootlayers``, which reads it.
"""

from __future__ import annotations

import asyncio
import errno
from functools import partial
from typing import Final

from madang.agent.files import read_changes
from madang.agent.layers import LayerStore
from madang.agent.runtime.contract import Runtime
from madang.agent.staging import stage
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
        unpack = partial(self._store.stage_root, limit_bytes=limit_bytes)
        try:
            staged = await stage(read_changes(sock), unpack)
            await asyncio.to_thread(self._store.commit, (staged,))
        except ConnectionError as exc:
            raise BuildFailed(f"what {kernel} changed can't be read: its worker died") from exc
        except OSError as exc:
            if exc.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            raise StorageFull("the disk under the state folder is full: free space.") from exc
        return LayerSaved(digest=staged.digest, size_bytes=staged.size_bytes)
