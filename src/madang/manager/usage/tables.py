"""The ledger, and what things cost."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from madang.manager.db import metadata
from madang.manager.db.schema import Serial

usage: Final = sa.Table(
    "usage",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("session_id", sa.Text, nullable=False),
    sa.Column("session", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("attempt", sa.BigInteger, nullable=False),
    sa.Column("nonce", sa.Text, nullable=False),
    sa.Column("node", sa.Text, nullable=False),
    sa.Column("user_id", sa.Text, nullable=False),
    sa.Column("user", sa.Text, nullable=False),
    sa.Column("project_id", sa.Text, nullable=False),
    sa.Column("domain_id", sa.Text, nullable=False),
    sa.Column("group_name", sa.Text, nullable=False),
    sa.Column("token_id", sa.Text, nullable=False),
    sa.Column("cpu_milli", sa.BigInteger, nullable=False),
    sa.Column("mem_bytes", sa.BigInteger, nullable=False),
    sa.Column("disk_bytes", sa.BigInteger, nullable=False),
    sa.Column("pids", sa.BigInteger, nullable=False),
    sa.Column("started_at", sa.BigInteger, nullable=False),
    sa.Column("ended_at", sa.BigInteger),
    sa.Column("closed_by", sa.Text, nullable=False),
    sa.Column("cpu_us", sa.BigInteger),
    sa.Column("mem_peak_bytes", sa.BigInteger),
    sa.Column("disk_used_bytes", sa.BigInteger),
    sa.Column("received_bytes", sa.BigInteger),
    sa.Column("sent_bytes", sa.BigInteger),
    sa.Column("corrects", sa.Text, unique=True),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("recorded_at", sa.BigInteger, nullable=False),
)
"""No foreign keys: what was used stays true when sessions, users and machines are gone."""
sa.Index("ix_usage_ended_at", usage.c.ended_at, usage.c.id)
sa.Index("ix_usage_session_id", usage.c.session_id)
sa.Index("ix_usage_user_id", usage.c.user_id, usage.c.ended_at)
sa.Index("ix_usage_project_id", usage.c.project_id, usage.c.ended_at)

usage_prices: Final = sa.Table(
    "usage_prices",
    metadata,
    sa.Column("id", Serial, sa.Identity(), primary_key=True),
    sa.Column("group_name", sa.Text, nullable=False),
    sa.Column("slot", sa.Text, nullable=False),
    sa.Column("price", sa.Text, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("valid_from", sa.BigInteger, nullable=False),
    sa.Column("author", sa.Text, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
)
"""Only added to: the newest row whose time has come is in force."""
