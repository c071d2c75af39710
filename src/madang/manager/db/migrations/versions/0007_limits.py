"""Limits with their versions, whom they are assigned to, presets; idle sessions.

Revision ID: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_PRESETS = (
    ("small", '{"cpu":0.5,"mem_bytes":536870912}', "for trying things out"),
    ("medium", '{"cpu":2.0,"mem_bytes":4294967296}', "for a notebook or a build"),
    ("large", '{"cpu":8.0,"mem_bytes":34359738368}', "for training on CPUs"),
)


def upgrade() -> None:
    op.create_table(
        "limits",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            sa.Identity(),
            nullable=False,
        ),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("author_id", sa.Text(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("removed", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["author_id"], ["users.id"], name=op.f("fk_limits_author_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_limits")),
        sa.UniqueConstraint("name", "version", name=op.f("uq_limits_name_version")),
    )
    op.create_table(
        "limit_targets",
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("target", name=op.f("pk_limit_targets")),
    )
    presets = op.create_table(
        "presets",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("size", sa.Text(), nullable=False),
        sa.Column("about", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_presets")),
    )
    op.bulk_insert(
        presets,
        [
            {"name": name, "size": size, "about": about, "version": 1, "author": "", "at": 0}
            for name, size, about in _PRESETS
        ],
    )
    for name in ("token_id", "idle_text", "protected_by"):
        op.add_column("sessions", sa.Column(name, sa.Text(), server_default="", nullable=False))
    for name in ("idle_stop_at", "protected_until"):
        op.add_column("sessions", sa.Column(name, sa.BigInteger()))
    op.create_index("ix_sessions_owner_id_status", "sessions", ["owner_id", "status"])
    op.create_index("ix_sessions_project_id_status", "sessions", ["project_id", "status"])
