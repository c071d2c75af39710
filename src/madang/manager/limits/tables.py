"""Every version of limits, whom they are assigned to, and presets."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from madang.manager.db import metadata
from madang.manager.db.schema import Serial

limits: Final = sa.Table(
    "limits",
    metadata,
    sa.Column("id", Serial, sa.Identity(), primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("author_id", sa.Text, sa.ForeignKey("users.id"), nullable=False),
    sa.Column("author", sa.Text, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("removed", sa.Integer, nullable=False),
    sa.UniqueConstraint("name", "version"),
)

limit_targets: Final = sa.Table(
    "limit_targets",
    metadata,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("author", sa.Text, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
)

presets: Final = sa.Table(
    "presets",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("size", sa.Text, nullable=False),
    sa.Column("about", sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("author", sa.Text, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
)
