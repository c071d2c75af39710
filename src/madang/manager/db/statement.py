"""SQLAlchemy statements as text and argument order for one driver."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.compiler import SQLCompiler

Statement = sa.Select[Any] | sa.Insert | sa.Update | sa.Delete | sa.CompoundSelect[Any]

OWN_PREFIX: Final = "b_"


class Prepared:
    """A statement's text for one dialect, and how to lay out its arguments and rows."""

    __slots__ = ("fixed", "make_row", "order", "text")

    def __init__(self, statement: Statement, dialect: Dialect, columns: tuple[str, ...]) -> None:
        keys = list(columns) if isinstance(statement, sa.Insert | sa.Update) else None
        compiled = statement.compile(dialect=dialect, column_keys=keys)
        assert isinstance(compiled, SQLCompiler)
        self.text: Final[str] = compiled.string
        self.order: Final[tuple[str, ...]] = tuple(compiled.positiontup or ())
        self.fixed: Final[dict[str, Any]] = {
            name: bind.value
            for bind, name in compiled.bind_names.items()
            if not bind.required and not name.startswith(OWN_PREFIX)
        }
        self.make_row: Final[Callable[[Iterable[Any]], Any] | None] = _row_maker(statement)

    def arguments(self, params: dict[str, Any]) -> list[Any]:
        fixed = self.fixed
        return [params[name] if name in params else fixed[name] for name in self.order]

    def rows(self, records: Iterable[Iterable[Any]]) -> list[Any]:
        assert self.make_row is not None, "the statement returns no rows"
        return [self.make_row(record) for record in records]


def _row_maker(statement: Statement) -> Callable[[Iterable[Any]], Any] | None:
    if isinstance(statement, sa.Select | sa.CompoundSelect):
        columns = list(statement.selected_columns)
    else:
        columns = list(statement.exported_columns)
    if not columns:
        return None
    names = [column.key or f"column_{at}" for at, column in enumerate(columns)]
    return _row_type(*names)


def _row_type(*names: str) -> Callable[[Iterable[Any]], Any]:
    make_type: Callable[..., Any] = namedtuple  # noqa: PYI024 - the names come at run time
    make: Callable[[Iterable[Any]], Any] = make_type("Row", names)._make
    return make


class Preparer:
    """Compiles once per statement and set of columns."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect: Final = dialect
        self._prepare: Final = lru_cache(maxsize=1024)(self._compile)

    def __call__(self, statement: Statement, params: dict[str, Any]) -> Prepared:
        return self._prepare(statement, tuple(params))

    def _compile(self, statement: Statement, keys: tuple[str, ...]) -> Prepared:
        columns = tuple(key for key in keys if not key.startswith(OWN_PREFIX))
        return Prepared(statement, self._dialect, columns)
