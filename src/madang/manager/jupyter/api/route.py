"""How an endpoint of Jupyter's API is declared."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, Final

from aiohttp import web

from madang.kit.codec import from_json, to_builtins, to_json
from madang.manager.http import Call, Reply, endpoint
from madang.manager.http.bodies import read_whole
from madang.manager.http.problems import problem_of
from madang.wire.errors import Forbidden, InvalidRequest, PlatformError

BODY_LIMIT: Final = 256 << 10

Handler = Callable[[Any, Call[dict[str, str], Any]], Awaitable[Any]]


def route(
    method: str, path: str, *, status: int = 200, body_limit: int = BODY_LIMIT, sends: str = ""
) -> Callable[[Handler], Handler]:
    """At ``/jupyter/{user}`` and *path*; the caller must be that user.

    Reading needs the scope ``read``, all else ``sessions``. Errors also say ``message`` and
    ``reason``, which is what Jupyter's clients show. The body is left to ``body_of``.
    """
    scope = "read" if method == "GET" else "sessions"

    def mark(handler: Handler) -> Handler:
        @wraps(handler)
        async def serve(api: Any, call: Call[dict[str, str], Any]) -> Any:
            try:
                check_user(call)
                return await handler(api, call)
            except PlatformError as exc:
                return _refusal(exc, call)

        declare = endpoint(
            method,
            f"/jupyter/{{user}}{path}",
            scope=scope,
            status=status,
            body_limit=body_limit,
            sends=sends or "application/json",
            foreign=True,
        )
        return declare(serve)

    return mark


def check_user(call: Call[Any, Any]) -> None:
    """Raises Forbidden."""
    wanted, caller = call.path("user"), call.caller.user
    if wanted != caller:
        text = f"this is the address of {wanted[:64]!r}; yours is /jupyter/{caller}."
        raise Forbidden(text, user=wanted[:64])


async def body_of(call: Call[Any, Any], limit: int = BODY_LIMIT) -> dict[str, Any]:
    """The JSON object that came; empty for no body. Raises InvalidRequest, TooLarge."""
    found = await read_whole(call.request, limit, call.signed_body)
    return from_json(dict[str, Any], found or b"{}")


def text_of(body: dict[str, Any], name: str) -> str | None:
    """A text of *body*; None where there is none. Raises InvalidRequest."""
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a text.", field=name)
    return value


def _refusal(error: PlatformError, call: Call[Any, Any]) -> web.Response:
    told = to_builtins(problem_of(error, call.id))
    told |= {"message": error.text, "reason": error.code, "traceback": ""}
    return web.Response(
        status=error.http_status, body=to_json(told), content_type="application/json"
    )


__all__ = ["Reply", "body_of", "check_user", "route", "text_of"]
