"""Domains, projects, users with their memberships, tokens, logins and invitations."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from madang.manager.db import metadata

domains: Final = sa.Table(
    "domains",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("disabled_at", sa.BigInteger),
    sa.Column("version", sa.BigInteger, nullable=False, server_default="1"),
)

projects: Final = sa.Table(
    "projects",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("domain_id", sa.Text, sa.ForeignKey("domains.id"), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("disabled_at", sa.BigInteger),
    sa.Column("version", sa.BigInteger, nullable=False, server_default="1"),
    sa.UniqueConstraint("domain_id", "name"),
)

users: Final = sa.Table(
    "users",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("project_id", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("disabled_at", sa.BigInteger),
    sa.Column("domain_id", sa.Text, nullable=False, server_default="default"),
    sa.Column("version", sa.BigInteger, nullable=False, server_default="1"),
    sa.Column("password", sa.Text),
    sa.Column("totp", sa.Text),
    sa.Column("totp_since", sa.BigInteger),
    sa.Column("totp_step", sa.BigInteger, nullable=False, server_default="0"),
)

memberships: Final = sa.Table(
    "memberships",
    metadata,
    sa.Column("user_id", sa.Text, sa.ForeignKey("users.id"), primary_key=True),
    sa.Column("project_id", sa.Text, sa.ForeignKey("projects.id"), primary_key=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
)

tokens: Final = sa.Table(
    "tokens",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, sa.ForeignKey("users.id"), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False, unique=True),
    sa.Column("scopes", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("last_used_at", sa.BigInteger),
    sa.Column("revoked_at", sa.BigInteger),
    sa.Column("kind", sa.Text, nullable=False, server_default="token"),
    sa.Column("secret", sa.Text),
    sa.Column("source", sa.Text, nullable=False, server_default=""),
)
sa.Index("ix_tokens_user_id", tokens.c.user_id, tokens.c.created_at)

invitations: Final = sa.Table(
    "invitations",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False, unique=True),
    sa.Column("project_id", sa.Text, sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("user_id", sa.Text, sa.ForeignKey("users.id")),
    sa.Column("made_by", sa.Text, sa.ForeignKey("users.id"), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger, nullable=False),
    sa.Column("used_at", sa.BigInteger),
)

recovery_codes: Final = sa.Table(
    "recovery_codes",
    metadata,
    sa.Column("user_id", sa.Text, sa.ForeignKey("users.id"), primary_key=True),
    sa.Column("digest", sa.Text, primary_key=True),
)

attempts: Final = sa.Table(
    "attempts",
    metadata,
    sa.Column("subject", sa.Text, primary_key=True),
    sa.Column("failures", sa.BigInteger, nullable=False),
    sa.Column("last_at", sa.BigInteger, nullable=False),
)
sa.Index("ix_attempts_last_at", attempts.c.last_at)

signatures: Final = sa.Table(
    "signatures",
    metadata,
    sa.Column("token_id", sa.Text, primary_key=True),
    sa.Column("nonce", sa.Text, primary_key=True),
    sa.Column("expires_at", sa.BigInteger, nullable=False),
)
sa.Index("ix_signatures_expires_at", signatures.c.expires_at)
