"""Requests signed by a key pair: what is signed, on both sides.

The text that is signed has eight lines, each ended by a line feed but the last::

    MADANG-HMAC-SHA256
    method, in capitals
    host, as in the Host header, in lower case
    path, as it goes over the wire (percent-encoded)
    query, as it goes over the wire, without the question mark
    date, in whole Unix seconds
    nonce: 16 to 64 letters and digits, never twice with one key
    SHA-256 of the body in hex, or UNSIGNED-BODY where the endpoint takes a stream

The signature is HMAC-SHA256 of that text with the secret key, in hex.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import Final

SCHEME: Final = "MADANG-HMAC-SHA256"
UNSIGNED_BODY: Final = "UNSIGNED-BODY"
ACCESS_PREFIX: Final = "mdk_"
WINDOW_S: Final = 300
"""How far the date of a request may be from the server's clock."""

_HEADER: Final = re.compile(
    SCHEME
    + r" key=(mdk_[0-9a-z]{26}), date=([0-9]{1,12}), nonce=([0-9A-Za-z]{16,64}),"
    + rf" body=([0-9a-f]{{64}}|{UNSIGNED_BODY}), signature=([0-9a-f]{{64}})"
)


@dataclass(frozen=True, slots=True)
class Signature:
    """An ``Authorization`` header of ours, taken apart."""

    access_key: str
    date: int
    nonce: str
    body: str
    """The body's hash, or UNSIGNED_BODY."""
    signature: str

    def header(self) -> str:
        return (
            f"{SCHEME} key={self.access_key}, date={self.date}, nonce={self.nonce},"
            f" body={self.body}, signature={self.signature}"
        )


def parse(header: str) -> Signature | None:
    """None unless *header* has exactly the form of ``Signature.header``."""
    found = _HEADER.fullmatch(header)
    if found is None:
        return None
    key, date, nonce, body, signature = found.groups()
    return Signature(key, int(date), nonce, body, signature)


def text_to_sign(
    *, method: str, host: str, path: str, query: str, date: int, nonce: str, body: str
) -> str:
    return "\n".join((SCHEME, method, host.lower(), path, query, str(date), nonce, body))


def sign(secret: str, text: str) -> str:
    return hmac.new(secret.encode(), text.encode("utf-8", "surrogateescape"), "sha256").hexdigest()


def body_hash(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def signed_header(
    access_key: str,
    secret: str,
    *,
    method: str,
    host: str,
    target: str,
    body: str,
    date: int,
    nonce: str,
) -> str:
    """The value of ``Authorization``; *target*: path and query as they go over the wire."""
    path, _, query = target.partition("?")
    text = text_to_sign(
        method=method, host=host, path=path, query=query, date=date, nonce=nonce, body=body
    )
    return Signature(access_key, date, nonce, body, sign(secret, text)).header()
