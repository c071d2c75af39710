"""What the sync client's streams have in common: a connection that is made anew when it breaks."""

from __future__ import annotations

import time
from typing import Final, Protocol

from madang.client.channel import Channel
from madang.client.retry import Retries
from madang.client.transport import Transport
from madang.wire.errors import PlatformError

_STEADY_S: Final = 5.0
"""A connection that lived this long was no part of the trouble before it."""


class Opening(Protocol):
    def opening(self) -> tuple[str, list[bytes]]:
        """Path of the next connection, and the messages that it begins with."""
        ...


class Resumed:
    def __init__(self, transport: Transport, following: Opening) -> None:
        self._transport = transport
        self._opening = following.opening
        self._channel: Channel | None = None
        self._retries: Retries | None = None
        self._opened_at = 0.0

    def _connect(self) -> Channel:
        path, messages = self._opening()
        channel = self._transport.channel(path)
        for message in messages:
            channel.send(message, text=True)
        self._opened_at = time.monotonic()
        return channel

    def _let_go(self, error: PlatformError, *, repeatable: bool) -> float:
        """Of the broken connection; how long to wait for the next try. Raises *error* if none."""
        if self._channel is not None:
            self._channel.abandon()
            self._channel = None
        if self._retries is None or time.monotonic() - self._opened_at > _STEADY_S:
            self._retries = self._transport.retries(repeatable=repeatable)
        pause_s = self._retries.pause_s(error)
        if pause_s is None:
            raise error
        return pause_s
