"""Passwords, key pairs, invitations; names that are each owner's or project's own.

Revision ID: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("domains", "projects", "users"):
        op.add_column(
            table, sa.Column("version", sa.BigInteger(), server_default="1", nullable=False)
        )
    op.add_column("users", sa.Column("password", sa.Text()))
    op.add_column("users", sa.Column("totp", sa.Text()))
    op.add_column("users", sa.Column("totp_since", sa.BigInteger()))
    op.add_column(
        "users", sa.Column("totp_step", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.add_column("tokens", sa.Column("kind", sa.Text(), server_default="token", nullable=False))
    op.add_column("tokens", sa.Column("secret", sa.Text()))
    op.add_column("tokens", sa.Column("source", sa.Text(), server_default="", nullable=False))
    op.create_index("ix_tokens_user_id", "tokens", ["user_id", "created_at"])
    op.add_column("events", sa.Column("project_id", sa.Text(), server_default="", nullable=False))
    _create_tables()
    _free_names()


def _create_tables() -> None:
    op.create_table(
        "invitations",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("user_id", sa.Text()),
        sa.Column("made_by", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("used_at", sa.BigInteger()),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_invitations_project_id")
        ),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_invitations_user_id")),
        sa.ForeignKeyConstraint(["made_by"], ["users.id"], name=op.f("fk_invitations_made_by")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_invitations")),
        sa.UniqueConstraint("digest", name=op.f("uq_invitations_digest")),
    )
    op.create_table(
        "recovery_codes",
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_recovery_codes_user_id")),
        sa.PrimaryKeyConstraint("user_id", "digest", name=op.f("pk_recovery_codes")),
    )
    op.create_table(
        "attempts",
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("failures", sa.BigInteger(), nullable=False),
        sa.Column("last_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("subject", name=op.f("pk_attempts")),
    )
    op.create_index("ix_attempts_last_at", "attempts", ["last_at"])
    op.create_table(
        "signatures",
        sa.Column("token_id", sa.Text(), nullable=False),
        sa.Column("nonce", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("token_id", "nonce", name=op.f("pk_signatures")),
    )
    op.create_index("ix_signatures_expires_at", "signatures", ["expires_at"])


def _free_names() -> None:
    """A name was one session's or one image's of the whole server, and told that it exists."""
    # SQLite copies the table; foreign keys are off on this connection, so its history stays.
    with op.batch_alter_table("sessions") as sessions:
        sessions.drop_constraint("uq_sessions_name", type_="unique")
        sessions.create_unique_constraint("uq_sessions_owner_id_name", ["owner_id", "name"])
    op.create_index("ix_sessions_name", "sessions", ["name"])
    for name, status in (("uq_images_ready", "READY"), ("uq_images_building", "BUILDING")):
        op.drop_index(name, "images")
        op.create_index(
            name,
            "images",
            ["project_id", "name"],
            unique=True,
            sqlite_where=sa.text(f"status = '{status}'"),
            postgresql_where=sa.text(f"status = '{status}'"),
        )
