"""The second factor: time-based one-time passwords (RFC 6238: SHA-1, 30 s, six digits)."""

from __future__ import annotations

import base64
import hmac
import secrets
from typing import Final
from urllib.parse import quote, urlencode

STEP_S: Final = 30
DIGITS: Final = 6
DRIFT: Final = 1
"""Steps that a clock may be off, either way."""
RECOVERY_CODES: Final = 10


def new_secret() -> bytes:
    return secrets.token_bytes(20)


def step_of(now: float) -> int:
    return int(now) // STEP_S


def code_at(secret: bytes, step: int, digits: int = DIGITS) -> str:
    """RFC 4226, section 5.3."""
    mac = hmac.digest(secret, step.to_bytes(8, "big"), "sha1")
    at = mac[-1] & 15
    number = int.from_bytes(mac[at : at + 4], "big") & 0x7FFFFFFF
    return str(number % 10**digits).zfill(digits)


def find_step(secret: bytes, code: str, now: float, *, used: int) -> int | None:
    """The step that *code* is of, if it is near *now* and later than *used*; None: it is wrong."""
    found = None
    for step in range(max(0, step_of(now) - DRIFT), step_of(now) + DRIFT + 1):
        if hmac.compare_digest(code_at(secret, step).encode(), code.encode()) and step > used:
            found = step
    return found


def show_secret(secret: bytes) -> str:
    return base64.b32encode(secret).decode().rstrip("=")


def uri(secret: bytes, user: str, issuer: str = "Madang") -> str:
    """What authenticators read as a QR code."""
    query = urlencode({"secret": show_secret(secret), "issuer": issuer})
    return f"otpauth://totp/{quote(issuer)}:{quote(user)}?{query}"


def new_recovery_codes() -> tuple[str, ...]:
    """79 bits each, in four groups of four."""
    alphabet = "23456789abcdefghjkmnpqrstuvwxyz"
    made = ("".join(secrets.choice(alphabet) for _ in range(16)) for _ in range(RECOVERY_CODES))
    return tuple("-".join(code[at : at + 4] for at in range(0, 16, 4)) for code in made)
