"""What all tables share. Times are integer microseconds since the epoch, JSON is text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import sqlalchemy as sa

metadata: Final = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Serial: Final = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""For a primary key that the database counts up."""


def micros(seconds_since_epoch: float) -> int:
    """A time as stored."""
    return round(seconds_since_epoch * 1_000_000)


def seconds(stored: int) -> float:
    """A stored time as Unix seconds."""
    return stored / 1_000_000


def one_of(column: sa.ColumnElement[Any], values: Iterable[str]) -> sa.ColumnElement[bool]:
    """``column IN values`` for few fixed values; compiled statements can't expand lists."""
    return sa.or_(sa.false(), *(column == sa.literal(str(value)) for value in values))
