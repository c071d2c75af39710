"""HTTP to image registries, each connection a tunnel through the agent's proxy."""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import urlencode, urljoin, urlsplit

from madang.agent.buildscript.main import BuildError, Exit, say

TRIES = 5
PAUSE_S = 0.5
"""Before the second try; doubled each time."""
PATIENCE_S = 60.0
MAX_REDIRECTS = 5
MAX_TOKEN = 64 * 1024
_PARAMETER = re.compile(r'([a-zA-Z]+)="([^"]*)"')
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


class Unreachable(Exception):
    """No answer, or one that may be another next time."""


class NotThere(Exception):
    """The registry says that it has no such thing."""


class _Connection(http.client.HTTPConnection):
    """To *host*, through CONNECT on the Unix socket at *proxy*."""

    def __init__(self, proxy: str, host: str, port: int, context: ssl.SSLContext | None) -> None:
        super().__init__(host, port, timeout=PATIENCE_S)
        self._proxy = proxy
        self._context = context

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._proxy)
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.sock.sendall(f"CONNECT {host}:{self.port} HTTP/1.1\r\n\r\n".encode("ascii"))
        answer = http.client.HTTPResponse(self.sock, method="CONNECT")
        answer.begin()
        if answer.status != 200:
            text = answer.read(1000).decode("utf-8", "replace").strip()
            raise Unreachable(text.removeprefix("madang: "))
        if self._context is not None:
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)


