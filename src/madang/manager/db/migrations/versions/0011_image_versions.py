"""Where images came from, what they say of their programs, and how they are kept up to date.

Revision ID: 0011
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

TEXTS = {"action": "build", "asked": "{}", "source": "{}", "config": "{}"}
NUMBERS = ("refresh_us", "refreshed_at")


def upgrade() -> None:
    for name, default in TEXTS.items():
        op.add_column("images", sa.Column(name, sa.Text(), server_default=default, nullable=False))
    for name in NUMBERS:
        op.add_column(
            "images", sa.Column(name, sa.BigInteger(), server_default="0", nullable=False)
        )
