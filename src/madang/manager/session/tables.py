"""Sessions, their history, and idempotency keys."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from madang.manager.db import metadata
from madang.manager.db.schema import Serial

sessions: Final = sa.Table(
    "sessions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("owner_id", sa.Text, sa.ForeignKey("users.id"), nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("project_id", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("result", sa.Text),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("image", sa.Text, nullable=False),
    sa.Column("image_digest", sa.Text, nullable=False),
    sa.Column("image_mount", sa.Text, nullable=False),
    sa.Column("cpu_milli", sa.BigInteger, nullable=False),
    sa.Column("mem_bytes", sa.BigInteger, nullable=False),
    sa.Column("pids", sa.BigInteger, nullable=False),
    sa.Column("disk_bytes", sa.BigInteger, nullable=False),
    sa.Column("time_us", sa.BigInteger),
    sa.Column("node", sa.Text, sa.ForeignKey("nodes.name")),
    sa.Column("held_by", sa.Text, sa.ForeignKey("nodes.name")),
    sa.Column("attempt", sa.BigInteger, nullable=False),
    sa.Column("nonce", sa.Text, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("started_at", sa.BigInteger),
    sa.Column("ended_at", sa.BigInteger),
    sa.Column("status_since", sa.BigInteger, nullable=False),
    sa.Column("deadline", sa.BigInteger),
    sa.Column("stop_reason", sa.Text, nullable=False),
    sa.Column("stop_text", sa.Text, nullable=False),
    sa.Column("grace_us", sa.BigInteger, nullable=False),
    sa.Column("frozen_at", sa.BigInteger),
    sa.Column("freeze_revision", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("pending", sa.Text),
    sa.Column("ended", sa.Text),
    sa.Column("phases", sa.Text, nullable=False),
    sa.Column("enforced", sa.Text, nullable=False),
    sa.Column("warnings", sa.Text, nullable=False),
    sa.Column("log_end", sa.BigInteger),
    sa.Column("refused", sa.Text, nullable=False, server_default="{}"),
    sa.Column("image_policy", sa.Text, nullable=False, server_default=""),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("group_name", sa.Text, nullable=False, server_default="default"),
    sa.Column("token_id", sa.Text, nullable=False, server_default=""),
    sa.Column("idle_text", sa.Text, nullable=False, server_default=""),
    sa.Column("protected_by", sa.Text, nullable=False, server_default=""),
    sa.Column("idle_stop_at", sa.BigInteger),
    sa.Column("protected_until", sa.BigInteger),
    sa.Column("wishes", sa.Text, nullable=False, server_default=""),
    sa.Column("told", sa.Text, nullable=False, server_default=""),
    sa.UniqueConstraint("owner_id", "name"),
)
sa.Index("ix_sessions_name", sessions.c.name)
sa.Index("ix_sessions_status", sessions.c.status, sessions.c.priority, sessions.c.created_at)
sa.Index("ix_sessions_held_by", sessions.c.held_by, sessions.c.revision)
sa.Index("ix_sessions_owner_id_status", sessions.c.owner_id, sessions.c.status)
sa.Index("ix_sessions_project_id_status", sessions.c.project_id, sessions.c.status)
sa.Index("ix_sessions_created_at", sessions.c.created_at, sessions.c.id)

history: Final = sa.Table(
    "history",
    metadata,
    sa.Column("id", Serial, sa.Identity(), primary_key=True),
    sa.Column(
        "session_id", sa.Text, sa.ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False
    ),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("source", sa.Text),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("cause", sa.Text, nullable=False),
)
sa.Index("ix_history_session_id", history.c.session_id, history.c.id)

idempotency: Final = sa.Table(
    "idempotency",
    metadata,
    sa.Column("owner_id", sa.Text, sa.ForeignKey("users.id"), primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("session_id", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
)
sa.Index("ix_idempotency_created_at", idempotency.c.created_at)
