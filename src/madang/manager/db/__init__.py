"""A small executor: SQLAlchemy Core builds and compiles statements, the driver runs them.

``Database`` has two faces, the same on SQLite and PostgreSQL::

    async with db.begin() as tx:  # one writer at a time, commits at the end, rolls back on error
        row = await tx.one(UPDATE_SOMETHING, b_id=..., status=...)
    async with db.read() as tx:
        rows = await tx.all(SELECT_SOMETHING, b_id=...)

Rules. Statements live at module level (they are compiled once and cached); their own parameters are
named ``b_…``, all other keywords of a call name columns of the INSERT or UPDATE. No ``IN`` lists:
see ``one_of``. Nothing else is awaited inside a transaction: on SQLite statements run inline in the
event loop, microseconds each, and on PostgreSQL each waiting moment holds up all other writers.

One writer at a time, also on PostgreSQL (a transaction-level advisory lock): events get their
numbers in the order in which they become visible, so that a reader that continues after the last
number it saw misses none, and two transactions never deadlock. Throughput comes from batches.
"""

from madang.manager.db.database import Database, Reader, Transaction, open_database
from madang.manager.db.schema import metadata, micros, one_of, seconds

__all__ = [
    "Database",
    "Reader",
    "Transaction",
    "metadata",
    "micros",
    "one_of",
    "open_database",
    "seconds",
]
