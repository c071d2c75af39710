"""How an endpoint is declared, and what its handler gets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Protocol, TypeVar

from aiohttp import web

from madang.manager.http.bodies import Body

Q = TypeVar("Q")
B = TypeVar("B")
H = TypeVar("H", bound=Callable[..., Awaitable[Any]])

DEFAULT_BODY_LIMIT: Final = 64 * 1024


class Caller(Protocol):
    """Who calls, as the endpoints need it."""

    @property
    def user_id(self) -> str: ...
    @property
    def user(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def token(self) -> str: ...
    @property
    def token_id(self) -> str: ...
    @property
    def project_id(self) -> str: ...
    @property
    def domain_id(self) -> str: ...
    @property
    def sees_all(self) -> bool: ...
    @property
    def administers(self) -> bool: ...
    @property
    def scopes(self) -> frozenset[str]: ...
    def allows(self, scope: str) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One method and path, with all that the description needs."""

    method: str
    path: str
    name: str
    summary: str
    auth: bool
    scope: str
    """What the caller's token must allow."""
    query: type | None
    body: Any
    returns: Any
    status: int
    also: tuple[int, ...]
    """Further statuses without an error."""
    body_limit: int
    sends: str
    """Media type of a body that the handler reads as a stream."""
    streams: str
    """Media type of an answer that the handler writes as a stream."""
    headers: tuple[str, ...]
    """Request headers that matter, by name."""
    websocket: tuple[Any, Any] | None
    """Types of the text messages of client and server."""
    foreign: bool = False
    """Others say how it looks: it is not in our description, takes any query parameters, and also
    the token as others' clients send it."""


@dataclass(slots=True)
class Call(Generic[Q, B]):
    """One request, decoded and authenticated."""

    request: web.Request
    id: str
    query: Q
    body: B
    _caller: Caller | None = None
    signed_body: str | None = None
    """SHA-256 of the body that the caller signed."""
    started: bool = False
    """An answer has begun: an error can't become a problem document any more."""

    @property
    def caller(self) -> Caller:
        assert self._caller is not None, "the endpoint is open to everybody"
        return self._caller

    @property
    def content(self) -> Body:
        """The body as a stream; take it once."""
        return Body(self.request.content, self.signed_body)

    def path(self, name: str) -> str:
        return self.request.match_info[name]

    def header(self, name: str) -> str | None:
        return self.request.headers.get(name)


@dataclass(frozen=True, slots=True)
class Reply:
    """A value with headers or another status than the endpoint's usual one."""

    value: Any
    headers: dict[str, str] = field(default_factory=dict)
    status: int | None = None


def endpoint(
    method: str,
    path: str,
    *,
    auth: bool = True,
    scope: str | None = None,
    query: type | None = None,
    body: Any = None,
    returns: Any = None,
    status: int = 200,
    also: tuple[int, ...] = (),
    body_limit: int = DEFAULT_BODY_LIMIT,
    sends: str = "",
    streams: str = "",
    headers: tuple[str, ...] = (),
    websocket: tuple[Any, Any] | None = None,
    foreign: bool = False,
) -> Callable[[H], H]:
    """Declare a handler; the first line of its docstring is the summary.

    *scope* None: ``read`` for a plain GET; anything else needs ``admin``, the narrowest there is,
    until somebody says otherwise.
    """
    reads = method == "GET" and websocket is None

    def mark(handler: H) -> H:
        described = Endpoint(
            method=method,
            path=path,
            name=handler.__name__,
            summary=(handler.__doc__ or "").strip().splitlines()[0],
            auth=auth,
            scope=scope or ("read" if reads else "admin"),
            query=query,
            body=body,
            returns=returns,
            status=status,
            also=also,
            body_limit=body_limit,
            sends=sends,
            streams=streams,
            headers=headers,
            websocket=websocket,
            foreign=foreign,
        )
        handler.__endpoint__ = described  # type: ignore[attr-defined]
        return handler

    return mark


def endpoints_of(api: object) -> list[tuple[Endpoint, Callable[..., Awaitable[Any]]]]:
    """The declared handlers of *api*, bound."""
    found = []
    for name in dir(type(api)):
        declared = getattr(getattr(type(api), name), "__endpoint__", None)
        if isinstance(declared, Endpoint):
            found.append((declared, getattr(api, name)))
    return found
