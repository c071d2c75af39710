"""The usage ledger, and prices.

Revision ID: 0009
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_TEXTS = ("session_id", "session", "kind", "nonce", "node", "user_id", "user", "project_id")
_MORE_TEXTS = ("domain_id", "group_name", "token_id")
_SLOTS = ("cpu_milli", "mem_bytes", "disk_bytes", "pids")
_MEASURED = ("cpu_us", "mem_peak_bytes", "disk_used_bytes", "received_bytes", "sent_bytes")
# Sessions that run while the schema changes: their rows are open from now on.
_RUNNING = """
INSERT INTO usage (id, session_id, session, kind, attempt, nonce, node, user_id, "user", project_id,
    domain_id, group_name, token_id, cpu_milli, mem_bytes, disk_bytes, pids, started_at, closed_by,
    reason, recorded_at)
SELECT s.id || '.' || s.attempt, s.id, s.name, s.kind, s.attempt, s.nonce, s.node, s.owner_id,
    s.owner, s.project_id, p.domain_id, s.group_name, '', s.cpu_milli, s.mem_bytes, s.disk_bytes,
    s.pids, s.started_at, '', '', s.started_at
FROM sessions s JOIN projects p ON p.id = s.project_id
WHERE s.status IN ('RUNNING', 'TERMINATING') AND s.started_at IS NOT NULL AND s.node IS NOT NULL
"""


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("id", sa.Text(), nullable=False),
        *(sa.Column(name, sa.Text(), nullable=False) for name in _TEXTS[:3]),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        *(sa.Column(name, sa.Text(), nullable=False) for name in (*_TEXTS[3:], *_MORE_TEXTS)),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in _SLOTS),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger()),
        sa.Column("closed_by", sa.Text(), nullable=False),
        *(sa.Column(name, sa.BigInteger()) for name in _MEASURED),
        sa.Column("corrects", sa.Text()),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("recorded_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage")),
        sa.UniqueConstraint("corrects", name=op.f("uq_usage_corrects")),
    )
    op.create_index("ix_usage_ended_at", "usage", ["ended_at", "id"])
    op.create_index("ix_usage_session_id", "usage", ["session_id"])
    op.create_index("ix_usage_user_id", "usage", ["user_id", "ended_at"])
    op.create_index("ix_usage_project_id", "usage", ["project_id", "ended_at"])
    op.create_table(
        "usage_prices",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            sa.Identity(always=False),
            nullable=False,
        ),
        sa.Column("group_name", sa.Text(), nullable=False),
        sa.Column("slot", sa.Text(), nullable=False),
        sa.Column("price", sa.Text(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("valid_from", sa.BigInteger(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage_prices")),
    )
    op.execute(_RUNNING)
