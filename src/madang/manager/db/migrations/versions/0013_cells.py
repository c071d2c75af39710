"""Interpreters of sessions and their cells.

Revision ID: 0013
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "interpreters",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("language", sa.Text(), nullable=False),
        sa.Column("driver", sa.Text(), nullable=False),
        sa.Column("cwd", sa.Text(), nullable=False),
        sa.Column("env", sa.Text(), nullable=False),
        sa.Column("nonce", sa.Text(), nullable=False),
        sa.Column("exec_id", sa.Text(), nullable=False),
        sa.Column("base", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("restarts", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger()),
        sa.Column("ended", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_interpreters")),
        sa.ForeignKeyConstraint(
            ["session_id"],
            ["sessions.id"],
            name=op.f("fk_interpreters_session_id"),
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_interpreters_session_id", "interpreters", ["session_id"])
    op.create_table(
        "cells",
        sa.Column("interpreter_id", sa.Text(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        *(
            sa.Column(flag, sa.Integer(), nullable=False)
            for flag in ("silent", "store", "stdin", "stop_on_error")
        ),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer()),
        sa.Column("took_us", sa.BigInteger()),
        sa.Column("cpu_us", sa.BigInteger()),
        sa.Column("mem_bytes", sa.BigInteger()),
        sa.Column("error", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("interpreter_id", "id", name=op.f("pk_cells")),
        sa.ForeignKeyConstraint(
            ["interpreter_id"],
            ["interpreters.id"],
            name=op.f("fk_cells_interpreter_id"),
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_cells_interpreter_id_seq", "cells", ["interpreter_id", "seq"])
