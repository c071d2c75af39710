"""Errors as RFC 9457 problem documents."""

from __future__ import annotations

import math
from typing import Any, Final

from aiohttp import web

from madang.kit.codec import to_json
from madang.wire.api import Problem
from madang.wire.errors import InvalidRequest, NotFound, PlatformError, Retry, TooLarge

MEDIA_TYPE: Final = "application/problem+json"


def problem_of(error: PlatformError, request_id: str) -> Problem:
    return Problem(
        type=f"urn:madang:error:{error.code}",
        title=type(error).__name__,
        status=error.http_status,
        detail=error.text,
        code=error.code,
        retry=error.retry,
        request_id=request_id,
        details=_plain(error.details),
    )


def _plain(details: dict[str, Any]) -> dict[str, Any]:
    simple = (str, int, float, bool, list, dict, tuple, type(None))
    return {key: v if isinstance(v, simple) else str(v) for key, v in details.items()}


def problem_response(error: PlatformError, request_id: str) -> web.Response:
    try:
        body = to_json(problem_of(error, request_id))
    except InvalidRequest:  # text or details that are not Unicode
        text = error.text.encode("utf-8", "replace").decode()
        clean = type(error).__new__(type(error))
        PlatformError.__init__(clean, text)
        body = to_json(problem_of(clean, request_id))
    response = web.Response(status=error.http_status, body=body, content_type=MEDIA_TYPE)
    if error.http_status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.retry is Retry.LATER:
        response.headers["Retry-After"] = str(math.ceil(error.details.get("retry_after_s", 1)))
    return response


def from_aiohttp(error: web.HTTPException, request: web.Request) -> PlatformError:
    """What aiohttp itself refuses: unknown paths, wrong methods, broken requests."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        wrong = MethodNotAllowed(f"{request.path} does not take {request.method}.")
        wrong.allowed = sorted(error.allowed_methods)
        return wrong
    if error.status == 404:
        return NotFound(f"no such path: {request.path}. See /v1/openapi.json.")
    if error.status == 413:
        return TooLarge("the request's body is too large.")
    return InvalidRequest(f"{error.reason}: {error.text or ''}".strip())


class MethodNotAllowed(InvalidRequest):
    http_status = 405
    allowed: list[str]