class Site:
    """One registry, or a mirror of it: where it is and what it wants to know of us."""

    def __init__(
        self,
        proxy: str,
        host: str,
        *,
        http: bool = False,
        prefix: str = "",
        login: tuple[str, str] | None = None,
        certificates: str = "",
    ) -> None:
        self.host = host
        self.prefix = prefix
        self._proxy = proxy
        self._login = login
        self._http = http
        self.base = f"{'http' if http else 'https'}://{host}"
        self._context = ssl.create_default_context(cadata=certificates or None)
        self._authorization: dict[str, str] = {}
        """Of each scope that was asked for."""

    @contextmanager
    def open(
        self,
        method: str,
        path: str,
        *,
        scope: str,
        headers: Mapping[str, str] | None = None,
        body: IO[bytes] | bytes | None = None,
        good: frozenset[int] = frozenset({200}),
    ) -> Iterator[http.client.HTTPResponse]:
        """One request and its answer, logged in and led on where the registry asks for it.

        Raises Unreachable, NotThere, BuildError (DENIED, DAMAGED).
        """
        url = urljoin(self.base, path)
        for _ in range(MAX_REDIRECTS):
            answer, connection = self._ask(method, url, scope, dict(headers or {}), body)
            try:
                if answer.status == 401 and scope not in self._authorization:
                    self._log_in(answer.headers.get_all("WWW-Authenticate", []), scope)
                elif answer.status in {301, 302, 303, 307, 308}:
                    url = self.next(url, answer.headers.get("Location", ""))
                elif answer.status in good:
                    yield answer
                    return
                else:
                    raise self._refusal(method, url, answer)
            except (OSError, http.client.HTTPException) as exc:
                raise Unreachable(f"{self.host}: {str(exc) or type(exc).__name__}") from exc
            finally:
                connection.close()
        raise Unreachable(f"{self.host}: it leads on and on")

    def _ask(
        self, method: str, url: str, scope: str, headers: dict[str, str], body: Any
    ) -> tuple[http.client.HTTPResponse, _Connection]:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        host, port = parts.hostname or "", parts.port or (443 if secure else 80)
        connection = _Connection(self._proxy, host, port, self._context if secure else None)
        if self.is_ours(url) and scope in self._authorization:
            headers["Authorization"] = self._authorization[scope]
        headers["User-Agent"] = "madang"
        if hasattr(body, "seek"):
            body.seek(0)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        try:
            connection.request(method, target, body=body, headers=headers)
            return connection.getresponse(), connection
        except (OSError, http.client.HTTPException, ValueError) as exc:
            connection.close()
            raise Unreachable(f"{host}: {str(exc) or type(exc).__name__}") from exc
        except BaseException:
            connection.close()
            raise

    def is_ours(self, url: str) -> bool:
        """Whether it is the registry itself, which alone learns who we are."""
        parts, base = urlsplit(url), urlsplit(self.base)
        return (parts.scheme, parts.netloc) == (base.scheme, base.netloc)

    def next(self, url: str, location: str) -> str:
        target = urljoin(url, location)
        scheme = urlsplit(target).scheme
        if scheme not in {"http", "https"} or (scheme == "http" and not self._http):
            raise Unreachable(f"{self.host} leads to an address that is not https")
        return target

    def _log_in(self, offers: list[str], scope: str) -> None:
        """Do what a 401 asks for; what it gets is used from the next request on."""
        for offer in offers:
            kind, _, rest = offer.partition(" ")
            if kind.lower() == "bearer":
                self._authorization[scope] = f"Bearer {self._token(rest, scope)}"
                return
            if kind.lower() == "basic" and self._login is not None:
                self._authorization[scope] = _basic(self._login)
                return
        raise BuildError(Exit.DENIED, f"{self.host} wants a login{_how(self._login)}")

    def _token(self, text: str, scope: str) -> str:
        asked = dict(_PARAMETER.findall(text))
        realm = urlsplit(asked.get("realm", ""))
        if realm.scheme != "https" and not (realm.scheme == "http" and self._http):
            raise Unreachable(f"{self.host} gives its tokens at an address that is not https")
        query = {"scope": scope}
        if "service" in asked:
            query["service"] = asked["service"]
        headers = {} if self._login is None else {"Authorization": _basic(self._login)}
        url = realm._replace(query="&".join(filter(None, (realm.query, urlencode(query))))).geturl()
        answer, connection = self._ask("GET", url, "", headers, None)
        try:
            data = answer.read(MAX_TOKEN)
        except (OSError, http.client.HTTPException) as exc:
            raise Unreachable(f"{realm.hostname}: {exc}") from exc
        finally:
            connection.close()
        if answer.status in _AGAIN:
            raise Unreachable(f"{realm.hostname} answers {answer.status}")
        try:
            found = json.loads(data)
            token = found.get("token") or found.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if answer.status != 200 or not isinstance(token, str) or not token.isascii():
            text = f"{self.host} gives no token{_how(self._login)}"
            raise BuildError(Exit.DENIED, text)
        return token

    def _refusal(
        self, method: str, url: str, answer: http.client.HTTPResponse
    ) -> Unreachable | NotThere | BuildError:
        why = _words(answer.read(4096))
        text = f"{self.host} answers {answer.status}{f' ({why})' if why else ''}"
        if answer.status in _AGAIN:
            return Unreachable(text)
        if answer.status in {401, 403}:
            return BuildError(Exit.DENIED, f"{text}{_how(self._login)}")
        if answer.status in {404, 416}:
            return NotThere(text)
        return BuildError(Exit.NETWORK, f"{text} to {method} {urlsplit(url).path}")


def again(what: str, do: Any) -> Any:
    """``do()``, some times if nobody answers. Raises Unreachable when it gives up."""
    for attempt in range(TRIES):
        try:
            return do()
        except Unreachable as exc:
            if attempt == TRIES - 1:
                raise
            say(f"retry    {what}: {exc}")
            time.sleep(PAUSE_S * 2**attempt)
    raise AssertionError


def _basic(login: tuple[str, str]) -> str:
    return "Basic " + base64.b64encode(":".join(login).encode()).decode("ascii")


def _how(login: tuple[str, str] | None) -> str:
    if login is None:
        return ": say who you are with --username, or have the operator set it up"
    return f" for {login[0]}: is the password right, and may they do that?"


def _words(data: bytes) -> str:
    """What a registry says in its errors."""
    try:
        first = json.loads(data)["errors"][0]
        text = str(first.get("message") or first.get("code") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return ""
    return "".join(c for c in text[:200] if c.isprintable())
