"""Whether a browser's request comes from a page of ours (against cross-site request forgery)."""

from __future__ import annotations

import hashlib
import hmac
from typing import Final
from urllib.parse import urlsplit

CSRF_HEADER: Final = "Madang-CSRF"
COOKIE: Final = "madang"
SECURE_COOKIE: Final = "__Host-madang"
_OURS: Final = frozenset({"same-origin", "none"})


def csrf_of(cookie: str) -> str:
    """Follows from the cookie; the cookie doesn't follow from it."""
    return hmac.new(cookie.encode(), b"madang csrf", hashlib.sha256).hexdigest()


def is_ours(origin: str | None, fetch_site: str | None, host: str) -> bool:
    """By the headers ``Origin``, ``Sec-Fetch-Site`` and ``Host``; with neither of the first: no."""
    if fetch_site is not None and fetch_site not in _OURS:
        return False
    if origin is not None:
        return same_host(origin, host)
    return fetch_site is not None


def same_host(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    if parts.scheme not in {"http", "https"} or not parts.netloc or parts.path or parts.query:
        return False
    default = ":443" if parts.scheme == "https" else ":80"
    return parts.netloc.lower().removesuffix(default) == host.lower().removesuffix(default)


def is_secure(origin: str | None) -> bool:
    """Whether the browser sees us over TLS, even if a proxy ends it."""
    return origin is not None and origin.startswith("https://")
