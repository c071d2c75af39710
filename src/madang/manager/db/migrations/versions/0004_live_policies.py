"""What rules of sandbox policies have refused; policies that are kept with images.

Revision ID: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "policy_counts",
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("line", sa.BigInteger(), nullable=False),
        sa.Column("refused", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("target", "version", "line", name=op.f("pk_policy_counts")),
    )
    op.add_column("sessions", sa.Column("refused", sa.Text(), server_default="{}", nullable=False))
    for table, column in (("sessions", "image_policy"), ("images", "policy")):
        op.add_column(table, sa.Column(column, sa.Text(), server_default="", nullable=False))
