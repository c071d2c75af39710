"""What was decided and what became of it: runs, decisions; and reservations."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from madang.manager.db import metadata
from madang.manager.db.schema import Serial
from madang.manager.fleet.tables import SLOTS

runs: Final = sa.Table(
    "runs",
    metadata,
    sa.Column("id", Serial, sa.Identity(), primary_key=True),
    sa.Column("session_id", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("group_name", sa.Text, nullable=False),
    sa.Column("node", sa.Text),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("project_id", sa.Text, nullable=False),
    sa.Column("program", sa.Text, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    *(sa.Column(slot, sa.BigInteger, nullable=False) for slot in SLOTS),
    sa.Column("time_us", sa.BigInteger),
    sa.Column("wishes", sa.Text, nullable=False),
    sa.Column("told", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("scheduled_at", sa.BigInteger),
    sa.Column("ended_at", sa.BigInteger, nullable=False),
    sa.Column("result", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)
sa.Index("ix_runs_ended_at", runs.c.ended_at)
sa.Index("ix_runs_session_id", runs.c.session_id)

decisions: Final = sa.Table(
    "decisions",
    metadata,
    sa.Column("id", Serial, sa.Identity(), primary_key=True),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("whole", sa.Integer, nullable=False),
    sa.Column("inputs", sa.LargeBinary, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
)
sa.Index("ix_decisions_at", decisions.c.at)

reservations: Final = sa.Table(
    "reservations",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("project_id", sa.Text, nullable=False),
    sa.Column("group_name", sa.Text, nullable=False),
    sa.Column("nodes", sa.Text, nullable=False),
    sa.Column("starts_at", sa.BigInteger, nullable=False),
    sa.Column("ends_at", sa.BigInteger, nullable=False),
    sa.Column("no_show_us", sa.BigInteger, nullable=False),
    sa.Column("owner_id", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
)
