"""Rows of images."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from madang.manager.db import metadata

images: Final = sa.Table(
    "images",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, index=True),
    sa.Column("owner_id", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("project_id", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("status_since", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("requirements", sa.Text, nullable=False),
    sa.Column("labels", sa.Text, nullable=False),
    sa.Column("size", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False, index=True),
    sa.Column("python", sa.Text, nullable=False),
    sa.Column("layers", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("build", sa.Text, nullable=False),
    sa.Column("build_name", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("policy", sa.Text, nullable=False, server_default=""),
    sa.Column("action", sa.Text, nullable=False, server_default="build"),
    sa.Column("asked", sa.Text, nullable=False, server_default="{}"),
    sa.Column("source", sa.Text, nullable=False, server_default="{}"),
    sa.Column("config", sa.Text, nullable=False, server_default="{}"),
    sa.Column("refresh_us", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("refreshed_at", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("making", sa.Text, nullable=False, server_default=""),
)

sa.Index(
    "uq_images_ready",
    images.c.project_id,
    images.c.name,
    unique=True,
    sqlite_where=images.c.status == "READY",
    postgresql_where=images.c.status == "READY",
)
sa.Index(
    "uq_images_building",
    images.c.project_id,
    images.c.name,
    unique=True,
    sqlite_where=images.c.status == "BUILDING",
    postgresql_where=images.c.status == "BUILDING",
)
