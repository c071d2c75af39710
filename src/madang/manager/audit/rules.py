"""What of an object may stand in the audit log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

HIDDEN: Final = "hidden"
"""Stands for a value that is not to be written down."""
MAX_TEXT: Final = 500
MAX_ITEMS: Final = 50
MAX_LABEL: Final = 200

FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "audit": frozenset({"count", "digest"}),
    "domain": frozenset({"disabled"}),
    "group": frozenset({"text", "version"}),
    "invitation": frozenset({"project", "role", "user", "expires_at"}),
    "image": frozenset({"status", "digest", "requirements", "labels", "policy_digest"}),
    "limits": frozenset({"version", "digest", "note", "limits"}),
    "node": frozenset({"group"}),
    "policy": frozenset({"version", "digest", "note"}),
    "preset": frozenset({"version", "cpu", "mem_bytes", "disk_bytes", "pids", "time_s"}),
    "price": frozenset({"group", "slot", "price", "currency", "valid_from"}),
    "reservation": frozenset({"project", "group", "nodes", "starts_at", "ends_at"}),
    "project": frozenset({"disabled", "user", "role"}),
    "session": frozenset({
        "status", "kind", "owner", "project", "group", "image", "program", "cpu_milli", "mem_bytes",
        "disk_bytes", "pids", "time_s", "network", "runtime", "policy_digest", "grace_s", "force",
        "signal", "path", "output", "priority", "class", "after", "not_before", "give_up_after_s",
        "preset", "protected_until", "reason", "text",
    }),
    "token": frozenset({"user", "kind", "scopes", "expires_at", "revoked"}),
    "usage": frozenset({
        "session", "started_at", "ended_at", "cpu_milli", "mem_bytes", "disk_bytes", "pids", "node",
        "reason", "corrects",
    }),
    "user": frozenset({
        "role", "domain", "project", "projects", "disabled", "totp", "password", "email", "name",
    }),
}  # fmt: skip
"""Kind of object → fields that are written down as they are; of others, that they were there."""


def shown(kind: str, values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """*values* as the log keeps them, as JSON has them: allowed fields only, long texts cut."""
    if values is None:
        return None
    allowed = FIELDS.get(kind, frozenset())
    return {name: short(v) if name in allowed else HIDDEN for name, v in values.items()}


def short(value: Any) -> Any:
    """As JSON has it, with an end."""
    match value:
        case None | bool() | int() | float():
            return value
        case Mapping():
            items = list(value.items())[:MAX_ITEMS]
            return {str(key)[:MAX_LABEL]: short(each) for key, each in items}
        case list() | tuple() | set() | frozenset():
            return [short(each) for each in list(value)[:MAX_ITEMS]]
        case _:
            text = str(value)
            return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"


def label(text: str) -> str:
    """A name that somebody gave, as any database can store it."""
    if text.isascii() and len(text) <= MAX_LABEL and "\0" not in text:
        return text
    clean = text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
    return clean if len(clean) <= MAX_LABEL else f"{clean[:MAX_LABEL]}…"
