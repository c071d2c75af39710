"""From declared endpoints to an aiohttp application."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec
from aiohttp import web

from madang.kit.codec import from_json, to_json
from madang.manager.http import origin
from madang.manager.http.bodies import read_whole
from madang.manager.http.credentials import Credentials, credentials_of
from madang.manager.http.endpoint import Call, Caller, Endpoint, Reply, endpoints_of
from madang.manager.http.open_calls import OPEN_CALLS, OpenCalls
from madang.manager.http.openapi import describe
from madang.manager.http.problems import from_aiohttp, problem_response
from madang.manager.http.strangers import STRANGERS, Strangers
from madang.wire import signing
from madang.wire.errors import InvalidRequest, PlatformError, ScopeMissing, SignatureInvalid

log = logging.getLogger(__name__)

Authenticate = Callable[[Credentials], Awaitable[Caller]]
Observe = Callable[[str, str, int, float], None]
"""Called with method, path template, status, seconds after each request."""
Handler = Callable[..., Awaitable[Any]]

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


def build_app(
    apis: Sequence[object],
    *,
    authenticate: Authenticate,
    observe: Observe,
    title: str,
    version: str,
    strangers: Strangers | None = None,
    open_calls: OpenCalls | None = None,
) -> web.Application:
    """All endpoints of *apis*, with their description at ``/v1/openapi.json``. Serve it by Site."""
    app = web.Application(middlewares=[_refusals])
    app[STRANGERS] = strangers or Strangers()
    app[OPEN_CALLS] = open_calls or OpenCalls()
    declared: list[Endpoint] = []
    for api in apis:
        for endpoint, handler in endpoints_of(api):
            if not endpoint.foreign:
                declared.append(endpoint)
            serve = _server(endpoint, handler, authenticate, observe)
            app.router.add_route(endpoint.method, endpoint.path, serve)
    description = to_json(describe(declared, title=title, version=version))

    async def openapi(_request: web.Request) -> web.Response:
        return web.Response(body=description, content_type="application/json")

    app.router.add_get("/v1/openapi.json", openapi)
    return app


@web.middleware
async def _refusals(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """What no endpoint takes."""
    try:
        return await handler(request)
    except web.HTTPException as exc:
        response = problem_response(from_aiohttp(exc, request), _request_id(request))
        if "Allow" in exc.headers:
            response.headers["Allow"] = exc.headers["Allow"]
        return response


def _request_id(request: web.Request) -> str:
    given = request.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def _server(
    endpoint: Endpoint, handler: Handler, authenticate: Authenticate, observe: Observe
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """One endpoint's whole way: authenticate, decode, call, encode, and errors."""

    async def serve(request: web.Request) -> web.StreamResponse:
        began = time.perf_counter()
        call: Call[Any, Any] = Call(request, _request_id(request), None, None)
        origin.enter(request.remote or "", call.id)
        status = 499
        try:
            if endpoint.auth:
                await _admit(endpoint, call, authenticate)
            call.query = _query(endpoint, request)
            call.body = await _body(endpoint, call)
            response = _response(endpoint, await handler(call))
            status = response.status
        except PlatformError as exc:
            status = exc.http_status
            response = _failure(call, exc)
        except web.HTTPException as exc:
            status = exc.status
            response = _failure(call, from_aiohttp(exc, request))
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as exc:
            status = 500
            extra = {"request": call.id, "method": endpoint.method, "path": endpoint.path}
            log.exception("request failed", exc_info=exc, extra=extra)
            text = f"something failed inside the server; its log has it as request={call.id}."
            response = _failure(call, PlatformError(text))
        finally:
            request.app[OPEN_CALLS].remove(call)
            observe(endpoint.method, endpoint.path, status, time.perf_counter() - began)
        if not response.prepared:
            response.headers["X-Request-Id"] = call.id
        return response

    return serve


async def _admit(endpoint: Endpoint, call: Call[Any, Any], authenticate: Authenticate) -> None:
    """Who it is, and whether their token is for such calls."""
    shown = credentials_of(call.request)
    if endpoint.foreign:
        shown = shown.as_bearer(call.request.query.get("token"))
    caller = await authenticate(shown)
    call.request.app[STRANGERS].welcome(call.request)
    if not caller.allows(endpoint.scope):
        text = (
            f"{endpoint.method} {endpoint.path} needs the scope {endpoint.scope!r}; token "
            f"{caller.token!r} of {caller.user} ({caller.role}) has "
            f"{', '.join(sorted(caller.scopes)) or 'none'}."
        )
        raise ScopeMissing(text, scope=endpoint.scope)
    signature = signing.parse(shown.authorization[0]) if shown.authorization else None
    if signature is not None and signature.body != signing.UNSIGNED_BODY:
        call.signed_body = signature.body
    elif signature is not None and not endpoint.sends:
        raise SignatureInvalid("only a streamed body may be left unsigned.")
    call._caller = caller
    call.request.app[OPEN_CALLS].add(call)


def _failure(call: Call[Any, Any], error: PlatformError) -> web.Response:
    """The problem document; if the answer has begun, cut it off so that the client can tell."""
    if call.started:
        if (transport := call.request.transport) is not None:
            transport.abort()
        raise ConnectionResetError(error.text) from error
    return problem_response(error, call.id)


def _query(endpoint: Endpoint, request: web.Request) -> Any:
    given = request.query
    if endpoint.foreign:
        return dict(given)
    if endpoint.query is None:
        if given:
            raise InvalidRequest(f"no query parameter is known here: {next(iter(given))!r}.")
        return None
    try:
        return msgspec.convert(dict(given), endpoint.query, strict=False)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"query: {exc}.") from exc


async def _body(endpoint: Endpoint, call: Call[Any, Any]) -> Any:
    if endpoint.body is None:
        return None
    data = await read_whole(call.request, endpoint.body_limit, call.signed_body)
    return from_json(endpoint.body, data or b"{}")


def _response(endpoint: Endpoint, value: Any) -> web.StreamResponse:
    if isinstance(value, web.StreamResponse):
        return value
    reply = value if isinstance(value, Reply) else Reply(value)
    status = reply.status or endpoint.status
    if status == 204 or status == 304:
        return web.Response(status=status, headers=reply.headers)
    return web.Response(
        status=status,
        body=to_json(reply.value),
        headers=reply.headers,
        content_type="application/json",
    )
