"""Cells over HTTP and WebSockets."""

from madang.manager.cells.api.cells import CellApi
from madang.manager.cells.api.channel import ChannelApi

__all__ = ["CellApi", "ChannelApi"]
