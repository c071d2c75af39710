"""Sessions can be frozen: since when, and by which order.

Revision ID: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sessions", sa.Column("frozen_at", sa.BigInteger(), nullable=True))
    op.add_column(
        "sessions",
        sa.Column("freeze_revision", sa.BigInteger(), server_default="0", nullable=False),
    )
