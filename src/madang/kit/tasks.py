"""Tasks that have an owner for as long as they live."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


def is_cancelled() -> bool:
    """Whether the current task was told to end; to be asked where errors are caught broadly.

    A clean-up that fails replaces the cancellation that began it by its own error.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class TaskSet:
    """Like a TaskGroup for owners that are opened and closed: one failure does not end the rest.

    A task that fails is logged with its name; ``close`` cancels all and waits for them.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run *work* in the background; raises RuntimeError after ``close``."""
        if self._closed:
            work.close()
            raise RuntimeError(f"{name}: its owner is closed")
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("background task failed", extra={"task": task.get_name()}, exc_info=exc)

    async def close(self) -> None:
        """Cancel all and wait until they have ended; idempotent."""
        self._closed = True
        while tasks := [task for task in self._tasks if task is not asyncio.current_task()]:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
