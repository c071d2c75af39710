"""Where a server is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from madang.wire.errors import InvalidRequest

_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Address:
    secure: bool
    host: str
    port: int
    prefix: str
    """Path before ``/v1``; empty unless a proxy adds one."""

    @classmethod
    def parse(cls, url: str) -> Address:
        """``http://127.0.0.1:8470``; raises InvalidRequest that says what is wrong."""
        parts = urlsplit(url.strip())
        try:
            port = parts.port
        except ValueError as exc:
            raise InvalidRequest(f"server address {url!r}: {exc}.") from exc
        if parts.scheme not in _PORTS or not parts.hostname:
            text = f"server address {url!r} must look like http://127.0.0.1:8470."
            raise InvalidRequest(text)
        if parts.query or parts.fragment or parts.username:
            text = f"server address {parts.hostname}: user, query and fragment have no place in it."
            raise InvalidRequest(text)
        secure = parts.scheme == "https"
        return cls(secure, parts.hostname, port or _PORTS[parts.scheme], parts.path.rstrip("/"))

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"http{'s' if self.secure else ''}://{self.netloc}{self.prefix}"
