"""A value that does not show itself in logs, errors or ``repr``."""

from __future__ import annotations

from typing import final


@final
class Secret:
    """Holds text; only ``reveal`` gives it out."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"

    __str__ = __repr__
