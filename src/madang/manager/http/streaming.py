"""Answers that are written while they are made."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from madang.manager.http.endpoint import Call


async def start_stream(
    call: Call[Any, Any],
    media_type: str,
    *,
    status: int = 200,
    length: int | None = None,
    headers: dict[str, str] | None = None,
) -> web.StreamResponse:
    """Send the head. Each ``write`` then waits for a slow client, so that memory stays bounded."""
    response = web.StreamResponse(status=status, headers=headers)
    response.content_type = media_type
    response.headers["X-Request-Id"] = call.id
    response.headers["Cache-Control"] = "no-store"
    response.content_length = length
    if length is None:
        response.enable_chunked_encoding()
    call.started = True
    await response.prepare(call.request)
    return response
