"""What a request shows of who sent it, before anybody judges it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from aiohttp import web


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Taken from the request as it came over the wire."""

    method: str
    target: str
    """Path and query, percent-encoded."""
    host: str
    source: str
    """Address of the peer; whatever a header says of another is not believed."""
    authorization: tuple[str, ...] = ()
    cookies: tuple[tuple[str, str], ...] = ()
    csrf: str | None = None
    origin: str | None = None
    fetch_site: str | None = None
    upgrade: bool = False
    """It asks for a WebSocket, which browsers send from any page."""

    def as_bearer(self, query_token: str | None) -> Credentials:
        """With the token where clients of other systems put it: ``Authorization: token T``, or
        ``?token=T`` where a header can't be set; a header counts for more.
        """
        shown = self.authorization or ((f"token {query_token}",) if query_token else ())
        told = (header.partition(" ") for header in shown)
        return replace(
            self,
            authorization=tuple(
                f"Bearer {rest}" if scheme.lower() == "token" else f"{scheme} {rest}"
                for scheme, _, rest in told
            ),
        )

    def cookie(self, name: str) -> str | None:
        return next((value for key, value in self.cookies if key == name), None)

    @property
    def changes(self) -> bool:
        """By its form, it may change something."""
        return self.upgrade or self.method not in {"GET", "HEAD"}


def credentials_of(request: web.Request) -> Credentials:
    headers = request.headers
    return Credentials(
        method=request.method,
        target=request.raw_path,
        host=headers.get("Host", ""),
        source=request.remote or "",
        authorization=tuple(headers.getall("Authorization", ())),
        cookies=tuple(request.cookies.items()) if "Cookie" in headers else (),
        csrf=headers.get("Madang-CSRF"),
        origin=headers.get("Origin"),
        fetch_site=headers.get("Sec-Fetch-Site"),
        upgrade="Upgrade" in headers,
    )
