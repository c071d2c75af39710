"""What tokens are limited to, and what roles are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from madang.manager.identity.types import Role, Scope, allows
from madang.wire.errors import Forbidden, InvalidRequest

_OF_MONITOR: Final = frozenset({Scope.READ, Scope.ACCOUNT})


def check_scopes(wanted: Iterable[str]) -> frozenset[str]:
    """Raises InvalidRequest."""
    found = frozenset(wanted)
    if not found:
        raise InvalidRequest("scopes: a token without any can do nothing.", field="scopes")
    for scope in sorted(found):
        if scope not in frozenset(Scope):
            known = ", ".join(Scope)
            text = f"scopes: {scope[:40]!r} is none of {known}."
            raise InvalidRequest(text, field="scopes")
    return found


def effective(scopes: frozenset[str], role: Role) -> frozenset[str]:
    """What a token of a user of *role* can do; a monitor changes nothing but the own account."""
    if role is not Role.MONITOR:
        return scopes
    return _OF_MONITOR if Scope.ALL in scopes else scopes & _OF_MONITOR


def check_granted(maker: frozenset[str], wanted: frozenset[str]) -> None:
    """A token never grants more than its maker has. Raises Forbidden."""
    beyond = [scope for scope in sorted(wanted) if not allows(maker, scope)]
    if beyond:
        text = f"this token can't give {', '.join(beyond)}: it has only {', '.join(sorted(maker))}."
        raise Forbidden(text, scopes=beyond)
