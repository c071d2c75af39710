"""What sessions wish for their place, what was decided and what became of it, reservations.

Revision ID: 0010
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from madang.manager.db.schema import Serial

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

SLOTS = ("cpu_milli", "mem_bytes", "disk_bytes", "pids")


def upgrade() -> None:
    for name in ("wishes", "told"):
        op.add_column("sessions", sa.Column(name, sa.Text(), server_default="", nullable=False))
    op.create_table(
        "runs",
        sa.Column("id", Serial, sa.Identity(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("group_name", sa.Text(), nullable=False),
        sa.Column("node", sa.Text()),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("program", sa.Text(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        *(sa.Column(slot, sa.BigInteger(), nullable=False) for slot in SLOTS),
        sa.Column("time_us", sa.BigInteger()),
        sa.Column("wishes", sa.Text(), nullable=False),
        sa.Column("told", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("scheduled_at", sa.BigInteger()),
        sa.Column("ended_at", sa.BigInteger(), nullable=False),
        sa.Column("result", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
    )
    op.create_index("ix_runs_ended_at", "runs", ["ended_at"])
    op.create_index("ix_runs_session_id", "runs", ["session_id"])
    op.create_table(
        "decisions",
        sa.Column("id", Serial, sa.Identity(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("whole", sa.Integer(), nullable=False),
        sa.Column("inputs", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_decisions")),
    )
    op.create_index("ix_decisions_at", "decisions", ["at"])
    op.create_table(
        "reservations",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("group_name", sa.Text(), nullable=False),
        sa.Column("nodes", sa.Text(), nullable=False),
        sa.Column("starts_at", sa.BigInteger(), nullable=False),
        sa.Column("ends_at", sa.BigInteger(), nullable=False),
        sa.Column("no_show_us", sa.BigInteger(), nullable=False),
        sa.Column("owner_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_reservations")),
    )
