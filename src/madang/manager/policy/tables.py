"""Every version of every policy, and what its rules have refused."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from madang.manager.db import metadata
from madang.manager.db.schema import Serial

policies: Final = sa.Table(
    "policies",
    metadata,
    sa.Column("id", Serial, sa.Identity(), primary_key=True),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("author_id", sa.Text, sa.ForeignKey("users.id"), nullable=False),
    sa.Column("author", sa.Text, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.UniqueConstraint("target", "version"),
)

policy_counts: Final = sa.Table(
    "policy_counts",
    metadata,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("version", sa.BigInteger, primary_key=True),
    sa.Column("line", sa.BigInteger, primary_key=True),
    sa.Column("refused", sa.BigInteger, nullable=False),
)
