"""What people, projects and domains may be called, and what a password must be."""

from __future__ import annotations

import re
from typing import Final

from madang.wire.errors import InvalidRequest

MAX_NAME: Final = 40
MIN_PASSWORD: Final = 10
MAX_PASSWORD: Final = 1024
_NAME: Final = re.compile(r"[a-z][a-z0-9]*(?:[._-][a-z0-9]+)*")
_LABEL: Final = re.compile(r"[ -~]{1,80}")


def valid(name: str) -> bool:
    """ASCII alone: no two names look the same."""
    return len(name) <= MAX_NAME and _NAME.fullmatch(name) is not None


def check(name: str, field: str) -> str:
    if not valid(name):
        text = (
            f"{field}: {name[:60]!r} is no name: 1 to {MAX_NAME} lower-case letters a-z and "
            "digits, with single dots, dashes or underscores between, beginning with a letter."
        )
        raise InvalidRequest(text, field=field)
    return name


def check_label(text: str, field: str) -> str:
    """Of a token: what people recognise it by."""
    if not _LABEL.fullmatch(text) or text != text.strip():
        raise InvalidRequest(f"{field}: 1 to 80 printable ASCII characters.", field=field)
    return text


def check_password(password: str, user: str) -> str:
    """Long enough, and not what everybody would try first."""
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        text = f"password: {MIN_PASSWORD} to {MAX_PASSWORD} characters; this has {len(password)}."
        raise InvalidRequest(text, field="password")
    lowered = password.lower()
    if user in lowered and len(lowered) < len(user) + MIN_PASSWORD // 2:
        raise InvalidRequest("password: it is little more than the user's name.", field="password")
    if len(set(password)) < 4:
        raise InvalidRequest("password: it has fewer than four characters.", field="password")
    return password
