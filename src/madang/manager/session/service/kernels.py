"""Streams to a session's kernel, through the agent that holds it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

from madang.manager.fleet.service import FleetService
from madang.manager.session.types import Policies, SessionRow
from madang.wire.errors import InvalidRequest, LogGone, NodeUnavailable, SessionNotRunning
from madang.wire.kernel import KernelId
from madang.wire.link import BulkStream, FilesWritten, ReadRefusals, SendSignal, StreamRequest
from madang.wire.policy import Refusal
from madang.wire.session import SessionStatus

S = SessionStatus


class KernelService:
    """What needs the machine itself: output, input, files."""

    def __init__(self, fleet: FleetService, policies: Policies) -> None:
        self._fleet: Final = fleet
        self._policies: Final = policies

    def open(
        self, row: SessionRow, request: StreamRequest
    ) -> AbstractAsyncContextManager[BulkStream]:
        """A stream to the node that holds *row*; closed at the end in any case."""
        return self._fleet.open(row.held_by, request)

    async def signal(self, row: SessionRow, signal: int) -> None:
        if not 1 <= signal <= 64:
            raise InvalidRequest(f"signal: {signal} is none (1 to 64).", field="signal")
        if row.status != S.RUNNING:
            raise not_running(row)
        async with self.open(row, SendSignal(kernel=row.kernel, signal=signal)) as stream:
            async for _ in stream:
                pass

    async def refusals(self, row: SessionRow) -> list[Refusal]:
        """What its policy refused, each once, oldest first; nothing before it was placed."""
        if row.held_by is None:
            return []
        told = await self.teller(row)
        async with self.open(row, ReadRefusals(kernel=row.kernel)) as stream:
            return [told(item) async for item in stream if isinstance(item, Refusal)]

    async def teller(self, row: SessionRow) -> Callable[[Refusal], Refusal]:
        """What adds to a refusal whose policy it was, and who can change it."""
        return await self._policies.teller(row.seat)


def kernel_of(row: SessionRow) -> KernelId:
    """The kernel with the session's output and files. Raises SessionNotRunning, LogGone."""
    if row.held_by is not None:
        return row.kernel
    if row.status == S.TERMINATED:
        text = (
            f"nothing is left of {row.name}'s output and files: {row.name} was lost or not placed."
        )
        raise LogGone(text, session=row.id)
    raise not_running(row)


def not_running(row: SessionRow) -> SessionNotRunning:
    if row.status == S.TERMINATED:
        text = f"session {row.name} has ended. `madang show {row.name}` says how."
    elif row.status == S.TERMINATING:
        text = f"session {row.name} is being stopped."
    else:
        text = f"session {row.name} has not started. `madang show {row.name}` says why."
    return SessionNotRunning(text, status=row.status)


async def upload(stream: BulkStream, chunks: AsyncIterator[bytes]) -> FilesWritten:
    """Send *chunks*; the agent's answer may come before they end, if it refuses."""
    sending = asyncio.ensure_future(_send(stream, chunks))
    answer = asyncio.ensure_future(_answer(stream))
    try:
        await asyncio.wait((sending, answer), return_when=asyncio.FIRST_COMPLETED)
        if sending.done() and (error := sending.exception()) is not None:
            raise error
        return await answer
    finally:
        for task in (sending, answer):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _send(stream: BulkStream, chunks: AsyncIterator[bytes]) -> None:
    try:
        async for chunk in chunks:
            try:
                await stream.send(chunk)
            except ConnectionError:
                return  # the answer tells
    except Exception as exc:
        await stream.fail(InvalidRequest("the upload broke off."))
        raise InvalidRequest("the upload broke off.") from exc
    await stream.end()


async def _answer(stream: BulkStream) -> FilesWritten:
    async for item in stream:
        if isinstance(item, FilesWritten):
            return item
    raise NodeUnavailable("the machine ended the upload without an answer.")
