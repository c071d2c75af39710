"""Nodes with their ledger, groups of them, and the kernels that a node shall forget."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from madang.manager.db import metadata

SLOTS: Final = ("cpu_milli", "mem_bytes", "disk_bytes", "pids")
"""What a node has of, in the ledger's units: thousandths of a core, bytes, bytes, processes."""


def _ledger() -> list[sa.Column[int] | sa.CheckConstraint]:
    """Three columns a slot.

    ``has_…`` is what the agent says; ``cap_…`` is that, but never less than what is allocated at
    present (a machine may come back smaller); the CHECK makes over-commitment impossible.
    """
    items: list[sa.Column[int] | sa.CheckConstraint] = []
    for slot in SLOTS:
        items += [
            sa.Column(f"has_{slot}", sa.BigInteger, nullable=False),
            sa.Column(f"cap_{slot}", sa.BigInteger, nullable=False),
            sa.Column(f"used_{slot}", sa.BigInteger, nullable=False),
            sa.CheckConstraint(
                f"used_{slot} >= 0 AND used_{slot} <= cap_{slot}", name=f"ledger_{slot}"
            ),
        ]
    return items


nodes: Final = sa.Table(
    "nodes",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("incarnation", sa.BigInteger, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("facts", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("seen_at", sa.BigInteger, nullable=False),
    *_ledger(),
    sa.Column("group_name", sa.Text, nullable=False, server_default="default"),
)

groups: Final = sa.Table(
    "groups",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("changed_at", sa.BigInteger, nullable=False),
)

forgotten: Final = sa.Table(
    "forgotten",
    metadata,
    sa.Column("node", sa.Text, sa.ForeignKey("nodes.name"), primary_key=True),
    sa.Column("session_id", sa.Text, primary_key=True),
    sa.Column("attempt", sa.BigInteger, primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
)
